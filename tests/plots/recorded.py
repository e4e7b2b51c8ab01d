"""Records as a monitor makes them, with a failure between, for the tests of figures and pages."""

from __future__ import annotations

from typing import Any

import torch

import hesscurv

D, K = 40, 4
NAMES = ("0.weight", "0.bias", "2.weight")
FAILED = 20


def record(step: int) -> dict[str, Any]:
    """One record that holds every quantity, of values that differ by step."""
    t = step / 10
    return {
        "step": step,
        "status": "ok",
        "seconds": 0.5,
        "num_matvecs": 12,
        "fraction": 0.05,
        "loss": 2 / (1 + t),
        "eigenvalues": [5 + t, -3.0, 1.0, -0.1],
        "residuals": [1e-3, 1e-3, 1e-4, 1e-4],
        "converged": 4,
        "sharpness": 5 + t,
        "learning_rate": 0.1 if step < 20 else 0.05,
        "stable_rate": 2 / (5 + t),
        "sharpness_ratio": 0.05 * (5 + t),
        "gradient_share": 0.7,
        "overlap": 0.3 + 0.01 * t,
        "overlap_chance": K / D,
        "overlap_chance_std": 0.02,
        "overlap_z_score": 10.0,
        "overlap_by_k": {str(k): 0.1 * k for k in range(1, K + 1)},
        "overlap_by_parameter": dict(zip(NAMES, (0.2, 0.0, 0.1), strict=True)),
        "leverage_by_parameter": dict(zip(NAMES, (0.5, 0.1, 0.4), strict=True)),
        "mask_by_parameter": dict(zip(NAMES, (0.2, 0.0, 0.1), strict=True)),
        "space_overlaps": [[s, 1 - 0.01 * (step - s)] for s in range(0, step, 10) if s != FAILED],
        "mask_ious": [[s, 1 - 0.02 * (step - s)] for s in range(0, step, 10) if s != FAILED],
        "trace": 20 + t,
        "trace_standard_error": 0.5,
        "effective_rank": 4.0,
        "sparsity": 0.1,
        "sparsity_by_parameter": dict(zip(NAMES, (0.1 * t, 0.0, 0.05 * t), strict=True)),
    }


def failure(step: int, error: str = "RuntimeError: no luck") -> dict[str, Any]:
    """The record of a measurement that failed."""
    return {"step": step, "status": "failed", "error": error, "seconds": 0.1, "num_matvecs": 3}


def run() -> list[dict[str, Any]]:
    """Five records at steps 0, 10, ..., 40; the one at step 20 has failed."""
    return [failure(step) if step == FAILED else record(step) for step in range(0, 50, 10)]


def pairs(seed: int = 0) -> hesscurv.Eigenpairs:
    """Eigenpairs of both signs, the last not converged, over the parameters in `NAMES`."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(D, K, generator=generator, dtype=torch.float64)).Q
    return hesscurv.Eigenpairs(
        torch.tensor([5.0, -3.0, 1.0, -0.1], dtype=torch.float64),
        V,
        torch.tensor([1e-3, 1e-2, 1e-4, 5e-2], dtype=torch.float64),
        torch.tensor([True, True, True, False]),
        num_matvecs=12,
        layout=hesscurv.ParameterLayout(NAMES, ((6, 5), (6,), (4,))),
    )


def lines(ax: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The data of the lines that have a name, by it."""
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): tuple(map(list, line.get_data())) for line in named}
