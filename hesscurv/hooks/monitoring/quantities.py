"""Quantities of a record, each on or off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers import Eigenpairs
from hesscurv.hooks.monitoring.history import History
from hesscurv.hooks.monitoring.layouts import fractions
from hesscurv.metrics import (
    chance_overlap,
    intersection_over_union,
    overlap,
    overlap_by_k,
    overlap_by_parameter,
)
from hesscurv.objective.parameters import ParameterLayout
from hesscurv.optim.stable_rate import stable_rate

_CHEAP = ("loss", "eigenvalues", "sharpness", "gradient_share")
_OVERLAP = (
    *_CHEAP,
    *("overlap", "overlap_by_parameter", "space_overlap", "mask_iou", "sparsity"),
)
QUANTITIES = (*_OVERLAP, "overlap_by_k", "trace")
PRESETS = {"cheap": _CHEAP, "overlap": _OVERLAP, "full": QUANTITIES}

_OF_PAIRS = {"eigenvalues", "sharpness", "gradient_share", "overlap", "overlap_by_k", "trace"}
NEED_PAIRS = _OF_PAIRS | {"overlap_by_parameter", "space_overlap"}
NEED_GRADIENT = {"loss", "gradient_share"}
NEED_MASK = {"overlap", "overlap_by_parameter", "mask_iou"}


def choose_quantities(quantities: str | Iterable[str]) -> tuple[str, ...]:
    """Return quantities by name, in the order of `QUANTITIES`.

    Args:
        quantities: A preset or a quantity; or several of either, where "overlap" is the quantity.

    Raises:
        TypeError: If it is neither a string nor several.
        ValueError: If one is unknown, or there is none.
    """
    names = [quantities] if isinstance(quantities, str) else list(quantities)
    chosen: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"expected names of quantities, got {name!r}")
        if name not in PRESETS and name not in QUANTITIES:
            raise ValueError(
                f"expected quantities among {list(QUANTITIES)} or a preset of {list(PRESETS)}, got "
                f"{name!r}"
            )
        is_preset = name in PRESETS and (names == [quantities] or name not in QUANTITIES)
        chosen |= set(PRESETS[name]) if is_preset else {name}
    if not chosen:
        raise ValueError(f"expected at least one quantity of {list(QUANTITIES)}, got none")
    return tuple(name for name in QUANTITIES if name in chosen)


def spectrum(pairs: Eigenpairs) -> dict[str, Any]:
    """Return the eigenvalues, their residuals and the number of converged ones."""
    return {
        "eigenvalues": pairs.eigenvalues.tolist(),
        "residuals": pairs.residuals.tolist(),
        "converged": int(pairs.converged.sum()),
    }


def sharpness(
    pairs: Eigenpairs, optimizer: Any, largest: Eigenpairs | None = None
) -> dict[str, Any]:
    r"""Return the largest signed eigenvalue, and the stability limit of the learning rate.

    Gradient descent is stable up to the rate 2 / sharpness; momentum shifts that, see
    `hesscurv.optim.stable_rate`. The ratio is :math:`\lambda \eta / 2`, which full-batch training
    drives to 1, the edge of stability (Cohen et al., ICLR 2021).

    Args:
        pairs: The eigenpairs of largest magnitude.
        optimizer: Its parameter group of largest rate is used; None for no rates.
        largest: The pair of the largest eigenvalue by value, if it is not among `pairs`; until it
            has converged, its value is a lower bound.
    """
    value = float((pairs if largest is None else largest).eigenvalues.max())
    out: dict[str, Any] = {"sharpness": value}
    if largest is not None:
        out["sharpness_converged"] = bool(largest.converged.all())
    groups = list(getattr(optimizer, "param_groups", ()))
    rates = [float(group["lr"]) for group in groups if "lr" in group]
    if value > 0:
        group = max(groups, key=lambda g: float(g.get("lr", 0.0)), default=None)
        out["stable_rate"] = stable_rate(value, group)
    if rates:
        out["learning_rate"] = max(rates)
        out["sharpness_ratio"] = value * max(rates) / 2
    return out


def gradient_share(pairs: Eigenpairs, gradient_D: Tensor) -> dict[str, Any]:
    r"""Return the fraction :math:`\|U^T g\|^2 / \|g\|^2` of the gradient in the top space."""
    total = float(gradient_D.norm())
    if total == 0:
        return {}
    inside = pairs.eigenvectors.mT.to(gradient_D) @ (gradient_D / total)
    return {"gradient_share": float(inside.double().square().sum())}


def trace_and_rank(pairs: Eigenpairs, value: float, error: float) -> dict[str, Any]:
    r"""Return the trace with its standard error, and the effective rank.

    That is :math:`\operatorname{tr} H / |\lambda_1|`, the intrinsic dimension of a positive
    semi-definite matrix (Tropp, "An introduction to matrix concentration inequalities", 2015,
    definition 7.1.1). Negative eigenvalues lower it.
    """
    out = {"trace": value, "trace_standard_error": error}
    largest = float(pairs.eigenvalues[0].abs())
    return out | ({"effective_rank": value / largest} if largest > 0 else {})


def mask_overlap(mask_D: Tensor, pairs: Eigenpairs) -> dict[str, Any]:
    """Return the overlap of the magnitude mask with the eigenspace, and its chance level."""
    value = overlap(mask_D, pairs)
    chance = chance_overlap(int(mask_D.sum()), len(mask_D), k2=len(pairs))
    out = {"overlap": value, "overlap_chance": chance.mean, "overlap_chance_std": chance.std}
    if chance.std > 1e-12 * chance.mean:  # else the overlap cannot vary
        out["overlap_z_score"] = (value - chance.mean) / chance.std
    return out


def overlaps_by_parameter(
    mask_D: Tensor, pairs: Eigenpairs, layout: ParameterLayout
) -> dict[str, Any]:
    """Return each parameter's contribution to the overlap, and its shares of space and mask."""
    parts = overlap_by_parameter(mask_D, pairs, layout)
    return {
        "overlap_by_parameter": {name: part.overlap for name, part in parts.items()},
        "leverage_by_parameter": {name: part.leverage_share for name, part in parts.items()},
        "mask_by_parameter": fractions(mask_D, layout),
    }


def overlaps_by_k(magnitudes_D: Tensor, pairs: Eigenpairs) -> dict[str, Any]:
    """Return the overlap of the j largest weights with the top j eigenvectors, j = 1, ..., k."""
    values = overlap_by_k(magnitudes_D, pairs).tolist()
    return {"overlap_by_k": {str(j): value for j, value in enumerate(values, start=1)}}


def space_overlaps(spaces: History, pairs: Eigenpairs, layout: ParameterLayout) -> dict[str, Any]:
    """Return the overlaps of the eigenspace with earlier ones."""
    return _compare(
        spaces, layout, pairs.eigenvectors.device, "space_overlap", lambda s: overlap(s, pairs)
    )


def mask_overlaps(masks: History, mask_D: Tensor, layout: ParameterLayout) -> dict[str, Any]:
    """Return the intersection over union of the magnitude mask with earlier ones."""
    return _compare(
        masks, layout, mask_D.device, "mask_iou", lambda m: intersection_over_union(m, mask_D)
    )


def sparsities(zero_D: Tensor, layout: ParameterLayout) -> dict[str, Any]:
    """Return the fraction of weights that are zero, overall and by parameter."""
    return {
        "sparsity": float(zero_D.double().mean()),
        "sparsity_by_parameter": fractions(zero_D, layout),
    }


def _compare(
    history: History, layout: ParameterLayout, device: torch.device, key: str, measure: Any
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    last = history.last and history.last.on(layout, device)
    if last is not None:
        out[key] = measure(last)
    first = history.first and history.first.on(layout, device)
    if first is not None:
        out[f"{key}_first"] = measure(first)
    if history.kept.maxlen:
        found = [(e.step, e.on(layout, device)) for e in history.kept]
        out[f"{key}s"] = [[step, measure(rows)] for step, rows in found if rows is not None]
    return out
