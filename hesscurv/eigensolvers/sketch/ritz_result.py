"""Rayleigh-Ritz step of the sketching methods: eigenpairs from a basis and a projected operator."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers.counted_operator import CountedOperator
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.residuals import (
    ConvergenceWarning,
    converged,
    measured_residuals,
)
from hesscurv.linalg.orthogonalization import complete_
from hesscurv.linalg.ritz import ritz_pairs, rotate_, sides_of, wanted_first


def ritz_result(
    H: CountedOperator,
    basis_mD: Tensor,
    T_rr: Tensor,
    k: int,
    *,
    which: str = "LM",
    method: str,
    generator: torch.Generator,
    residuals: bool,
    tol: float,
    block_size: int,
    start: float,
    info: dict[str, Any],
) -> Eigenpairs:
    """Return the k leading eigenpairs of ``Q T Q^T``, their vectors formed in Q's storage.

    If Q has fewer than k vectors, H was found to have that rank: random orthonormal vectors with
    eigenvalue zero complete the pairs.

    Args:
        H: The operator, for the residuals.
        basis_mD: Shape (m, D), m >= k, row-contiguous; its first r rows are Q, the others are
            free. Overwritten.
        T_rr: Shape (r, r), the projected operator.
        k: Number of pairs.
        which: The wanted pairs and their order: see `wanted_first`.
        method: The solver's name.
        generator: Source of the completing vectors.
        residuals: Whether to measure residuals, by k matvecs; if not, they are NaN and no pair
            counts as converged.
        tol: Relative tolerance of convergence.
        block_size: Matvecs per block.
        start: Start time of the solve, by `time.perf_counter`.
        info: The solver's own entries for `Eigenpairs.info`.

    Returns:
        The eigenpairs; the eigenvectors are a view of `basis_mD`.

    Warns:
        ConvergenceWarning: If residuals are measured and exceed the tolerance.
    """
    theta, Y_rr = ritz_pairs(T_rr, which)
    rank, dim = len(T_rr), H.shape[0]
    # A rank-deficient sketch spans the whole range: all eigenvalues outside are zero.
    zeros = min(k, dim - rank) if rank < len(basis_mD) else 0
    wanted = torch.cat([theta, theta.new_zeros(zeros)])
    order = wanted_first(wanted, which)[:k]
    inside = order < rank
    count = int(inside.sum())
    rotate_(basis_mD[:rank], Y_rr[:, order[inside]])
    complete_(basis_mD[:k], count, generator)
    if not bool(inside[:count].all()):  # zeros come before some Ritz values: reorder the columns
        place = torch.where(inside, inside.cumsum(0) - 1, count + (~inside).cumsum(0) - 1)
        rotate_(basis_mD[:k], torch.eye(k, dtype=torch.float64, device="cpu")[:, place])
    values = wanted[order].to(H.dtype)
    V_Dk = basis_mD[:k].mT

    gaps = torch.full((k,), math.nan, dtype=torch.float64, device="cpu")
    if residuals:
        gaps = measured_residuals(H, values.to(H.device), V_Dk, block_size).cpu()
    largest = float(theta.abs().max()) if rank else 0.0
    done = converged(gaps, values, tol, torch.finfo(H.dtype).eps, largest)
    within = int(done.sum())
    # Other eigenvalues can be outside only if the basis has neither the whole range nor all of R^D.
    partial = zeros == 0 and rank < dim
    if len(sides_of(which)) == 1 and partial:
        # A sketch captures the largest magnitudes: only pairs beyond the least one it holds are
        # certain to precede all those outside.
        rounding = 10 * torch.finfo(H.dtype).eps * largest
        done &= sides_of(which)[0] * values >= float(theta.abs().min()) - rounding
    if residuals and not bool(done.all()):
        beyond = within - int(done.sum())
        outside = f", {beyond} of them of values that others outside may come before" * (beyond > 0)
        remedy = (
            "take more measurements, or method='block_krylov' if all pairs must converge"
            if partial
            else "the basis has the whole range, so more measurements cannot help: raise tol, or "
            "compute in float64"
        )
        warnings.warn(
            f"{within} of {k} eigenpairs have residuals within tol={tol:g}{outside}, the largest "
            f"is {gaps.max():.2g} beside |lambda_1| = {largest:.3g}; {remedy}. See `converged` "
            "and `residuals`",
            ConvergenceWarning,
            stacklevel=3,
        )
    return Eigenpairs(
        eigenvalues=values.to(H.device),
        eigenvectors=V_Dk,
        residuals=gaps.to(H.device, H.dtype),
        converged=done.to(H.device),
        num_matvecs=H.num_matvecs,
        method=method,
        layout=H.layout,
        info={
            "tol": tol,
            "block_size": block_size,
            "rank": len(T_rr),
            "which": which,
            **info,
            "seconds": time.perf_counter() - start,
        },
    )
