"""Time the ways of computing products on one micro-batch, within a share of what they may save."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hesscurv.operators.checks.agreement import agree
from hesscurv.operators.checks.references import on_batch

if TYPE_CHECKING:
    from hesscurv.operators.curvature_operator import CurvatureOperator

logger = logging.getLogger(__name__)

WIDTHS = (4, 8, 16, 32, 64)
# Of the time that the products to come would take by the reference way.
_SHARE = 0.25
_SHORT = 0.02  # seconds
# Above this per product, batching has no overhead left to save: two vectors tell enough.
_LONG_PRODUCT = 0.03
_OVERHEAD = 0.002  # seconds of a product that are not worth mentioning
# Seconds to trace one operation of the forward pass to its second derivative: 4 to 15 ms.
_TRACING = 0.012


class Measurement:
    """Seconds per vector of an operator's ways on one micro-batch, by the number of vectors.

    The first way is the reference: the others must agree with it. They are tried in their order, as
    long as the budget lasts, and the best of those that take vectors at once is tried at narrower
    and at wider blocks, as long as that gains.

    Args:
        operator: The operator.
        batch: A micro-batch.
        expected: The number of products to come.

    Attributes:
        seconds: ``{way: {width: seconds per vector}}``; width 1 is a loop.
        setup: Seconds to set each way up.
        traced: The fastest of the ways with a long set-up, and what it was set up to be.
    """

    def __init__(self, operator: CurvatureOperator, batch: Any, expected: int) -> None:
        self.seconds: dict[str, dict[int, float]] = {}
        self.setup: dict[str, float] = {}
        self._operator, self._batch = operator, batch
        self._widths = [w for w in WIDTHS if w <= operator.memory_plan.max_vectors]
        # GPUs are filled by wider blocks.
        first = 1 if operator.device.type == "cpu" else 3
        self._first_width = self._widths[min(first, len(self._widths) - 1)] if self._widths else 0
        self._few = probes(operator, 2)
        self._reference: torch.Tensor | None = None
        # Graphs are large: only the best one of a kind stays.
        self._batched: tuple[str, Any] | None = None
        self.traced: tuple[str, Any] | None = None
        self._budget, self._spent = 0.0, 0.0

        reference, *others = operator.ways
        with on_batch(reference, batch):
            self._try(reference)
        passes = 1 if operator.memory_plan.keep_graphs else max(1, operator.objective.batches.count)
        self._budget = self._spent + _SHARE * expected * passes * self._best()
        if self._best() > _OVERHEAD:  # then one vector at once, by a better graph, gains most
            others.sort(key=lambda way: way not in operator.loops)
        tracing = _TRACING * operator.objective.count_operations(batch)
        for way in others:
            if self._spent + (tracing if way in operator.traced else 0.0) >= self._budget:
                continue
            try:
                self._try(way)
            except Exception as error:
                logger.info("way %r is not available here: %s", way, error)
        if self._batched is not None:
            with contextlib.suppress(torch.OutOfMemoryError):
                self._look_around(*self._batched)

    def _try(self, way: str) -> None:
        operator = self._operator
        best = self._best()
        setup, apply = self._timed(lambda: operator.prepare(self._batch, way))
        pair, got = self._timed(lambda: operator.run(apply, self._few, way))
        self._reference = got if self._reference is None else self._reference
        if not agree(self._reference, got, precision=self._operator.objective.precision):
            logger.warning("way %r disagrees with double backward; left out", way)
            return
        self.setup[way] = setup
        if way in operator.loops:
            self.seconds[way] = {1: self._per_vector(apply, way, 2, pair / 2)}
        elif self._first_width and not (pair / 2 > 1.25 * best > 1.25 * _LONG_PRODUCT):
            width = self._first_width
            before = self._best(batched=True)
            self.seconds[way] = {width: self._per_vector(apply, way, width, best)}
            if self.seconds[way][width] < before:
                self._batched = way, apply
        if way == operator.ways[0] and way not in operator.loops:  # for single vectors too
            self.seconds.setdefault(way, {}).setdefault(1, pair / 2)
        if way in operator.traced and min(self.seconds.get(way, {0: best}).values()) < best:
            self.traced = way, apply

    def _look_around(self, way: str, apply: Any) -> None:
        found, start = self.seconds[way], self._widths.index(self._first_width)
        loops = [s[1] for s in self.seconds.values() if 1 in s]
        if found[self._first_width] > 1.5 * min(loops, default=float("inf")):
            return
        for side in (self._widths[start + 1 :], self._widths[:start][::-1]):
            last = found[self._first_width]
            for width in side:
                if self._spent >= self._budget:
                    return
                found[width] = self._per_vector(apply, way, width, min([*loops, *found.values()]))
                if found[width] > 1.1 * last:
                    break
                last = found[width]

    def _best(self, *, batched: bool = False) -> float:
        loops = self._operator.loops if batched else ()
        found = [min(s.values()) for way, s in self.seconds.items() if way not in loops]
        return min(found, default=float("inf"))

    def _per_vector(self, apply: Any, way: str, width: int, best: float) -> float:
        if way in self._operator.traced:  # which may go on tracing in the first call
            self.setup[way] += self._timed(partial(self._run, apply, way, width))[0]
        times: list[float] = []
        spent = 0.0
        # The first calls may be slow, so short ones are looked at again; longer ones only where
        # that may change the choice.
        while len(times) < 4 and (
            not times or spent < _SHORT or (min(times) < 1.2 * best and spent < 10 * _SHORT)
        ):
            seconds, _ = self._timed(partial(self._run, apply, way, width))
            times.append(seconds / width)
            spent += seconds
        return min(times)

    def _run(self, apply: Any, way: str, width: int) -> torch.Tensor:
        return self._operator.run(apply, probes(self._operator, width), way)

    def _timed(self, fn: Callable[[], Any]) -> tuple[float, Any]:
        _synchronize(self._operator.device)
        start = time.perf_counter()
        out = fn()
        _synchronize(self._operator.device)
        seconds = time.perf_counter() - start
        self._spent += seconds
        return seconds, out


def probes(operator: CurvatureOperator, width: int) -> torch.Tensor:
    """Return random vectors (width, D), the same every time."""
    generator = torch.Generator().manual_seed(width)
    vectors = torch.randn(
        width, operator.shape[0], generator=generator, dtype=torch.float32, device="cpu"
    )
    return vectors.to(operator.device, operator.dtype)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
