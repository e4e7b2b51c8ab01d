"""Leave-one-out ranges of a sketch, for XTrace and XDiag.

Both use every measurement twice: with the others it spans the range, and it tests the complement of
the range of the others. This module derives the m leave-one-out projectors from one factorisation.
Vectors lie in rows, (r, D) and (m, D); small matrices are float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscurv.interface.descriptions import Described
from hesscurv.linalg.block_norms import column_norms
from hesscurv.linalg.orthogonalization import orthonormalize_
from hesscurv.linalg.projections import inner_products
from hesscurv.linalg.random_matrices import TestMatrix
from hesscurv.operators.linear_operator import LinearOperator

# A measurement alone spans a direction if its leverage is 1; leverages are accurate to 1e-15.
_LEVERAGE_GAP = 1e-8


@dataclass(frozen=True, eq=False, repr=False)
class SketchedRange(Described):
    """``H Omega = Q R``, and the direction of Q that is lost without each measurement.

    With P = Q Q^T, the projector without measurement i is ``P_i = Q (I - s_i s_i^T) Q^T``: s_i is
    the unit vector orthogonal to all columns of R except the i-th, or zero if these span the whole
    range, as they do when the rank of H is below m.

    Args:
        Q_rD: Shape (r, D), r <= m: an orthonormal basis of the range, one vector per row.
        R_rm: Shape (r, m): the measurements in it, ``R = Q^T H Omega``.
        S_rm: Shape (r, m): s_i in its columns.
        W_rm: Shape (r, m): ``Q^T Omega``.
        U_rm: Shape (r, m): ``(I - s_i s_i^T) W_i``, so that ``P_i omega_i = Q U_i``.
        norms_squared: Shape (m,): ``||omega_i||^2``.
    """

    Q_rD: Tensor
    R_rm: Tensor
    S_rm: Tensor
    W_rm: Tensor
    U_rm: Tensor
    norms_squared: Tensor


def sketch_range(H: LinearOperator, omega: TestMatrix, block_size: int) -> SketchedRange:
    """Measure ``H Omega`` and factor it.

    Args:
        H: The symmetric operator, D x D.
        omega: The random matrix (D, m).
        block_size: Matvecs per block.

    Returns:
        The basis, in storage of m D floats, and the small matrices.

    Cost: m matvecs, about 5 m^2 D multiply-adds, and drawing Omega twice.
    """
    dim, m = omega.shape
    Y_mD = torch.empty(m, dim, dtype=H.dtype, device=H.device)
    norms = []
    for start in range(0, m, block_size):
        stop = min(start + block_size, m)
        X_DB = omega.columns(start, stop)
        norms.append(column_norms(X_DB.mT))
        Y_mD[start:stop] = (H @ X_DB).mT
    Q_rD, R_rm = orthonormalize_(Y_mD)
    S_rm = left_out_directions(R_rm)
    W_rm = omega.transpose_matmul(Q_rD.mT).mT
    return SketchedRange(Q_rD, R_rm, S_rm, W_rm, deflate(W_rm, S_rm), torch.cat(norms) ** 2)


def left_out_directions(R_rm: Tensor) -> Tensor:
    """Return, for each column of R, the unit direction that the other columns do not span.

    ``s_i = t_i / ||t_i||`` with t_i row i of the pseudoinverse R^+ if the leverage ``(R^+ R)_ii``
    is 1, otherwise zero. For square R these are the normalised columns of R^-T.

    Args:
        R_rm: Shape (r, m), r <= m, of rank r.

    Returns:
        Shape (r, m).

    References:
        Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace
        estimation", SIAM J. Matrix Anal. Appl. 45 (2024), section 2.1, for r = m.
    """
    U_rr, sigma, Vh_rm = torch.linalg.svd(R_rm, full_matrices=False)
    # The leverage from the right singular vectors is accurate even for a numerically singular R.
    alone = (Vh_rm**2).sum(dim=0) > 1 - _LEVERAGE_GAP
    # Scaled by sigma.min(): only the direction is used, and 1 / sigma could overflow.
    T_rm = U_rr @ (Vh_rm * (sigma.min() / sigma if len(sigma) else sigma)[:, None])
    norms = T_rm.norm(dim=0)
    return torch.where(alone & (norms > 0), T_rm / norms.clamp(min=1e-300), 0.0)


def deflate(X_rm: Tensor, S_rm: Tensor) -> Tensor:
    """Return ``(I - s_i s_i^T) x_i``, column by column."""
    return X_rm - S_rm * (S_rm * X_rm).sum(dim=0)


def project(H: LinearOperator, Q_rD: Tensor, block_size: int, out_rD: Tensor | None) -> Tensor:
    """Return ``Q^T H Q``, symmetrised, in r matvecs.

    Args:
        H: The symmetric operator, D x D.
        Q_rD: Shape (r, D), one vector per row.
        block_size: Matvecs per block.
        out_rD: Storage for ``H Q``, shape (r, D); None keeps only one block at a time.

    Returns:
        Shape (r, r), float64 on the CPU.
    """
    columns = []
    for start in range(0, len(Q_rD), block_size):
        rows = slice(start, start + block_size)
        Z_BD = (H @ Q_rD[rows].mT).mT
        if out_rD is not None:
            out_rD[rows] = Z_BD
        columns.append(inner_products(Q_rD, Z_BD))
    if not columns:  # the zero operator
        return torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    G_rr = torch.cat(columns, dim=1)
    return (G_rr + G_rr.mT) / 2
