"""The share of the time that measurements may take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class Budget:
    """Adds up the seconds of training and of measuring, and says when the next one is affordable.

    A measurement is affordable when, at the cost that is expected of it, all measurements take at
    most `max_fraction` of the training time: the time between calls of the monitor. The first one
    always is.

    Args:
        max_fraction: The share, of the training time; None for no limit.
        clock: Seconds.

    Attributes:
        training: Seconds of training so far.
        measuring: Seconds of measurements so far, with what loggers take.
    """

    def __init__(self, max_fraction: float | None, clock: Callable[[], float]) -> None:
        self.max_fraction = max_fraction
        self.clock = clock
        self.training = self.measuring = 0.0
        self._next_cost = 0.0
        self._calls = 0
        self._left: float | None = None  # when the monitor was left

    def enter(self) -> None:
        """Take note that training has come to the monitor: what has passed was its."""
        if self._left is not None:
            self.training += max(0.0, self.clock() - self._left)
            self._calls += 1

    def leave(self) -> None:
        """Take note that training goes on."""
        self._left = self.clock()

    def measured(self, seconds: float, share: float = 1.0) -> None:
        """Take note of a measurement.

        Args:
            seconds: Of it and its loggers.
            share: What the next one is expected to take of that.
        """
        self.measuring += seconds
        self._next_cost = share * seconds

    def fraction(self, seconds: float = 0.0) -> float:
        """Return the share of the time so far that was spent in measurements.

        Args:
            seconds: Of a measurement that is not yet added.
        """
        total = self.training + self.measuring + seconds
        return (self.measuring + seconds) / total if total > 0 else 0.0

    def wait(self) -> int:
        """Return in how many steps to ask again: 0 if a measurement is affordable now."""
        if self.max_fraction is None or self._next_cost == 0:
            return 0
        missing = (self.measuring + self._next_cost) / self.max_fraction - self.training
        if missing <= 0:
            return 0
        per_step = self.training / max(self._calls, 1)
        return max(1, min(_LONGEST, math.ceil(missing / max(per_step, 1e-9))))

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far; the time until it is loaded is nobody's."""
        return {
            "training": self.training,
            "measuring": self.measuring,
            "next_cost": self._next_cost,
            "calls": self._calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s seconds."""
        seconds = [float(state[name]) for name in ("training", "measuring", "next_cost")]
        self._calls, self._left = int(state["calls"]), None
        self.training, self.measuring, self._next_cost = seconds


_LONGEST = 1000  # steps after which to ask again: their time may change
