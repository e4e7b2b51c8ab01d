"""From an orthonormal basis and the operator projected on it to eigenpairs: the last step."""

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
from hesscurv.linalg.rayleigh_ritz import ritz_pairs, rotate_


def ritz_result(
    H: CountedOperator,
    basis_mD: Tensor,
    T_rr: Tensor,
    k: int,
    *,
    method: str,
    generator: torch.Generator,
    residuals: bool,
    tol: float,
    block_size: int,
    start: float,
    info: dict[str, Any],
) -> Eigenpairs:
    """Return the k leading eigenpairs of ``Q T Q^T``, their vectors formed in Q's storage.

    Where Q has fewer than k vectors, H was found to have that rank: random orthonormal vectors with
    eigenvalue zero complete them.

    Args:
        H: The operator, for the residuals.
        basis_mD: Shape (m, D), m >= k, row-contiguous; its first r rows are Q, the others are
            free. Overwritten.
        T_rr: Shape (r, r), the projected operator.
        k: The number of pairs.
        method: The solver's name.
        generator: Source of the completing vectors.
        residuals: Whether to measure residuals, by k products; if not, they are NaN and no pair
            counts as converged.
        tol: Relative tolerance of convergence.
        block_size: Products at a time.
        start: When the solve began, by `time.perf_counter`.
        info: The solver's own entries for `Eigenpairs.info`.

    Returns:
        The eigenpairs; the eigenvectors are a view of `basis_mD`.

    Warns:
        ConvergenceWarning: If residuals are measured and exceed the tolerance.
    """
    rank = min(len(T_rr), k)
    theta, Y_rr = ritz_pairs(T_rr)
    rotate_(basis_mD[: len(T_rr)], Y_rr[:, :rank])
    complete_(basis_mD[:k], rank, generator)
    values = torch.zeros(k, dtype=torch.float64)
    values[:rank] = theta[:rank]
    values = values.to(H.dtype)
    V_Dk = basis_mD[:k].mT

    gaps = torch.full((k,), math.nan, dtype=torch.float64)
    if residuals:
        gaps = measured_residuals(H, values.to(H.device), V_Dk, block_size).cpu()
    done = converged(gaps, values, tol, torch.finfo(H.dtype).eps)
    if residuals and not bool(done.all()):
        warnings.warn(
            f"{int(done.sum())} of {k} eigenpairs have residuals within tol={tol:g}, the largest "
            f"is {gaps.max():.2g} beside |lambda_1| = {values[0].abs():.3g}; take more "
            "measurements, or method='block_krylov' if all pairs must converge. See `converged` "
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
            **info,
            "seconds": time.perf_counter() - start,
        },
    )
