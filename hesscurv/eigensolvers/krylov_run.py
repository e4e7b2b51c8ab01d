"""The course of a block Krylov solve: when to expand, restart, search, save and stop."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hesscurv.distributed.rows import as_rows
from hesscurv.eigensolvers.checkpoint import Checkpoint
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.krylov_plan import SEARCH_STEPS
from hesscurv.eigensolvers.krylov_space import KrylovSpace
from hesscurv.eigensolvers.progress import Progress
from hesscurv.eigensolvers.residuals import ConvergenceWarning, measured_residuals
from hesscurv.linalg.rayleigh_ritz import ritz_pairs

# The search for missed eigenvectors: by how much one would dominate, and when to give up.
_DOMINANT, _MOST_ROUNDS = 10.0, 3


@dataclass
class _Search:
    """Where the search for missed eigenvectors stands."""

    first: int  # vectors expanded before it
    added: int  # vectors that wait for their product
    bound: float  # the magnitude that a missed eigenvalue would have
    step: int = 0


class KrylovRun:
    """When to expand, to restart, to search, to save and to stop.

    Args:
        space: The space, with its first vectors waiting.
        max_matvecs: The most products.
        verify: Whether to look for missed eigenvectors at the end.
        progress: The progress bar.
        checkpoint: Where the state is saved; None for nowhere.
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
        self.next_check = 0  # the Ritz pairs are looked at from so many expanded vectors on
        # Random vectors a step of the search, how often it was without result, and whether it is
        # over: what it brought is brought to convergence still.
        self.count, self.inconclusive, self.closing = 1 if space.k < 50 else 2, 0, False
        self.search: _Search | None = None

    def solve(self) -> None:
        """Bring the k largest pairs to convergence, and look for pairs that were missed."""
        space = self.space
        while True:
            if self.search is None:
                converged = self._converge()
                whole = space.num_expanded >= space.dim
                if self.closing or not self.verify:
                    break
                if not converged or whole:
                    self.closing = True
                    continue
            found = self._found_missed()
            self.search = None
            if found is False or self._affordable(1) == 0:
                self.closing = True
            elif found:
                self.count, self.inconclusive = min(2 * self.count, space.block), 0
            else:
                self.inconclusive += 1
                self.closing = self.inconclusive == _MOST_ROUNDS
        if self.checkpoint is not None:
            self.save()

    def state(self) -> dict[str, Any]:
        """Return all that decides how the run goes on, beside the basis."""
        return {
            "block": self.space.block,
            "capacity": self.space.capacity,
            "storage_dtype": str(self.space.basis.placement.dtype),
            "storage": self.space.basis.placement.kind,
            "operator": self.space.H.settings(),
            "limits": [self.space.tol, self.max_matvecs],
            "space": self.space.state(),
            "next_check": self.next_check,
            "count": self.count,
            "inconclusive": self.inconclusive,
            "closing": self.closing,
            "search": None if self.search is None else asdict(self.search),
            "seconds": time.perf_counter() - self.start,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state; the basis has been restored already."""
        self.space.load(state["space"])
        for name in ("next_check", "count", "inconclusive", "closing"):
            setattr(self, name, state[name])
        self.search = None if state["search"] is None else _Search(**state["search"])
        if state["limits"] != [self.space.tol, self.max_matvecs]:
            # What ended then need not be the end now.
            self.closing, self.inconclusive, self.next_check = False, 0, 0
        self.start = time.perf_counter() - state["seconds"]

    def save(self) -> None:
        """Write a checkpoint."""
        assert self.checkpoint is not None
        with self.space.H.communicator.together("saving a checkpoint"):
            self.checkpoint.save(self.state(), self.space.basis)

    def _save_if_due(self) -> None:
        if self.checkpoint is None:
            return
        with self.space.H.communicator.together("looking at the clock") as step:
            step.note = int(self.checkpoint.due)
        if any(step.notes):
            self.save()

    def _converge(self) -> bool:
        """Expand until all k pairs have converged (True), or cannot any more (False)."""
        space = self.space
        while True:
            self._save_if_due()
            pending, expanded = space.num_pending, space.num_expanded
            if expanded >= space.k and (expanded >= self.next_check or pending == 0):
                # In H's dtype first: half the time in float32, and good to the products' rounding.
                done = int(space.converged(space.H.dtype).sum())
                if done == space.k:
                    done = int(space.converged().sum())
                self.progress.show(done, space.num_matvecs)
                if done == space.k or expanded == space.dim:
                    return True
                if self._at_noise():
                    return False
                # An eigenproblem of size m costs as much as several blocks: check more and more
                # rarely, but more often near the end.
                near = done / space.k
                share = 0.05 if near > 0.9 else 0.12 if near > 0.5 else 0.2
                self.next_check = expanded + max(space.block, int(share * expanded))
            size = self._affordable(space.block if pending > 1.5 * space.block else pending or 1)
            if size == 0:
                return False
            if not space.fits(max(size, space.block)):
                space.restart()
                self.next_check = 0
            elif pending == 0:
                space.add_random(space.block)
            elif expanded < space.num_initial:
                space.expand(min(size, space.num_initial - expanded))
            else:
                space.select(size)
                space.expand(size)
            self.progress.show(None, space.num_matvecs)

    def _at_noise(self) -> bool:
        """Whether what has not converged is as good as the products' noise lets it be."""
        space = self.space
        dtype = space.H.dtype
        if bool(space.converged(dtype).all()):  # the rough look was too rough
            dtype = torch.float64
        residuals = space.ritz(dtype)[2]
        return float(residuals[~space.converged(dtype)].max()) < 2 * space.noise

    def _found_missed(self) -> bool | None:
        """Look outside the basis for an eigenvalue that belongs to the k largest.

        Fresh random vectors, orthogonal to the basis, are expanded by themselves: what the basis
        misses grows out of them, since all else of its magnitude is in the basis. With theta their
        own largest Ritz value after s steps, an eigenvector of size |lambda_k| has grown by the
        Chebyshev polynomial T_s(|lambda_k| / |theta|) relative to the rest, from its share
        sqrt(count / D) of a random start. It is over when it would dominate, and does not; None
        when the basis or the steps ran out before.
        """
        space = self.space
        if self.search is None:
            magnitudes = space.ritz()[0][: space.k].abs()
            # What is larger than |lambda_k| by less than a residual may have does not matter.
            bound = float(magnitudes[-1] + space.thresholds(magnitudes)[-1])
            if bound == 0:  # only the zero operator has no scale
                return False
            self.next_check = 0
            if space.basis.size == space.dim:  # all that is outside is pending
                space.expand(self._affordable(min(space.block, space.num_pending)))
                return True
            if not space.fits(self.count * (SEARCH_STEPS // 2)):
                space.restart()
            added = space.add_random(self.count)
            self.search = _Search(space.num_expanded, added, bound)
        search = self.search
        while search.step < SEARCH_STEPS:
            self._save_if_due()
            if search.added == 0:  # the vectors' own Krylov space is exhausted
                space.step_back(search.first)
                return False
            if not space.fits(search.added) or self._affordable(search.added) < search.added:
                break
            space.bring_last_forward(search.added)
            search.added = space.expand(search.added)
            own = space.A[search.first : space.num_expanded, search.first :]
            theta = float(ritz_pairs(own)[0][0].abs())
            if theta > search.bound:
                return True
            search.step += 1
            growth = search.step * math.acosh(search.bound / max(theta, 1e-3 * search.bound))
            if growth > math.log(2 * _DOMINANT * math.sqrt(space.dim / self.count)):
                space.step_back(search.first)
                return False
        return None

    def _affordable(self, size: int) -> int:
        return max(0, min(size, self.max_matvecs - self.space.num_matvecs))

    def result(self) -> Eigenpairs:
        """Form the eigenvectors, measure the noise of the products, and say what has converged."""
        space, H = self.space, self.space.H
        values, residuals, V_Dk = space.take()

        residuals = torch.hypot(residuals, space.rounding * values.abs())
        noise = float("nan")
        sample = torch.linspace(0, space.k - 1, min(space.block, space.k), device="cpu")
        sample = sample.round().long().unique()
        if self._affordable(len(sample)) == len(sample):
            measured = measured_residuals(
                H, values[sample].to(H.dtype), V_Dk[:, sample.to(V_Dk.device)]
            )
            space.num_matvecs += len(sample)
            # Only what the estimate does not explain is noise, which is alike for all pairs.
            excess = measured**2 - residuals[sample] ** 2
            excess[excess < 0.2 * residuals[sample] ** 2] = 0
            noise = float(excess.max().sqrt())
            residuals = (residuals.square() + noise**2).sqrt()
            residuals[sample] = measured
        # The values are rounded to H's dtype, which alone makes a residual of this size.
        residuals = torch.hypot(residuals, space.eps / 2 * values.abs())
        done = residuals <= space.thresholds(values)
        self.progress.show(int(done.sum()), space.num_matvecs)
        if not bool(done.all()):
            self._warn(
                values, residuals, done, max(space.noise, 0.0 if math.isnan(noise) else noise)
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
                "storage": space.basis.placement.kind,
                "storage_dtype": str(space.basis.placement.dtype).removeprefix("torch."),
                "planned_bytes": space.basis.placement.nbytes,
                "seconds": time.perf_counter() - self.start,
            },
        )

    def _warn(self, values: Tensor, residuals: Tensor, done: Tensor, noise: float) -> None:
        space = self.space
        worst = int((residuals / values.abs().clamp(min=1e-300)).argmax())
        if float(residuals[~done].min()) > 5 * noise:
            remedy = f"raise max_matvecs (now {self.max_matvecs}), max_basis or tol"
        else:
            remedy = (
                f"the products' noise is {noise:.2g}: compute them in float64 "
                "(compute_dtype=torch.float64) or raise tol"
            )
        warnings.warn(
            f"{int(done.sum())} of {space.k} eigenpairs have converged to tol={space.tol:g} after "
            f"{space.num_matvecs} products; pair {worst} has eigenvalue {values[worst]:.3g} and "
            f"residual {residuals[worst]:.2g}; {remedy}. See `converged` and `residuals`",
            ConvergenceWarning,
            stacklevel=4,
        )
