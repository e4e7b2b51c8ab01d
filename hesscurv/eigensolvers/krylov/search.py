"""Search for eigenvectors that a Krylov space has missed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.eigenvalue_bounds import is_bounded, least_bound, least_share
from hesscurv.eigensolvers.krylov.space import KrylovSpace

# Bound on the probability that a missed eigenvector escapes one search.
ESCAPES = 1e-3
# Steps of a search before it can be conclusive, and at most.
LEAST_STEPS, MOST_STEPS = 4, 30
# Both ends are searched at once if H outside may be as large as this share of the bound.
_WIDE = 0.8


@dataclass
class Search:
    """A block Krylov process from random vectors outside the expanded ones, and its outcome.

    With H' and S as in `krylov.eigenvalue_bounds`, the space has all eigenvectors beyond
    the bound x at one end if H' + S(x) has no eigenvalue beyond x, and at both if H' has none
    beyond x - ||S(x)||. The process runs on B = H' + S or, for both ends at once, on B = H'.

    Args:
        first: Number of vectors expanded before the search.
        last: Index of the last pair that it covers.
        count: Number of random starting vectors.
        added: Number of vectors to multiply next.
        bound: x, which a missed eigenvalue would exceed.
        limit: Bound required of B: x, or for both ends at once x - ||S(x)||.
        side: The end: +1 or -1; 0 for both at once.
        patience: Steps after which a search that has found one eigenvalue does not wait for more.
        step: Steps so far.
        outcome: "" while running; "passed"; "found", missed eigenvalues; "stalled": out of steps,
            or B too large to prove that the space is complete.
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
        """Start a search for eigenvalues before the pair `last`: see `sides_to_search`."""
        bound = space.bound(last)
        limit = bound if side else space.limit(last)
        first = space.num_expanded
        added = space.begin_search(count)
        return cls(first, last, added, added, bound, limit, side, patience)

    def advance(self, space: KrylovSpace) -> None:
        """Take a step of `added` matvecs and update the outcome."""
        space.expand(self.added)
        self.step += 1
        T, R = self._projection(space)
        self.added = space.follow_search(R[:, len(T) - self.added :])
        values = self._magnitudes(T)
        # The norm of [T; R] is at most that of B: it can prove a missed pair before T does.
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
        """Return the least proven bound on B, whatever the outcome."""
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
        # Symmetrised: products carry noise.
        return (own[:size] + own[:size].mT) / 2, own[size:]

    def _magnitudes(self, T: Tensor) -> Tensor:
        values = torch.linalg.eigvalsh(T)
        return values if self.side else values.abs()

    def _is_bounded(self, T: Tensor, R: Tensor, dim: int) -> bool:
        if self.added == 0:  # an invariant subspace: T has every eigenvalue the start vectors reach
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
        last: Index of the last pair that the search covers.
        levels: For each end, the bound beyond which all eigenvalues are known.
        apart: Whether the search for both ends at once was inconclusive.
    """
    x = space.bound(last)
    ends = tuple(side for side in space.sides if not is_known(levels[side], x))
    # A search that covers fewer pairs should prove as many as possible: H' alone bounds all pairs.
    at_once = last < space.k - 1 or space.limit(last) >= _WIDE * x
    return (0,) if len(ends) == 2 and at_once and not apart else ends


def is_known(level: float, bound: float) -> bool:
    """Whether all eigenvalues beyond a bound are known, given those beyond a level.

    With a margin: the Ritz values in a bound change by rounding as the space grows.
    """
    return level <= bound + 1e-9 * abs(bound)
