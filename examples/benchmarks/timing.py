"""Median seconds of several contenders in one process, their rounds interleaved.

Import it; it is not run. A machine slows down and speeds up by itself. Contenders that take turns
see the same weather, and a ratio taken inside each round cancels it.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


def wait_for(device: torch.device | str) -> None:
    """Wait until a GPU has done what it was asked for, so that a clock sees it; elsewhere nothing.

    Args:
        device: Where the work goes on.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Times:
    """Seconds of one contender, one entry a round, and what was kept of its first call."""

    seconds: list[float]
    first: Any = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def over(self, unit: Times, parts: int = 1) -> Times:
        """Return the ratios of a part of this to another contender, round by round."""
        pairs = zip(self.seconds, unit.seconds, strict=True)
        return Times([ours / parts / theirs for ours, theirs in pairs])

    def summary(self) -> dict[str, Any]:
        """Return median, quartiles and number of rounds, for the record."""
        return {
            "median": self.median,
            "quartiles": list(self.quartiles),
            "rounds": len(self.seconds),
        }

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{self.median:.3g} ({low:.3g}-{high:.3g})"


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    at_least: float = 0.0,
    long: float = math.inf,
    rounds_of_long: int = 3,
    keep: Callable[[Any], Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Times]:
    """Time contenders in turns, in another order every round, without garbage collection.

    Every contender is called once first, to warm up; that call says how often to repeat a quick
    one, and counts as a round for a long one, which a warm-up makes no faster.

    Args:
        contenders: What to call, by name.
        rounds: Rounds after the warm-up.
        at_least: Seconds that one measurement takes at least, by repeating the call.
        long: Seconds from which a call counts as long.
        rounds_of_long: Rounds of a long one in all, instead of `rounds`.
        keep: What to make of a first call's result, untimed; None keeps nothing.
        say: Is told each measurement as it comes.

    Returns:
        The seconds of one call, by name, in the order of the rounds.
    """
    times: dict[str, Times] = {}
    repeats: dict[str, int] = {}
    left: dict[str, int] = {}
    for name, fn in contenders.items():
        seconds, first = _timed(fn, 1)
        if seconds < 10 * at_least:
            seconds, _ = _timed(fn, 1)  # the first call may have compiled or allocated
        is_long = seconds >= long
        times[name] = Times([seconds] if is_long else [])
        if keep is not None:
            times[name].first = keep(first)
        del first
        repeats[name] = max(1, math.ceil(at_least / max(seconds, 1e-9)))
        left[name] = rounds_of_long - 1 if is_long else rounds
        if say is not None:
            say(f"{name}: {seconds:.3g} s{'' if is_long else ' (warm-up)'}")
    shuffle = random.Random(0).shuffle
    while any(left.values()):
        order = [name for name in contenders if left[name] > 0]
        shuffle(order)
        for name in order:
            seconds, _ = _timed(contenders[name], repeats[name])
            times[name].seconds.append(seconds)
            left[name] -= 1
            if say is not None and at_least == 0:
                say(f"{name}: {seconds:.3g} s")
    return times


def _timed(fn: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    out = None
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(repeats):
            out = fn()
        return (time.perf_counter() - start) / repeats, out
    finally:
        gc.enable()
