"""The search for eigenvectors that a Krylov space has missed: outside it, and across its border."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.space import KrylovSpace
from hesscurv.linalg.eigenvalue_bounds import is_bounded, least_bound, least_share

# How probable it is, at most, that a missed eigenvector escapes one search.
ESCAPES = 1e-3
# No search is conclusive after fewer steps, and none goes on for more.
LEAST_STEPS, MOST_STEPS = 4, 30
# Both ends are searched at once where H outside may be as large as this share of the bound.
_WIDE = 0.8


@dataclass
class Search:
    """A block Krylov process from random vectors outside the expanded ones, and what it has shown.

    With H' and S as in `hesscurv.linalg.eigenvalue_bounds`, the space has all eigenvectors beyond
    the bound x at one end if H' + S(x) has no eigenvalue beyond x, and at both if H' has none
    beyond x - ||S(x)||. The process is that of B = H' + S, or, for both ends at once, of B = H'.

    Args:
        first: Vectors expanded before it.
        last: Index of the last pair that it is about.
        count: Random vectors that it starts from.
        added: Vectors that wait for their product.
        bound: x, what a missed eigenvalue would exceed.
        limit: What B must not exceed: x, or for both ends at once x - ||S(x)||.
        side: The end: +1 or -1; 0 for both at once.
        patience: Steps after which a process that has found something does not wait for more.
        step: Steps so far.
        outcome: "" while it goes on; "passed"; "found", missed eigenvalues; "stalled": at its most
            steps, or because B is too large for the space to be known as complete.
    """

    first: int
    last: int
    count: int
    added: int
    bound: float
    limit: float
    side: int
    patience: int = 0
    step: int = 0
    outcome: str = ""

    @classmethod
    def begin(
        cls, space: KrylovSpace, last: int, count: int, side: int, patience: int = 0
    ) -> Search:
        """Begin a search for what comes before the pair of index `last`: see `sides_to_search`."""
        bound = space.bound(last)
        limit = bound if side else space.limit(last)
        first = space.num_expanded
        added = space.begin_search(count)
        return cls(first, last, added, added, bound, limit, side, patience)

    def advance(self, space: KrylovSpace) -> None:
        """Take a step, `added` products, and see what it shows."""
        space.expand(self.added)
        self.step += 1
        T, R = self._projection(space)
        self.added = space.follow_search(R[:, len(T) - self.added :])
        values = self._magnitudes(T)
        # Projection and coupling together are no larger than B either.
        if not self.side:
            values = torch.linalg.svdvals(torch.cat([T, R]))
        beyond = int((values > self.bound).sum())
        if beyond and (beyond >= self.count or self.step >= self.patience or self.added == 0):
            self.outcome = "found"
        elif beyond == 0 and self._is_bounded(T, R, space.dim - self.first):
            self.outcome = "passed"
        elif self.added == 0 or self.step == MOST_STEPS or float(values.max()) > self.limit:
            self.outcome = "" if beyond and self.added else "stalled"

    def level(self, space: KrylovSpace) -> float:
        """Return the least bound that B is known not to exceed, whatever the outcome."""
        if self.step == 0:
            return math.inf
        T, R = self._projection(space)
        share = least_share(self.count, space.dim - self.first, ESCAPES)
        most = 10 * float(torch.linalg.matrix_norm(torch.cat([T, R]), 2))
        return least_bound(T, R, self.count, share, most, self._ends)

    def spectrum(self, space: KrylovSpace) -> tuple[float, float]:
        """Return the smallest and the largest eigenvalue of B's projection."""
        values = torch.linalg.eigvalsh(self._projection(space)[0])
        return float(values[0]), float(values[-1])

    @property
    def _ends(self) -> tuple[int, ...]:
        return (1,) if self.side else (1, -1)

    def _projection(self, space: KrylovSpace) -> tuple[Tensor, Tensor]:
        """Return T and R of B: coefficients of B Q in Q and in all pending vectors."""
        size = space.num_expanded - self.first
        own = space.A[self.first :, self.first :]
        if self.side:
            S = space.schur_complement(self.side, self.last, self.first)
            own = self.side * own + S[:, :size]
        return (own[:size] + own[:size].mT) / 2, own[size:]

    def _magnitudes(self, T: Tensor) -> Tensor:
        values = torch.linalg.eigvalsh(T)
        return values if self.side else values.abs()

    def _is_bounded(self, T: Tensor, R: Tensor, dim: int) -> bool:
        if self.added == 0:  # the process has ended: it has all of B that the random vectors see
            return float(self._magnitudes(T).max()) <= self.limit
        if self.step < LEAST_STEPS:
            return False
        share = least_share(self.count, dim, ESCAPES)
        return is_bounded(T, R, self.count, share, self.limit, self._ends)


def sides_to_search(
    space: KrylovSpace, last: int, levels: dict[int, float], *, apart: bool = False
) -> tuple[int, ...]:
    """Return the ends to search one by one, +1 or -1, or 0 for both at once.

    Args:
        space: The space.
        last: Index of the last pair that the search is about.
        levels: For each end, the bound beyond which all eigenvalues are known to be at hand.
        apart: Whether H' alone has failed to tell.
    """
    x = space.bound(last)
    ends = tuple(side for side in space.sides if not is_known(levels[side], x))
    # A search for fewer pairs is to tell of how many it may: H' alone tells it of all.
    at_once = last < space.k - 1 or space.limit(last) >= _WIDE * x
    return (0,) if len(ends) == 2 and at_once and not apart else ends


def is_known(level: float, bound: float) -> bool:
    """Whether all eigenvalues beyond a bound are known to be at hand, if those beyond a level are.

    Ritz values, which a bound is made of, differ by rounding as the space grows.
    """
    return level <= bound + 1e-9 * abs(bound)
