"""The part `storage` of gpu.py: eigenpairs whose basis lies in the host's memory.

Import it; it is not run.
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from gpu_problems import make_problem, on_device
from gpu_products import free_memory
from models import build
from results import Report, print_table
from timing import wait_for

import hesscurv


def pageable() -> AbstractContextManager[Any]:
    """Let the host's memory not be pinned, so that the device waits for every copy."""

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")

    return mock.patch("hesscurv.storage.placement.pinned_if_possible", allocate)


CASES = {
    "device": ("device", nullcontext),
    "host, copies beside the work": ("host", nullcontext),
    "host, copies in turns": ("host", pageable),
}
BESIDE, IN_TURNS = list(CASES)[1:]


def measure_storage(report: Report, options: argparse.Namespace, where: str) -> None:
    """Solve for pairs of 3c3d with the basis on the device and on the host, with and without."""
    if options.quick:
        problem = on_device(build("convnet", options.data, steps=50), options.device)
    else:
        problem = make_problem("3c3d", options)
    k = options.k or (10 if options.quick else 300)
    H = hesscurv.HessianOperator(
        problem.model, hesscurv.supervised(problem.loss_fn), problem.batches
    )
    H.calibrate(expected=3 * k)
    print(f"{problem.name}: D = {problem.size:,}, k = {k}, tol 1e-3, {problem.num_samples} samples")
    rounds = 1 if options.quick else 3  # the first one also warms up
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    found: dict[str, hesscurv.Eigenpairs] = {}
    until = time.perf_counter() + 0.8 * 60 * options.minutes
    for _ in range(rounds):
        for name, (storage, how) in CASES.items():
            if seconds[name] and time.perf_counter() + min(seconds[name]) > until:
                continue
            found.pop(name, None)
            free_memory(options.device)
            with how():
                start = time.perf_counter()
                found[name] = hesscurv.eigsh(H, k, tol=1e-3, storage=storage)
                wait_for(options.device)
                seconds[name].append(time.perf_counter() - start)
    for name, pairs in found.items():
        report.rows.append(
            {
                "part": "storage",
                "device": where,
                "problem": problem.name,
                "parameters": problem.size,
                "k": k,
                "storage": name,
                "seconds": min(seconds[name]),
                "rounds": len(seconds[name]),
                "products": pairs.num_matvecs,
                "converged": int(pairs.converged.sum()),
                "planned_bytes": pairs.info["planned_bytes"],
            }
        )
    print_table(
        ["basis", "seconds", "rounds", "products", "converged", "plan GB"],
        [
            (
                *(row[key] for key in ("storage", "seconds", "rounds", "products", "converged")),
                row["planned_bytes"] / 1e9,
            )
            for row in report.rows
        ],
    )
    beside, in_turns = min(seconds[BESIDE]), min(seconds[IN_TURNS])
    report.judge(
        f"{problem.name}, k={k}, basis on the host: copies beside the work in less time than in "
        "turns",
        beside < in_turns if options.on_gpu else None,
        f"{beside:.3g} s against {in_turns:.3g} s on {where}",
    )
