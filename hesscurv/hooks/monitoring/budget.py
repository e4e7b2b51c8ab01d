"""Time budget of measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class Budget:
    """Accounts for the time of training and measuring, and decides whether to measure.

    A measurement is affordable if, at its expected cost, all measurements together take at most
    `max_fraction` of the training time: the time between calls of the monitor. The first one always
    is.

    Args:
        max_fraction: Maximal fraction of the training time; None for no limit.
        clock: Returns seconds.

    Attributes:
        training: Seconds of training so far.
        measuring: Seconds of measurements so far, including loggers.
    """

    def __init__(self, max_fraction: float | None, clock: Callable[[], float]) -> None:
        self.max_fraction = max_fraction
        self.clock = clock
        self.training = self.measuring = 0.0
        self._next_cost = 0.0
        self._calls = 0
        self._left: float | None = None  # when the monitor was left

    def enter(self) -> None:
        """Record entry into the monitor; the time since the last exit was training."""
        if self._left is not None:
            self.training += max(0.0, self.clock() - self._left)
            self._calls += 1

    def leave(self) -> None:
        """Record exit from the monitor."""
        self._left = self.clock()

    def measured(self, seconds: float, share: float = 1.0) -> None:
        """Record a measurement.

        Args:
            seconds: Its duration, including loggers.
            share: Expected duration of the next one, relative to this.
        """
        self.measuring += seconds
        self._next_cost = share * seconds

    def fraction(self, seconds: float = 0.0) -> float:
        """Return the fraction of the time so far that was spent in measurements.

        Args:
            seconds: Duration of a measurement that is not yet recorded.
        """
        total = self.training + self.measuring + seconds
        return (self.measuring + seconds) / total if total > 0 else 0.0

    def wait(self) -> int:
        """Return the number of steps to wait: 0 if a measurement is affordable now."""
        if self.max_fraction is None or self._next_cost == 0:
            return 0
        missing = (self.measuring + self._next_cost) / self.max_fraction - self.training
        if missing <= 0:
            return 0
        per_step = self.training / max(self._calls, 1)
        return max(1, min(_LONGEST, math.ceil(missing / max(per_step, 1e-9))))

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far; the time until it is loaded is not counted."""
        return {
            "training": self.training,
            "measuring": self.measuring,
            "next_cost": self._next_cost,
            "calls": self._calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        seconds = [float(state[name]) for name in ("training", "measuring", "next_cost")]
        self._calls, self._left = int(state["calls"]), None
        self.training, self.measuring, self._next_cost = seconds


_LONGEST = 1000  # maximal wait in steps, since the duration of steps may change
