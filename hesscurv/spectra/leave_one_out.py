"""A sketched range of H, and the same range without each one of its measurements.

XTrace and XDiag use every measurement twice: it spans the range together with the others, and it
tests what the range of the others leaves. Here is the linear algebra that makes m estimates out of
one factorisation. Vectors lie in rows, (r, D) and (m, D); small matrices are float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscurv.interface.descriptions import Described
from hesscurv.linalg.block_norms import column_norms
from hesscurv.linalg.orthogonalization import inner_products, orthonormalize_
from hesscurv.linalg.random_matrices import TestMatrix
from hesscurv.operators.linear_operator import LinearOperator

# A measurement is alone in a direction when its leverage is 1; leverages are good to 1e-15.
_LEVERAGE_GAP = 1e-8


@dataclass(frozen=True, eq=False, repr=False)
class SketchedRange(Described):
    """``H Omega = Q R``, and which direction of Q is lost with each measurement.

    With P = Q Q^T, the projector without measurement i is ``P_i = Q (I - s_i s_i^T) Q^T``: s_i is
    the unit vector orthogonal to all columns of R but the i-th, or zero where these span as much as
    all do, as they do when H's rank is below m.

    Args:
        Q_rD: Shape (r, D), r <= m: an orthonormal basis of the range, one vector in each row.
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
        omega: The test matrix (D, m).
        block_size: Products at a time.

    Returns:
        The basis, in storage of m D floats, and the small matrices.

    Cost: m products, about 5 m^2 D multiply-adds, and Omega drawn twice.
    """
    dim, m = omega.shape
    Y_mD = torch.empty(m, dim, dtype=H.dtype, device=H.device)
    norms = []
    for start in range(0, m, block_size):
        stop = min(start + block_size, m)
        X_Db = omega.columns(start, stop)
        norms.append(column_norms(X_Db.mT))
        Y_mD[start:stop] = (H @ X_Db).mT
    Q_rD, R_rm = orthonormalize_(Y_mD)
    S_rm = left_out_directions(R_rm)
    W_rm = omega.transpose_matmul(Q_rD.mT).mT
    return SketchedRange(Q_rD, R_rm, S_rm, W_rm, deflate(W_rm, S_rm), torch.cat(norms) ** 2)


def left_out_directions(R_rm: Tensor) -> Tensor:
    """Return, for each column of R, the unit direction that the other columns do not span.

    ``s_i = t_i / ||t_i||`` with t_i row i of the pseudoinverse R^+, where the leverage
    ``(R^+ R)_ii`` is 1, and zero elsewhere. For square R these are the normalised columns of R^-T.

    Args:
        R_rm: Shape (r, m), r <= m, of rank r.

    Returns:
        Shape (r, m).

    References:
        Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace
        estimation", SIAM J. Matrix Anal. Appl. 45 (2024), section 2.1, for r = m.
    """
    U_rr, sigma, Vh_rm = torch.linalg.svd(R_rm, full_matrices=False)
    # From the right singular vectors the leverage is sure even where R is singular to rounding.
    alone = (Vh_rm**2).sum(dim=0) > 1 - _LEVERAGE_GAP
    T_rm = U_rr @ (Vh_rm * (sigma.min() / sigma if len(sigma) else sigma)[:, None])
    norms = T_rm.norm(dim=0)
    return torch.where(alone & (norms > 0), T_rm / norms.clamp(min=1e-300), 0.0)


def deflate(X_rm: Tensor, S_rm: Tensor) -> Tensor:
    """Return ``(I - s_i s_i^T) x_i``, column by column."""
    return X_rm - S_rm * (S_rm * X_rm).sum(dim=0)


def project(H: LinearOperator, Q_rD: Tensor, block_size: int, out_rD: Tensor | None) -> Tensor:
    """Return ``Q^T H Q``, symmetrised, in r products.

    Args:
        H: The symmetric operator, D x D.
        Q_rD: Shape (r, D), one vector in each row.
        block_size: Products at a time.
        out_rD: Where ``H Q`` is kept, shape (r, D); None keeps one block of it.

    Returns:
        Shape (r, r), float64 on the CPU.
    """
    columns = []
    for start in range(0, len(Q_rD), block_size):
        rows = slice(start, start + block_size)
        Z_bD = (H @ Q_rD[rows].mT).mT
        if out_rD is not None:
            out_rD[rows] = Z_bD
        columns.append(inner_products(Q_rD, Z_bD))
    if not columns:  # the zero operator
        return torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    G_rr = torch.cat(columns, dim=1)
    return (G_rr + G_rr.mT) / 2
