"""Sparsity schedules over the stages of pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Schedule = str | Sequence[float] | Callable[[float], float]
_NAMES = ("cubic", "geometric", "linear")


def check_schedule(schedule: Any) -> Schedule:
    """Return a schedule, sparsities as a tuple of numbers.

    Raises:
        TypeError: If it is neither a name, nor a function, nor sparsities.
        ValueError: If the name is unknown.
    """
    if isinstance(schedule, str):
        if schedule not in _NAMES:
            raise ValueError(
                f"expected a schedule of {list(_NAMES)}, sparsities or a function, got {schedule!r}"
            )
        return schedule
    if callable(schedule):
        return schedule
    try:
        if not isinstance(schedule, Iterable):
            raise TypeError
        return tuple(float(s) for s in schedule)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"expected a schedule of {list(_NAMES)}, sparsities or a function, got {schedule!r}"
        ) from error


def sparsities(schedule: Schedule, stages: int, start: float, end: float) -> list[float]:
    """Return the sparsity at the end of each stage, increasing from `start` to `end`.

    "cubic": ``end + (start - end) (1 - t)^3``, fast at first, when little is lost; "linear" in t;
    "geometric": each stage prunes the same fraction of the rest. t = 1/stages, 2/stages, ..., 1.

    Args:
        schedule: One of these names; the sparsities themselves, nondecreasing, the last one `end`;
            or a function from t in (0, 1] to the fraction of the way from `start` to `end`.
        stages: Number of stages, at least 1; ignored if the sparsities are given.
        start: Sparsity so far, in [0, 1).
        end: Sparsity to reach, in [start, 1).

    Raises:
        TypeError: If the schedule is none.
        ValueError: If it is unknown, falls, has NaN, or does not end at `end`.

    References:
        Zhu and Gupta, arXiv 1710.01878, equation (1), for the cubic one.
    """
    schedule = check_schedule(schedule)
    if isinstance(schedule, str):
        known: dict[str, Callable[[float], float]] = {
            "cubic": lambda t: end + (start - end) * (1 - t) ** 3,
            "linear": lambda t: start + (end - start) * t,
            "geometric": lambda t: 1 - (1 - start) * ((1 - end) / (1 - start)) ** t,
        }
        out = [known[schedule](j / stages) for j in range(1, stages)] + [end]
    elif callable(schedule):
        out = [start + (end - start) * schedule(j / stages) for j in range(1, stages + 1)]
    else:
        out = list(schedule)
    path = [start, *out]
    if not out or not all(b >= a - 1e-12 for a, b in zip(path, out, strict=False)):
        raise ValueError(f"expected sparsities that do not fall, from {start:g} on, got {out}")
    if abs(out[-1] - end) > 1e-9:
        raise ValueError(f"expected a schedule that ends at sparsity {end:g}, got {out[-1]:g}")
    return [*out[:-1], end]  # exactly `end`: counts are rounded from it
