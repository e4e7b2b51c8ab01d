"""Low-rank preconditioner: damped gains on the top eigenspace, unit gain on everything else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

# The least damping, relative to the smallest eigenvalue that is kept: with less, a direction whose
# eigenvalue is off, or will be after the next steps, would be trusted too much.
_TRUST = 0.1
_ROUNDING = 1e-6  # eigenvalues below this, relative to the largest, are float32's noise


class LowRankPreconditioner:
    r"""The preconditioner :math:`P = I + U (S - I) U^T` of the top r eigenpairs.

    .. math:: s_i = \frac{|\lambda_{r+1}| + \mu}{|\lambda_i| + \mu} \in (0, 1],
        \qquad \mu = \max(\mu_0, \max_{i \le r} \rho_i)

    Outside the eigenspace the gain is 1, so that a learning rate keeps its meaning there. Inside,
    gains fall with the magnitude of the eigenvalue: no direction is amplified, whatever the sign of
    its curvature, and none is projected out. The stable learning rate of gradient descent rises
    from :math:`2/|\lambda_1|` to at least :math:`2/(|\lambda_{r+1}| + \mu)`.

    Gains are measured against the next eigenvalue, so that a single pair is damped too. Where it is
    not known, the last pair is the measure, with gain 1. Where it is zero to rounding, mu is at
    least a tenth of the last eigenvalue that is not, and pairs of zero eigenvalues have gain 1.

    Args:
        basis_mD: Shape (m, D), orthonormal rows, m >= rank: eigenvectors; on several processes this
            process's columns. Kept, not copied. With m > rank, pair r + 1 has the next eigenvalue.
        eigenvalues: Shape (m,), largest magnitude first; all zero stands for "not known yet", and
            P = I.
        residuals: Shape (m,), of the pairs, rho; None for zeros.
        rank: The number r of damped pairs, 1 <= r <= m; 0 where m = 0.
        damping: mu_0, in the unit of the eigenvalues; default 0.1 |lambda_r|.
        sum_: Sums a small tensor over the processes that hold the other columns; default none.
        next_eigenvalue: lambda_{r+1}, where it is known without its vector (m = r).
        rounding: Magnitude, relative to |lambda_1|, up to which an eigenvalue counts as zero.
        trust: The least mu where the next eigenvalue is zero, relative to the last that is not.

    Raises:
        ValueError: If shapes do not fit, or a value is not finite.

    Cost: a product reads the basis twice, 4 r D operations; m D numbers of memory.

    References:
        Rathore et al., ICML 2024 (NysNewton-CG's preconditioner, unit gain on the bulk).
        Frangella, Tropp, Udell, "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl.
        44 (2023). Dauphin et al., NeurIPS 2014 (saddle-free Newton: absolute eigenvalues).

    Example:
        >>> P = hesscurv.optim.LowRankPreconditioner(
        ...     torch.eye(2, 3), torch.tensor([10.0, 1.0]), None, rank=1, damping=0.0)
        >>> P.multiply_(torch.ones(3))
        tensor([0.1000, 1.0000, 1.0000])
    """

    def __init__(
        self,
        basis_mD: Tensor,
        eigenvalues: Tensor,
        residuals: Tensor | None,
        rank: int,
        damping: float | None = None,
        sum_: Callable[[Tensor], Tensor] | None = None,
        *,
        next_eigenvalue: float | None = None,
        rounding: float = _ROUNDING,
        trust: float = _TRUST,
    ) -> None:
        m = len(basis_mD)
        if residuals is None:
            residuals = torch.zeros(m, dtype=torch.float64, device="cpu")
        for name, values in (("eigenvalues", eigenvalues), ("residuals", residuals)):
            if tuple(values.shape) != (m,):
                raise ValueError(f"expected {name} of shape ({m},), got {tuple(values.shape)}")
        if not min(1, m) <= rank <= m:
            raise ValueError(f"expected {min(1, m)} <= rank <= {m}, got {rank}")
        self.basis_mD, self.rank, self._sum = basis_mD, rank, sum_
        self.eigenvalues = [float(x) for x in eigenvalues.tolist()]
        self.residuals = [float(x) for x in residuals.tolist()]
        if not all(map(math.isfinite, self.eigenvalues + self.residuals)):
            raise ValueError("expected finite eigenvalues and residuals, got NaN or inf")
        self._next, self._rounding, self._trust = next_eigenvalue, rounding, trust
        self.set_damping(damping)

    @classmethod
    def inverse(
        cls,
        basis_Dr: Tensor,
        eigenvalues_r: Tensor,
        damping: float,
        next_eigenvalue: float | None = None,
    ) -> LowRankPreconditioner:
        r"""Return P as an approximate inverse of :math:`H + \mu I`, times `bulk`, for any mu.

        With exact pairs :math:`P (H + \mu I)` has the eigenvalues
        :math:`(|\lambda_{r+1}| + \mu) (\lambda_i + \mu) / (|\lambda_i| + \mu)` on U and
        :math:`\lambda_i + \mu` below: its condition is that of the spectrum below the r-th.

        Args:
            basis_Dr: U, shape (D, r), orthonormal columns.
            eigenvalues_r: Shape (r,), both signs; magnitudes up to 10 eps of the largest are noise.
            damping: mu, not negative.
            next_eigenvalue: lambda_{r+1}; default the last one.
        """
        return cls(
            basis_Dr.mT,
            eigenvalues_r,
            None,
            len(eigenvalues_r),
            damping,
            next_eigenvalue=next_eigenvalue,
            rounding=10 * torch.finfo(basis_Dr.dtype).eps,
            trust=0.0,
        )

    @classmethod
    def identity(cls, like_D: Tensor) -> LowRankPreconditioner:
        """Return P without any pairs, for vectors like this one."""
        return cls(like_D.new_zeros(0, len(like_D)), like_D.new_zeros(0), None, 0)

    def over(self, basis_mD: Tensor) -> LowRankPreconditioner:
        """Return the same gains on another basis, such as the gathered one of a sharded model."""
        other = copy.copy(self)
        other.basis_mD, other._sum = basis_mD, None
        return other

    @property
    def is_identity(self) -> bool:
        """Whether no eigenvalue is known yet."""
        return not any(self.eigenvalues)

    @property
    def bulk(self) -> float:
        """|lambda_{r+1}| + mu: P divided by it approximates the inverse of H + mu I."""
        return self._left + self.damping or 1.0

    def set_damping(self, damping: float | None) -> None:
        """Replace mu_0; None is the default."""
        self.asked_damping = damping
        magnitudes = [abs(value) for value in self.eigenvalues]
        # A matrix of lower rank has zeros among its top pairs, as far as rounding lets one see.
        floor = self._rounding * max(magnitudes, default=0.0)
        damped = magnitudes[: self.rank]
        seen = [x for x in damped if x > floor]
        last = seen[-1] if seen else 0.0
        known = magnitudes if self._next is None else [*magnitudes, abs(self._next)]
        left = min(known[: self.rank + 1], default=0.0)
        least = _TRUST * last if damping is None else damping
        if left <= floor:
            # Measured by zero and without damping, the range would be projected out.
            left, least = 0.0, max(least, self._trust * last, floor)
        self._left = left
        self.damping = max([least, *self.residuals[: len(seen)]])
        self.gains = [
            min(1.0, (left + self.damping) / (x + self.damping)) if x > floor else 1.0
            for x in damped
        ]
        less = [[gain - 1 for gain in self.gains], [math.sqrt(gain) - 1 for gain in self.gains]]
        both = torch.tensor(less, dtype=torch.float64, device="cpu").to(self.basis_mD)
        self._less_r, self._root_less_r = both
        self._zeros_r = torch.zeros_like(self._less_r)

    @property
    def largest_after(self) -> float:
        """The largest curvature that is left, at most |lambda_{r+1}| + mu."""
        magnitudes = [abs(value) for value in self.eigenvalues]
        damped = max(g * x for g, x in zip(self.gains, magnitudes, strict=False))
        return max([damped, *magnitudes[self.rank :]])

    def __call__(self, flat_D: Tensor) -> Tensor:
        """Return P times a vector (D,) of the basis' dtype."""
        return self.multiply_(flat_D.clone()) if self.rank else flat_D.clone()

    def root(self, vectors: Tensor) -> Tensor:
        """Return P^(1/2) times a vector (D,) or columns (D, b), at the cost of a product."""
        if not self.rank:
            return vectors.clone()
        less_r1 = self._root_less_r.view(-1, *(1,) * (vectors.ndim - 1))
        inside = less_r1 * self._inside(vectors.to(self.basis_mD.dtype))
        return vectors + (self.basis_mD[: self.rank].mT @ inside).to(vectors.dtype)

    def multiply_(self, flat_D: Tensor) -> Tensor:
        """Multiply a vector (D,) of the basis' dtype by P, in place.

        One whose product with U has NaN or inf is left as it is: they would reach all entries.
        """
        return self.add_(flat_D, self.coefficients(flat_D))

    def coefficients(self, flat_D: Tensor) -> Tensor:
        """Return c = (S - I) U^T x, of shape (r,), with which P x = x + U c."""
        inside_r = self._inside(flat_D)
        # Without a look at the values, for which a GPU would have to be waited for, and in three
        # kernels: the products with zero sum to NaN where any value is NaN or inf, and to 0 else.
        undefined = torch.dot(inside_r, self._zeros_r)
        return torch.addcmul(undefined, inside_r, self._less_r).nan_to_num_(nan=0.0)

    def combine(self, coefficients_r: Tensor, out: Tensor | None = None) -> Tensor:
        """Return U c, of shape (D,), written to `out` if that is given."""
        return torch.mv(self.basis_mD[: self.rank].mT, coefficients_r, out=out)

    def add_(self, part_n: Tensor, coefficients_r: Tensor, first: int = 0) -> Tensor:
        """Add the entries of U c from index `first` on to a vector (n,), in place."""
        columns_rn = self.basis_mD[: self.rank, first : first + len(part_n)]
        return part_n.addmv_(columns_rn.mT, coefficients_r)

    def _inside(self, vectors: Tensor) -> Tensor:
        """Return U^T x, summed over the processes."""
        inside = self.basis_mD[: self.rank] @ vectors
        return inside if self._sum is None else self._sum(inside)
