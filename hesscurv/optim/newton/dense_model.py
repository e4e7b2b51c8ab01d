"""Quadratic model of a sum of squares from its Jacobian: steps of any damping, solved exactly."""

from __future__ import annotations

import torch
from torch import Tensor


class DenseModel:
    r"""The loss :math:`||r + J d||^2` near w, with the exact step of each damping.

    .. math:: d(\mu) = -(2 J^T J + \mu I)^{-1} 2 J^T r = -J^T (J J^T + \mu/2\, I)^{-1} r,

    by a Cholesky factorisation of the smaller of the two matrices (Levenberg-Marquardt).

    Args:
        jacobian: J, shape (N, D).
        residuals: r, shape (N,).

    Memory: the smaller of N^2 and D^2 numbers, twice.

    References:
        Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", J. SIAM 11
        (1963). Nocedal, Wright, "Numerical optimization", 2nd edition, section 10.3.
    """

    def __init__(self, jacobian: Tensor, residuals: Tensor) -> None:
        self._J_ND, self._r_N = jacobian, residuals
        self._is_dual = len(residuals) <= jacobian.shape[1]
        self._A = jacobian @ jacobian.mT if self._is_dual else jacobian.mT @ jacobian
        self._steps: dict[float, Tensor] = {}

    def direction(self, damping: float) -> Tensor:
        """Return d(mu), shape (D,)."""
        if damping not in self._steps:
            self._steps[damping] = self._solve(damping)
        return self._steps[damping]

    def decrease(self, damping: float, length: float = 1.0) -> float:
        """Return what the model promises of a step of this length along d(mu)."""
        along_N = self._J_ND @ self.direction(damping) * length
        return -float(2 * (self._r_N @ along_N) + along_N @ along_N)

    def _solve(self, damping: float) -> Tensor:
        size = len(self._A)
        eps = torch.finfo(self._A.dtype).eps
        # A matrix of lower rank has a factor only with what is its own rounding.
        shift = max(damping / 2, 4 * eps * float(self._A.diagonal().mean()))
        right = self._r_N if self._is_dual else self._J_ND.mT @ self._r_N
        eye = torch.eye(size, dtype=self._A.dtype, device=self._A.device)
        while True:
            factor, failed = torch.linalg.cholesky_ex(self._A + shift * eye)
            if not int(failed):
                break
            shift *= 10
        solved = torch.cholesky_solve(right.unsqueeze(1), factor)[:, 0]
        return -(self._J_ND.mT @ solved if self._is_dual else solved)
