"""Refreshes of a preconditioner's eigenspace: when they are due, what they find, what fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hesscurv.optim.automatic_rate import AutomaticRate
from hesscurv.optim.group_settings import DAMPING, DUE, EVERY, FACTOR, LAST, RANK, STEP
from hesscurv.optim.preconditioner.eigenspace_tracker import EigenspaceTracker
from hesscurv.optim.preconditioner.preconditioner_report import little_to_gain
from hesscurv.optim.preconditioner.refresh_schedule import RefreshSchedule
from hesscurv.optim.preconditioner.tracked_preconditioner import TrackedPreconditioner


@dataclass
class EigenspaceRefresh:
    """Recompute the eigenspace when due; after a failure P is the identity, with a warning.

    Args:
        tracker: Solves for the eigenspace.
        schedule: When.
        rate: Of the automatic learning rate, or None.
        drift_tol: See `PreconditionerOptions`, as `check_every`.

    Attributes:
        num_refreshes: Times that it was computed.
        num_failures: Times that it could not be.
        last_failure: Why it could not be the last time; empty if it always could.
    """

    tracker: EigenspaceTracker
    schedule: RefreshSchedule
    rate: AutomaticRate | None
    drift_tol: float | None
    check_every: int
    num_refreshes: int = field(default=0, init=False)
    num_failures: int = field(default=0, init=False)
    last_failure: str = field(default="", init=False)

    def is_due(self, tracked: TrackedPreconditioner, group: dict[str, Any]) -> bool:
        """Return whether to refresh before this step."""
        schedule = self.schedule
        schedule.go_on_from(group[LAST], group[DUE])
        return (
            schedule.now(group[STEP], group[EVERY], self.tracker.largest)
            or tracked.has_other_rank(group[RANK])
            or self._has_drifted(tracked, group[STEP])
        )

    def run(
        self,
        tracked: TrackedPreconditioner,
        groups: Sequence[dict[str, Any]],
        base: str,
        say: Callable[[str, str], None],
    ) -> None:
        """Compute the eigenspace at the present weights, from the last one; or fall back.

        Args:
            tracked: Where it is kept.
            groups: Parameter groups, whose automatic factor is set.
            base: The name of the optimizer whose steps are preconditioned.
            say: Takes a kind and a message for the user, who is to read one of each kind.
        """
        group, schedule = groups[0], self.schedule
        start, factor, little = schedule.clock(), 1.0, None
        self.tracker.thrifty = group[EVERY] is None
        try:
            tracked.solve(group[RANK], group[DAMPING], self.tracker.generator(group[STEP]))
            if self.rate:
                largest = tracked.largest_curvature(self.tracker.generator(group[STEP]))
                factor = self.rate.factor(largest, groups)
        except Exception as error:
            # Training goes on: curvature that cannot be had is no reason to end it.
            tracked.forget(group[RANK])
            self.tracker.start_over()
            self.num_failures += 1
            self.last_failure = f"{type(error).__name__}: {error}"
            say(
                "failure",
                "the curvature could not be computed; until it can, steps are those of "
                f"{base} alone. {self.last_failure}",
            )
        else:
            self.num_refreshes += 1
            little = little_to_gain(tracked.current)
            if little:
                say("gain", little)
        for each in groups:
            each[FACTOR] = factor
        schedule.refreshed(group[STEP], schedule.clock() - start, worth_it=not little)

    def _has_drifted(self, tracked: TrackedPreconditioner, step: int) -> bool:
        if self.drift_tol is None or step % self.check_every or tracked.is_identity:
            return False
        start = self.schedule.clock()
        try:
            return not tracked.drift(self.tracker.generator(step)) <= self.drift_tol
        except Exception:
            return True  # the refresh meets it too, and says so
        finally:
            self.schedule.spent(self.schedule.clock() - start)
