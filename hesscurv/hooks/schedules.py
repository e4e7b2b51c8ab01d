"""Measurement schedules: callables of the training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hesscurv.interface.ranges import check_count

Schedule = Callable[[int], bool]
"""Returns whether to measure after a step; depends only on the step, so that all ranks agree."""


@dataclass(frozen=True)
class every:  # noqa: N801, reads as a function: schedule=every(100)
    """Every n-th step, from a first one on.

    Args:
        n: The interval, at least 1.
        start: The first step, at least 0; default 0.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If it is out of range.

    Example:
        >>> schedule = hesscurv.hooks.every(10)
        >>> [step for step in range(31) if schedule(step)]
        [0, 10, 20, 30]
    """

    n: int
    start: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check(n=(self.n, 1), start=(self.start, 0))

    def __call__(self, step: int) -> bool:
        """Return whether to measure after this step."""
        return step >= self.start and (step - self.start) % self.n == 0


@dataclass(frozen=True)
class logarithmic:  # noqa: N801
    """Steps spaced evenly on a logarithmic scale: 0 and round(10^(i / per_decade)), i = 0, 1, ...

    Args:
        per_decade: Steps per factor of ten, at least 1; default 5: 1, 2, 3, 4, 6, 10, 16, 25, 40,
            63, 100, ...

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is below 1.

    Example:
        >>> schedule = hesscurv.hooks.logarithmic(per_decade=2)
        >>> [step for step in range(101) if schedule(step)]
        [0, 1, 3, 10, 32, 100]
    """

    per_decade: int = 5

    def __post_init__(self) -> None:
        """Check the number."""
        _check(per_decade=(self.per_decade, 1))

    def __call__(self, step: int) -> bool:
        """Return whether to measure after this step."""
        if step < 1:
            return step == 0
        # An exponent that rounds to this step lies within one of its logarithm: try a few.
        nearest = 0
        while round(10 ** ((nearest + 1) / self.per_decade)) <= step:
            nearest += 1
        return round(10 ** (nearest / self.per_decade)) == step


@dataclass(frozen=True)
class dense_then_sparse:  # noqa: N801
    """Frequent steps at first, when curvature changes most, and rare ones afterwards.

    Args:
        until: Last step of the dense phase, at least 0; default 100.
        dense: Interval of the dense phase, at least 1; default 10.
        sparse: Interval afterwards, counted from `until`, at least 1; default 500.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If it is out of range.

    Example:
        >>> schedule = hesscurv.hooks.dense_then_sparse(until=20, dense=10, sparse=100)
        >>> [step for step in range(321) if schedule(step)]
        [0, 10, 20, 120, 220, 320]
    """

    until: int = 100
    dense: int = 10
    sparse: int = 500

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check(until=(self.until, 0), dense=(self.dense, 1), sparse=(self.sparse, 1))

    def __call__(self, step: int) -> bool:
        """Return whether to measure after this step."""
        if step < self.until:
            return step >= 0 and step % self.dense == 0
        return (step - self.until) % self.sparse == 0


def _check(**numbers: tuple[object, int]) -> None:
    for name, (value, least) in numbers.items():
        check_count(name, value, least=least)
