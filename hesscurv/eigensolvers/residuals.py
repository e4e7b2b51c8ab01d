"""Residuals of eigenpairs and the convergence criterion."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscurv.linalg.block_norms import column_norms
from hesscurv.operators.linear_operator import LinearOperator


class ConvergenceWarning(UserWarning):
    """Some of the returned eigenpairs have not converged.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     few = hesscurv.eigsh(torch.diag(torch.arange(99.0)), k=3, max_matvecs=5)
        >>> caught[0].category is hesscurv.ConvergenceWarning, bool(few.converged.all())
        (True, False)
    """


def evenly_spaced(count: int, total: int) -> Tensor:
    """Return about `count` ascending integers from 0 to total - 1, both ends included."""
    spread = torch.linspace(0, total - 1, count, dtype=torch.float64, device="cpu")
    return spread.round().long().unique()


def measured_residuals(
    H: LinearOperator, eigenvalues: Tensor, V_Dk: Tensor, block_size: int = 32
) -> Tensor:
    r"""Measure :math:`\|H v_i - \lambda_i v_i\|` for every pair, by k more matvecs.

    Args:
        H: The operator, D x D.
        eigenvalues: Shape (k,).
        V_Dk: Shape (D, k), unit columns; cast to H's dtype block by block. For a distributed H,
            this process's rows.
        block_size: Matvecs per block; temporary memory is three blocks of D floats each.

    Returns:
        Shape (k,), float64, on the CPU.
    """
    across = H.communicator if H.communicator.size > 1 else None
    out = torch.empty(V_Dk.shape[1], dtype=torch.float64, device="cpu")
    for start in range(0, len(out), block_size):
        part = slice(start, start + block_size)
        part_DB = V_Dk[:, part].to(H.device, H.dtype)
        gap = H.product_rows(part_DB) - part_DB * eigenvalues[part].to(part_DB)
        out[part] = column_norms(gap.mT, across)
    return out


def convergence_threshold(
    eigenvalues: Tensor, tol: float, eps: float, largest: float = 0.0
) -> Tensor:
    r"""Return the largest residuals of converged pairs.

    :math:`\max(tol |\lambda_i|, 10 \epsilon |\lambda_1|)`. The second bound is the rounding of
    products, below which a residual carries no information.

    Args:
        eigenvalues: Shape (k,), in any order.
        tol: Relative tolerance.
        eps: Machine epsilon of the operator's dtype.
        largest: Largest known magnitude in the operator's spectrum, if not among these eigenvalues.

    Returns:
        Shape (k,).
    """
    magnitudes = eigenvalues.abs()
    floor = 10 * eps * max(largest, float(magnitudes.max())) if len(magnitudes) else 0.0
    return (tol * magnitudes).clamp(min=floor)


def converged(
    residuals: Tensor, eigenvalues: Tensor, tol: float, eps: float, largest: float = 0.0
) -> Tensor:
    """Return which pairs have converged: residual at most `convergence_threshold`.

    Args:
        residuals: Shape (k,); NaN (not measured) counts as not converged.
        eigenvalues: Shape (k,).
        tol: Relative tolerance.
        eps: Machine epsilon of the operator's dtype.
        largest: See `convergence_threshold`.

    Returns:
        Shape (k,), bool.
    """
    return residuals <= convergence_threshold(eigenvalues, tol, eps, largest)
