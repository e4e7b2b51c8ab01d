"""When to compute the eigenspace anew: every so many steps, or within a share of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

_WATCHED = 10  # steps that are timed before an interval is chosen


@dataclass
class RefreshSchedule:
    """The next step at which the eigenspace is computed anew.

    With an interval given, every so many steps. Without one, so often that refreshes take at most
    a share of the training time: after each, some steps are timed, and the next one comes when the
    share has been earned again.

    Args:
        max_fraction: The share, of the whole time, f; in (0, 1).
        clock: Seconds.

    Attributes:
        due: The step of the next refresh, or of the next decision.
        is_decided: Whether `due` is the step of a refresh.
    """

    max_fraction: float
    clock: Callable[[], float] = time.perf_counter
    due: int = 0
    is_decided: bool = True
    refresh_seconds: float = 0.0  # all of them
    last_seconds: float = 0.0
    _watching: tuple[int, float] | None = None
    _begun: float | None = None

    def now(self, step: int, every: int | None, largest: Callable[[float], float]) -> bool:
        """Return whether to refresh before this step.

        Args:
            step: Steps taken so far.
            every: The interval, or None to keep to the share of the time.
            largest: Returns the largest of a number over all processes, which have to agree.
        """
        if self._begun is None:
            self._begun = self.clock()
        if step < self.due:
            return False
        if self.is_decided or every is not None:
            return True
        if self._watching is None:  # resumed before a decision: there is no time to go by yet
            self._watch(step)
            return False
        first, since = self._watching
        per_step = (self.clock() - since) / max(1, step - first)
        earned = self.last_seconds * (1 - self.max_fraction) / self.max_fraction
        # A decision comes from time, which differs between processes.
        self.due = first + math.ceil(largest(earned / max(per_step, 1e-9)))
        self.is_decided = True
        return step >= self.due

    def refreshed(self, step: int, every: int | None, seconds: float) -> None:
        """Take note of a refresh before this step that took so long."""
        self.last_seconds = seconds
        self.refresh_seconds += seconds
        if every is not None:
            self.due, self.is_decided = step + every, True
        else:
            self._watch(step)

    def fraction(self) -> float:
        """Return the share of the time since the first step that refreshes took."""
        if self._begun is None:
            return 0.0
        return self.refresh_seconds / max(self.clock() - self._begun, 1e-9)

    def elapsed(self) -> float:
        """Return the seconds since the first step."""
        return 0.0 if self._begun is None else self.clock() - self._begun

    def _watch(self, step: int) -> None:
        self._watching = (step, self.clock())
        self.due, self.is_decided = step + _WATCHED, False
