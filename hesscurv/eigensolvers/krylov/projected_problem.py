r"""Projected eigenproblem of a Krylov space: Ritz pairs, residuals, and bounds on what is missed.

[E, P] is orthonormal. E are the m *expanded* vectors, whose products with H are known; P are the p
*pending* ones, stored after them. With A = [E, P]^T H E, of shape (m + p, m),

.. math:: H E = E T + P R, \qquad T = A_{1..m}, \quad R = A_{m+1..m+p},

so a Ritz pair (theta, E y) of T has the residual norm ||R y||, without another matvec. Any
orthonormal vectors may join P at any time: their rows in R are zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.eigenvalue_bounds import schur_complement
from hesscurv.eigensolvers.residuals import convergence_threshold
from hesscurv.linalg.ritz import sides_of, wanted_first
from hesscurv.linalg.small_eigenproblems import eigh
from hesscurv.operators.linear_operator import LinearOperator


class ProjectedProblem:
    """The projection A of an operator on a Krylov space, and what follows from it alone.

    Args:
        H: The operator, D x D.
        k: Number of wanted pairs.
        tol: Their relative tolerance.
        which: The wanted pairs, "LM", "LA" or "SA".
        rounding: Residual due to rounding a stored vector, relative to its eigenvalue.

    Attributes:
        A: Shape (m + p, m), float64 on the CPU.
        num_expanded: m.
    """

    def __init__(self, H: LinearOperator, k: int, tol: float, which: str, rounding: float) -> None:
        self.which, self.sides = which, sides_of(which)
        self.H, self.k, self.tol, self.rounding = H, k, tol, rounding
        self.dim, self.eps = H.shape[0], torch.finfo(H.dtype).eps
        self.across = H.communicator if H.communicator.size > 1 else None
        self.A = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self.num_expanded = 0
        self._ritz: dict[torch.dtype, tuple[Tensor, ...]] = {}  # cached Ritz pairs of the last T
        self._asymmetries: list[float] = []
        self._asymmetry = 0.0
        self._scale = 0.0  # the largest ||H q|| so far: rounding is relative to it

    @property
    def num_pending(self) -> int:
        """The number p of vectors without a matvec."""
        return len(self.A) - self.num_expanded

    def ritz(
        self,
        dtype: torch.dtype = torch.float64,
        count: int | None = None,
        expanded: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all Ritz values (m,), the leading coefficients, and the residuals of the first k.

        T is read from the upper triangle: when a column was computed, all earlier vectors were in
        the basis, while parts of earlier columns may have been dropped since.

        Args:
            dtype: Dtype of the eigenproblem: float32 takes half the time, with an error of some eps
                |theta_1| in values and residuals.
            count: Number of coefficient vectors, (m, count); default k.
            expanded: m, the number of expanded vectors used; default all.
        """
        m = self.num_expanded if expanded is None else expanded
        if dtype not in self._ritz or len(self._ritz[dtype][0]) != m:
            values, vectors = self._from_first(eigh(self.A[:m, :m].to(dtype), self.H.device))
            order = wanted_first(values, self.which)
            leading = vectors[:, order[: self.k]].double()
            self._ritz[dtype] = values[order].double(), leading, vectors, order
        values, leading, vectors, order = self._ritz[dtype]
        residuals = (self.A[m:, :m] @ leading).norm(dim=0)
        if count is None or count == self.k:
            return values, leading, residuals
        return values, vectors[:, order[:count]].double(), residuals

    def thresholds(self, values: Tensor) -> Tensor:
        """Return the convergence thresholds of pairs with these values."""
        # The largest known magnitude, which need not belong to a wanted pair.
        known = self._ritz.get(torch.float64) or self._ritz.get(torch.float32)
        largest = float(known[0].abs().max()) if known and len(known[0]) else 0.0
        return convergence_threshold(values, self.tol, self.eps, largest)

    def converged(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return which of the first k Ritz pairs have converged, bool.

        The true residual combines the estimate and the products' noise, at right angles. Noise near
        or beyond the tolerance tightens the requirement by a factor of about two at most.
        """
        values, _, residuals = self.ritz(dtype)
        thresholds = self.thresholds(values[: self.k])
        noise = torch.hypot(
            torch.tensor(self.noise, dtype=torch.float64, device="cpu"),
            self.rounding * values[: self.k].abs(),
        )
        noise = torch.minimum(noise, 0.9 * thresholds)
        return residuals <= (thresholds**2 - noise**2).sqrt()

    def bound(self, index: int, first: int | None = None) -> float:
        """Return the bound that a missed eigenvalue before wanted pair `index` would exceed.

        On the side of the wanted ones: a magnitude, or for "SA" the negative of a value. Excesses
        over the Ritz value below the convergence threshold do not matter.
        """
        values = self.ritz(expanded=first)[0][: self.k]
        value = values[index].abs() if len(self.sides) == 2 else self.sides[0] * values[index]
        return float(value + self.thresholds(values)[index])

    def schur_complement(self, side: int, index: int, first: int | None = None) -> Tensor:
        """Return S(x) for x = `bound(index)`, (q, q), in the vectors after the first expanded ones.

        See `krylov.eigenvalue_bounds`.

        Args:
            side: +1 or -1.
            index: Index of the last wanted pair.
            first: Number of expanded vectors used; default all.
        """
        first = self.num_expanded if first is None else first
        values, Y, _ = self.ritz(count=first, expanded=first)
        x = self.bound(index, first)
        near = float(self.thresholds(values[: self.k])[index])
        return schur_complement(values, self.A[first:, :first] @ Y, index + 1, x, side, near)

    def limit(self, index: int) -> float:
        """Return how large H outside may be without a missed eigenvalue beyond `bound(index)`.

        Negative if the singular values of [T; R] prove that a pair was missed, which needs no
        matvec.
        """
        largest = (
            float(torch.linalg.eigvalsh(self.schur_complement(side, index))[-1])
            for side in (self.sides if self.num_pending else ())
        )
        return self.bound(index) - max([0.0, *largest])

    def limiting(self, eta: float) -> Tensor:
        """Return the pending directions, (p, r), that keep `limit` of the last pair below eta."""
        x, last = self.bound(self.k - 1), self.k - 1
        S = sum(self.schur_complement(side, last) for side in self.sides)
        values, U = torch.linalg.eigh(S)
        return U[:, values > x - eta].flip(1)

    @property
    def scale(self) -> float:
        """The largest norm of a product with a unit vector so far, a lower bound on ||H||."""
        return max(self._scale, 1e-300)

    @property
    def asymmetry(self) -> float:
        """The largest difference of v^T (H E) and (H v)^T E so far, relative to ||H||."""
        return self._asymmetry / self.scale

    @property
    def noise(self) -> float:
        """The norm of a product's error, estimated from the asymmetry of the projection.

        Both E^T (H S) and (S^T H E)^T are computed. With errors of norm s in random directions,
        their entries differ by sqrt(2 / D) s.
        """
        return statistics.median_low(self._asymmetries) if self._asymmetries else 0.0

    def _note_asymmetry(self, upper_ms: Tensor, lower_sm: Tensor) -> None:
        if upper_ms.numel() > 0:
            gap_ms = upper_ms - lower_sm.mT
            rms = float(gap_ms.square().mean().sqrt())
            self._asymmetries.append(rms * math.sqrt(self.dim / 2))
            self._asymmetry = max(self._asymmetry, rms * math.sqrt(len(gap_ms)))

    def _from_first(self, factors: Iterable[Tensor]) -> list[Tensor]:
        """Broadcast factors from the first process: processors may return different ones."""
        if self.across is None:
            return list(factors)
        return [self.across.broadcast_(factor.contiguous()) for factor in factors]
