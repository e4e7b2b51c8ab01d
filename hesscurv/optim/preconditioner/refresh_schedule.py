"""Refresh schedule of the eigenspace: a fixed interval, or a share of the training time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

_WATCHED = 10  # steps that are timed before an interval is chosen
_MOST_DOUBLINGS = 4


@dataclass
class RefreshSchedule:
    """The next step at which the eigenspace is recomputed.

    With an interval given, every so many steps. Without one, so often that refreshes take at most
    a share of the training time: after each, some steps are timed, and the next one comes when the
    share has been earned again. Refreshes that find nothing worth damping become rarer: each one in
    a row doubles the time to the next, up to 16 times.

    Args:
        max_fraction: The share, of the whole time, f; in (0, 1).
        clock: Seconds.

    Attributes:
        last: The step before which the last refresh was; None before the first one.
        due: The step of the next refresh, once chosen; None before, and with an interval given.
        refresh_seconds: Of all refreshes, and what else was `spent`.
    """

    max_fraction: float
    clock: Callable[[], float] = time.perf_counter
    last: int | None = None
    due: int | None = None
    refresh_seconds: float = 0.0
    _last_seconds: float = 0.0
    _in_vain: int = 0
    _watching: tuple[int, float] | None = None
    _begun: float | None = None

    def go_on_from(self, last: int | None, due: int | None) -> None:
        """Take over when the last refresh was and the next one is, from a state dict, say."""
        if (last, due) != (self.last, self.due):
            self.last, self.due, self._watching = last, due, None

    def now(self, step: int, every: int | None, largest: Callable[[float], float]) -> bool:
        """Return whether to refresh before this step.

        Args:
            step: Steps taken so far.
            every: The interval, or None to keep to the share of the time.
            largest: Returns the largest of a number over all processes, which have to agree.
        """
        if self._begun is None:
            self._begun = self.clock()
        if self.last is None:
            return True
        if every is not None:
            return step >= self.last + every
        if self.due is None:
            self._decide(step, largest)
        return self.due is not None and step >= self.due

    def refreshed(self, step: int, seconds: float, *, worth_it: bool = True) -> None:
        """Record the cost of a refresh before this step, and whether it paid."""
        self._in_vain = 0 if worth_it else min(self._in_vain + 1, _MOST_DOUBLINGS)
        self._last_seconds = seconds
        self.refresh_seconds += seconds
        self.last, self.due, self._watching = step, None, (step, self.clock())

    def spent(self, seconds: float) -> None:
        """Record time that went into something else than training."""
        self.refresh_seconds += seconds

    def elapsed(self) -> float:
        """Return the seconds since the first step."""
        return 0.0 if self._begun is None else self.clock() - self._begun

    def _decide(self, step: int, largest: Callable[[float], float]) -> None:
        """Choose the next refresh, if enough steps have been timed."""
        if self._watching is None:  # resumed, or the interval given before was taken back
            self._watching = step, self.clock()
        first, since = self._watching
        if step < first + _WATCHED:
            return
        per_step = (self.clock() - since) / (step - first)
        earned = self._last_seconds * (1 - self.max_fraction) / self.max_fraction
        earned *= 2**self._in_vain
        # A decision comes from time, which differs between processes.
        self.due = first + math.ceil(largest(earned / max(per_step, 1e-9)))
