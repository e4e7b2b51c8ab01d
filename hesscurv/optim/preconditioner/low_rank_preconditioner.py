"""Damp the top eigenspace: a low-rank preconditioner with unit gain on everything else."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# The least damping, relative to the smallest eigenvalue that is kept: with less, a direction whose
# eigenvalue is off, or will be after the next steps, would be trusted too much.
_LEAST_DAMPING = 0.1
_ROUNDING = 1e-6  # eigenvalues below this, relative to the largest, are float32's noise


class LowRankPreconditioner:
    r"""The preconditioner :math:`P = I + U (S - I) U^T` of the top r eigenpairs.

    .. math:: s_i = \frac{|\lambda_{r+1}| + \mu}{|\lambda_i| + \mu} \in (0, 1],
        \qquad \mu = \max(\mu_0, \max_{i \le r} \rho_i)

    Gain 1 outside the eigenspace, so that a learning rate keeps its meaning there, and less inside,
    by absolute eigenvalues: no direction is amplified, whatever the sign of its curvature, and none
    is projected out. The stable learning rate of gradient descent rises from :math:`2/|\lambda_1|`
    to :math:`2/(|\lambda_{r+1}| + \mu)` at least.

    Gains are measured against the first pair that is not damped, so that a single pair is damped
    too. Where the r pairs are all there are (m = r), the last one is the measure, with gain 1.
    Where :math:`\lambda_{r+1}` is zero to rounding, mu is at least a tenth of the last eigenvalue
    that is not, and pairs of zero eigenvalues have gain 1.

    Args:
        basis_mD: Shape (m, D), orthonormal rows, m >= rank: eigenvectors; on several processes this
            one's columns. Kept, not copied. With m > rank, pair r + 1 is the measure of the gains.
        eigenvalues: Shape (m,), largest magnitude first; all zero stands for "not known yet", and
            P = I.
        residuals: Shape (m,), of the pairs, rho.
        rank: The number r of pairs that are damped, 1 <= r <= m.
        damping: mu_0, in the unit of the eigenvalues; default .1 |lambda_r|.
        sum_: Sums a small tensor over the processes that hold the other columns; default none.

    Raises:
        ValueError: If shapes do not fit, or a value is not finite.

    Cost: a product reads the basis twice, 4 r D operations; m D numbers of memory.

    References:
        Rathore et al., ICML 2024 (NysNewton-CG's preconditioner, unit gain on the bulk).
        Dauphin et al., NeurIPS 2014 (saddle-free Newton: absolute eigenvalues).
    """

    def __init__(
        self,
        basis_mD: Tensor,
        eigenvalues: Tensor,
        residuals: Tensor,
        rank: int,
        damping: float | None = None,
        sum_: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        m = len(basis_mD)
        for name, values in (("eigenvalues", eigenvalues), ("residuals", residuals)):
            if tuple(values.shape) != (m,):
                raise ValueError(f"expected {name} of shape ({m},), got {tuple(values.shape)}")
        if not 1 <= rank <= m:
            raise ValueError(f"expected 1 <= rank <= {m}, got {rank}")
        self.basis_mD, self.rank, self._sum = basis_mD, rank, sum_
        self.eigenvalues = [float(x) for x in eigenvalues.tolist()]
        self.residuals = [float(x) for x in residuals.tolist()]
        if not all(map(math.isfinite, self.eigenvalues + self.residuals)):
            raise ValueError("expected finite eigenvalues and residuals, got NaN or inf")
        self.set_damping(damping)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is known yet."""
        return self.eigenvalues[0] == 0.0

    def set_damping(self, damping: float | None) -> None:
        """Take another mu_0; None is the default."""
        self.asked_damping = damping
        magnitudes = [abs(value) for value in self.eigenvalues]
        # A matrix of lower rank has zeros among its top pairs, as far as rounding lets one see.
        floor = _ROUNDING * magnitudes[0]
        damped = magnitudes[: self.rank]
        seen = [x for x in damped if x > floor]
        last = seen[-1] if seen else 0.0
        left = magnitudes[min(self.rank, len(magnitudes) - 1)]
        least = _LEAST_DAMPING * last if damping is None else damping
        if left <= floor:
            # Measured by zero and without damping, the range would be projected out.
            left, least = 0.0, max(least, _LEAST_DAMPING * last)
        self.damping = max([least, *self.residuals[: len(seen)]])
        self.gains = [
            min(1.0, (left + self.damping) / (x + self.damping)) if x > floor else 1.0
            for x in damped
        ]
        less = torch.tensor([gain - 1.0 for gain in self.gains], dtype=torch.float64, device="cpu")
        self._less_r = less.to(self.basis_mD)
        self._zeros_r = torch.zeros_like(self._less_r)

    @property
    def largest_after(self) -> float:
        """The largest curvature that is left, at most |lambda_{r+1}| + mu."""
        magnitudes = [abs(value) for value in self.eigenvalues]
        damped = max(g * x for g, x in zip(self.gains, magnitudes, strict=False))
        return max([damped, *magnitudes[self.rank :]])

    def __call__(self, flat_D: Tensor) -> Tensor:
        """Return P times a vector (D,) of the basis' dtype."""
        return self.multiply_(flat_D.clone())

    def multiply_(self, flat_D: Tensor) -> Tensor:
        """Multiply a vector (D,) of the basis' dtype by P, in place.

        One whose product with U has NaN or inf is left as it is: they would reach all entries.
        """
        return self.add_(flat_D, self.coefficients(flat_D))

    def coefficients(self, flat_D: Tensor) -> Tensor:
        """Return c = (S - I) U^T x, of shape (r,), with which P x = x + U c."""
        inside_r = self.basis_mD[: self.rank] @ flat_D
        if self._sum is not None:
            inside_r = self._sum(inside_r)
        # Without a look at the values, for which a GPU would have to be waited for, and in three
        # kernels: the products with zero sum to NaN where any value is NaN or inf, and to 0 else.
        undefined = torch.dot(inside_r, self._zeros_r)
        return torch.addcmul(undefined, inside_r, self._less_r).nan_to_num_(nan=0.0)

    def combine(self, coefficients_r: Tensor, out: Tensor | None = None) -> Tensor:
        """Return U c, of shape (D,), in place of what `out` has if that is given."""
        return torch.mv(self.basis_mD[: self.rank].mT, coefficients_r, out=out)

    def add_(self, part_n: Tensor, coefficients_r: Tensor, first: int = 0) -> Tensor:
        """Add the entries of U c from the one numbered `first` on to a vector (n,), in place."""
        columns_rn = self.basis_mD[: self.rank, first : first + len(part_n)]
        return part_n.addmv_(columns_rn.mT, coefficients_r)
