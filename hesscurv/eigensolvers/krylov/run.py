"""Control flow of a block Krylov solve: expansion, restart, search, checkpoint, stop."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from hesscurv.distributed.rows import as_rows
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.krylov.checkpoint import Checkpoint
from hesscurv.eigensolvers.krylov.filter import is_bounded_by_filter
from hesscurv.eigensolvers.krylov.search import (
    LEAST_STEPS,
    MOST_STEPS,
    Search,
    is_known,
    sides_to_search,
)
from hesscurv.eigensolvers.krylov.space import KrylovSpace
from hesscurv.eigensolvers.krylov.unconverged import warn_unconverged
from hesscurv.eigensolvers.progress import Progress
from hesscurv.eigensolvers.residuals import evenly_spaced, measured_residuals
from hesscurv.linalg.block_norms import column_norms

# Maximal number of starting vectors of a search.
_MOST_WIDTH = 16
# Maximal number of residuals measured at the end, to estimate the noise of the products.
_MOST_MEASURED = 8
# Coupling lost in restarts, relative to the thresholds, beyond which all residuals are measured.
_MOST_LOST = 0.3
# Consecutive inconclusive searches after which no more are started.
_MOST_STALLS = 20
# Maximal number of matvecs of a Chebyshev filter.
_MOST_FILTERED = 200
# A search starts once H outside the space may be as large as this share of the bound. Until then
# pending directions are expanded, which a search would find to matter.
_LEAST_LIMIT = 0.5


class KrylovRun:
    """Decides when to expand, restart, search, save and stop.

    Args:
        space: The space, with its first vectors pending.
        max_matvecs: Maximal number of matvecs.
        verify: Whether to search for missed eigenvectors at the end.
        progress: The progress bar.
        checkpoint: The checkpoint, or None.
    """

    def __init__(
        self,
        space: KrylovSpace,
        max_matvecs: int,
        verify: bool,
        progress: Progress,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.space, self.max_matvecs, self.verify = space, max_matvecs, verify
        self.progress, self.checkpoint = progress, checkpoint
        self.start = time.perf_counter()
        self.next_check = 0  # number of expanded vectors at which Ritz pairs are computed next
        # For each end, the bound beyond which all eigenvalues are known; and the number of starting
        # vectors of a search that follows a find.
        self.levels, self.width, self.stalls = dict.fromkeys(space.sides, math.inf), 1, 0
        self.search: Search | None = None
        # Matvecs reserved for the search in case the pairs do not converge.
        spare = (max_matvecs - space.k) // 6
        self.reserve = min(16, spare) if verify and spare >= 6 else 0

    def solve(self) -> None:
        """Iterate until the k wanted pairs have converged, and search for missed pairs."""
        going_on = True
        while going_on:
            last = self.space.k - 1
            if self.search is None:
                if not self._converge():
                    last, going_on = self._last_converged(), False
                if last < 0 or not self._may_search(last):
                    break
            found = self._found_missed(last)
            going_on |= found and self._affordable(self.reserve + 1) > 0
        if self.checkpoint is not None:
            self.save()

    def _may_search(self, last: int) -> bool:
        space = self.space
        outside = self.verify and space.k <= space.num_expanded < space.dim
        outside = outside and self.stalls < _MOST_STALLS
        return outside and not self._is_known(last) and self._affordable(1) > 0

    def _is_known(self, last: int) -> bool:
        """Whether all eigenvalues beyond the bound of this pair are known."""
        return all(is_known(level, self.space.bound(last)) for level in self.levels.values())

    def _last_converged(self) -> int:
        """Return the index of the last leading converged pair, up to the noise of the products."""
        space = self.space
        if space.num_expanded < space.k:
            return -1
        leading = int(space.converged().long().cumprod(0).sum())
        return space.k - 1 if leading == space.k or self._at_noise() else leading - 1

    def state(self) -> dict[str, Any]:
        """Return the state of the run, without the basis."""
        return {
            "block": self.space.block,
            "capacity": self.space.capacity,
            "storage_dtype": str(self.space.basis.placement.dtype),
            "storage": self.space.basis.placement.kind,
            "operator": self.space.H.settings(),
            "limits": [self.space.tol, self.max_matvecs],
            "space": self.space.state(),
            "next_check": self.next_check,
            "levels": dict(self.levels),
            "width": self.width,
            "stalls": self.stalls,
            "search": None if self.search is None else asdict(self.search),
            "seconds": time.perf_counter() - self.start,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a state; the basis has been restored already."""
        self.space.load(state["space"])
        self.next_check = state["next_check"]
        if "levels" in state:  # earlier versions did not store searches: they are repeated
            self.levels, self.width = dict(state["levels"]), state["width"]
            self.stalls = state["stalls"]
            self.search = None if state["search"] is None else Search(**state["search"])
        if state["limits"] != [self.space.tol, self.max_matvecs]:
            # With other limits, a solve that had ended may continue.
            self.next_check, self.stalls = 0, 0
        self.start = time.perf_counter() - state["seconds"]

    def save(self) -> None:
        """Write a checkpoint."""
        assert self.checkpoint is not None
        with self.space.H.communicator.together("saving a checkpoint"):
            self.checkpoint.save(self.state(), self.space.basis)

    def _save_if_due(self) -> None:
        if self.checkpoint is None:
            return
        with self.space.H.communicator.together("checking whether a checkpoint is due") as step:
            step.note = int(self.checkpoint.due)
        if any(step.notes):
            self.save()

    def _converge(self) -> bool:
        """Expand until all k pairs have converged (True) or no progress is possible (False)."""
        space, limiting = self.space, None
        while True:
            self._save_if_due()
            pending, expanded = space.num_pending, space.num_expanded
            if expanded >= space.k and (expanded >= self.next_check or pending == 0):
                # In H's dtype first: half the time in float32, and exact to the products' rounding.
                done = int(space.converged(space.H.dtype).sum())
                if done == space.k:
                    done = int(space.converged().sum())
                self.progress.advance(done, space.num_matvecs)
                if expanded == space.dim or (done == space.k and self._knows_enough()):
                    return True
                if done < space.k and self._at_noise():
                    return False
                # An eigenproblem of size m costs as much as several blocks: check at intervals that
                # grow with m, but more often near the end.
                near = done / space.k
                limiting = space.limiting(self._least_limit()) if done == space.k else None
                share = 0.05 if near > 0.9 else 0.12 if near > 0.5 else 0.2
                self.next_check = expanded + max(space.block, int(share * expanded))
            size = space.block if pending > 1.5 * space.block else pending or 1
            size = min(size, self._affordable(size + self.reserve) - self.reserve)
            if limiting is not None:
                size, self.next_check = min(size, limiting.shape[1]), expanded + 1
            if size <= 0:
                return False
            if not space.fits(max(size, space.block)):
                self._restart()
            elif pending == 0:
                space.add_random(space.block)
            elif expanded < space.num_initial:
                space.expand(min(size, space.num_initial - expanded))
            else:
                space.select(size, limiting)
                space.expand(size)
            limiting = None
            self.progress.advance(None, space.num_matvecs)

    def _at_noise(self) -> bool:
        """Whether the unconverged residuals are at the noise of the products."""
        space = self.space
        dtype = space.H.dtype
        if bool(space.converged(dtype).all()):  # converged in float32 only: look in float64
            dtype = torch.float64
        residuals = space.ritz(dtype)[2]
        return float(residuals[~space.converged(dtype)].max()) < 2 * space.noise

    def _knows_enough(self) -> bool:
        """Whether the space, without further matvecs, is consistent with no missed pair.

        Not so if the singular values of [T; R] prove that a pair was missed, or if pending
        directions would hold one for an H outside half as large as the last pair.
        """
        if not self.verify or self._is_known(self.space.k - 1):
            return True
        return self.space.limit(self.space.k - 1) >= self._least_limit()

    def _least_limit(self) -> float:
        bound = self.space.bound(self.space.k - 1)
        return bound - (1 - _LEAST_LIMIT) * abs(bound)

    def _restart(self, spare: int = 0) -> None:
        self.space.restart(spare)
        self.next_check = 0

    def _found_missed(self, last: int) -> bool:
        """Search outside the space for eigenvalues that come before the pair `last`.

        Returns:
            Whether one was found, or the space has to grow again. If not, `levels` holds what is
            known.
        """
        space, apart = self.space, False
        if self.search is None:
            self.next_check = 0
            if space.bound(last) == 0:  # only the zero operator has no scale
                self.levels = dict.fromkeys(self.levels, 0.0)
                return False
        while True:
            if self.search is None:
                if space.is_full:  # a previous search may have filled it
                    return self._expand_rest()
                if not self._make_room(MOST_STEPS // 2):
                    return True
                sides = sides_to_search(space, last, self.levels, apart=apart)
                if not sides:
                    return False
                self.search = Search.begin(space, last, 1, sides[0])
            search = self._run_search()
            if search.outcome == "found":
                self.stalls = 0
                if search.count > 1 or space.is_full or not self._affordable(1):
                    return True
                self.width = min(2 * self.width, _MOST_WIDTH)
                if not self._make_room(self.width * (search.step + 2)):
                    return True
                # There may be more: search for several at once.
                self.search = Search.begin(space, last, self.width, search.side, search.step + 2)
                continue
            if search.outcome == "stalled" and search.side and self._filter_tells(search):
                self.levels[search.side] = space.bound(last)
                continue
            self._learn(search)
            if search.count > 1:
                return True
            if search.outcome == "stalled":
                if search.side or last < space.k - 1 or not self._affordable(1):
                    self.stalls += 1
                    return False
                apart = True  # searched one by one, the ends may be conclusive
            space.step_back(search.first)

    def _expand_rest(self) -> bool:
        """Expand pending vectors of a full space; return whether there were any."""
        size = self._affordable(min(self.space.block, self.space.num_pending))
        if size > 0:
            self.space.expand(size)
        return size > 0

    def _filter_tells(self, search: Search) -> bool:
        """Whether a filter proves that nothing was missed, after a search ran out of room."""
        if search.count > 1 or search.step < LEAST_STEPS or search.step == MOST_STEPS:
            return False
        spectrum, most = search.spectrum(self.space), self._affordable(_MOST_FILTERED)
        return is_bounded_by_filter(self.space, search.last, search.side, spectrum, most)

    def _run_search(self) -> Search:
        """Advance the search until it has an outcome, or room or matvecs run out."""
        space, search = self.space, self.search
        assert search is not None
        while search.outcome == "":
            self._save_if_due()
            if space.fits(search.added) and self._affordable(search.added) == search.added:
                search.advance(space)
                self.progress.advance(None, space.num_matvecs)
            else:
                search.outcome = "stalled"
        self.search = None
        return search

    def _make_room(self, count: int) -> bool:
        """Make room for a search, as far as possible; return whether k pairs are left."""
        space = self.space
        # Leave a third of a small room to further Ritz vectors: without them the search is longer.
        count = min(count, (2 * (space.capacity - space.k - space.num_pending)) // 3)
        if count < 1:  # pending vectors take all of it: drop the negligible ones
            self._restart()
        elif not space.fits(count):
            self._restart(count)
        return space.num_expanded >= space.k

    def _learn(self, search: Search) -> None:
        """Lower the levels to the bound proven by a search that found nothing."""
        space, level = self.space, search.bound
        if search.outcome == "stalled":
            level = search.level(space)
            if search.side:
                level = max(level, search.bound)
            elif math.isfinite(level):
                # H outside is bounded by `level`: find the last pair for which that suffices.
                known = (i for i in range(search.last, -1, -1) if space.limit(i) >= level)
                index = next(known, None)
                level = math.inf if index is None else space.bound(index)
        for side in (search.side,) if search.side else space.sides:
            self.levels[side] = min(self.levels[side], level)

    def _affordable(self, size: int) -> int:
        return max(0, min(size, self.max_matvecs - self.space.num_matvecs))

    def result(self) -> Eigenpairs:
        """Form the eigenvectors, measure the noise of the products, and decide convergence."""
        space, H = self.space, self.space.H
        complete = self._complete()
        values, residuals, V_Dk = space.take()

        # Independent errors add in squares.
        residuals = torch.hypot(residuals, space.rounding * values.abs())
        noise = float("nan")
        # Residual estimates are void if restarts have dropped too much coupling.
        unknown = space.lost > _MOST_LOST
        size = space.k if unknown else min(space.block, space.k, _MOST_MEASURED)
        sample = evenly_spaced(size, space.k)
        if self._affordable(len(sample)) == len(sample):
            measured = measured_residuals(
                H, values[sample].to(H.dtype), V_Dk[:, sample.to(V_Dk.device)]
            )
            space.num_matvecs += len(sample)
            if not unknown:
                # The excess over the estimate is noise, assumed equal for all pairs.
                excess = measured**2 - residuals[sample] ** 2
                excess[excess < 0.2 * residuals[sample] ** 2] = 0
                noise = float(excess.max().sqrt())
                residuals = (residuals.square() + noise**2).sqrt()
            residuals[sample] = measured
            unknown = False
        # Rounding the values to H's dtype adds a residual of this size.
        residuals = torch.hypot(residuals, space.eps / 2 * values.abs())
        within = (residuals <= space.thresholds(values)) & (not unknown)
        done = within & (torch.arange(space.k, device="cpu") < complete)
        self.progress.advance(int(done.sum()), space.num_matvecs)
        if not bool(done.all()):
            noise_seen = max(space.noise, 0.0 if math.isnan(noise) else noise)
            repeated = self._repeated_noise(V_Dk) if not bool(within.all()) else 0.0
            noise_seen = max(noise_seen, repeated)
            warn_unconverged(
                space, self.max_matvecs, values, residuals, within, complete, noise_seen, repeated
            )
        return Eigenpairs(
            eigenvalues=values.to(H.device, H.dtype),
            eigenvectors=as_rows(V_Dk, H.communicator, space.dim),
            residuals=residuals.to(H.device, H.dtype),
            converged=done.to(H.device),
            num_matvecs=space.num_matvecs,
            method="block_krylov",
            layout=getattr(H, "layout", None),
            info={
                "tol": space.tol,
                "block_size": space.block,
                "max_basis": space.capacity,
                "restarts": space.num_restarts,
                "noise": noise,
                "which": space.which,
                "complete": complete,
                "storage": space.basis.placement.kind,
                "storage_dtype": str(space.basis.placement.dtype).removeprefix("torch."),
                "planned_bytes": space.basis.placement.nbytes,
                "seconds": time.perf_counter() - self.start,
            },
        )

    def _complete(self) -> int:
        """Return the number of leading pairs before which none is missed."""
        space = self.space
        if not self.verify or space.num_expanded >= space.dim:
            return space.k
        if space.num_expanded < space.k:
            return 0
        return sum(map(self._is_known, range(space.k)))

    def _repeated_noise(self, V_Dk: Tensor) -> float:
        """Return the norm of the non-reproducible error of a product."""
        if self._affordable(2) < 2:
            return 0.0
        H, v_D1 = self.space.H, V_Dk[:, :1].to(self.space.H.device, self.space.H.dtype)
        # Two equal products: the difference of independent errors is sqrt(2) times one of them.
        gap_D1 = H.product_rows(v_D1) - H.product_rows(v_D1)
        self.space.num_matvecs += 2
        return float(column_norms(gap_D1.mT.contiguous(), self.space.across)[0]) / math.sqrt(2)
