"""Timing of the ways on one micro-batch, within a share of what a faster way may save."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hesscurv.objective.objective import Objective
from hesscurv.operators.checks.agreement import agree
from hesscurv.operators.local_product import LocalProduct
from hesscurv.operators.ways.way import on_batch

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


class WayTiming:
    """Seconds per vector of the ways on one micro-batch, by the number of vectors.

    The first way is the reference: the others must agree with it. They are tried in their order, as
    long as the budget lasts, and the best of those that take vectors at once is tried at narrower
    and at wider blocks, as long as that gains.

    Args:
        local: What multiplies.
        batch: A micro-batch.
        expected: The number of products to come.

    Attributes:
        seconds: ``{way: {width: seconds per vector}}``; width 1 is a loop.
        setup: Seconds to set each way up.
        traced: The fastest of the ways with a long set-up, and what it was set up to be.
    """

    def __init__(self, local: LocalProduct, batch: Any, expected: int) -> None:
        self.seconds: dict[str, dict[int, float]] = {}
        self.setup: dict[str, float] = {}
        self._local, self._batch = local, batch
        self._widths = [w for w in WIDTHS if w <= local.plan.max_vectors]
        # GPUs are filled by wider blocks.
        first = 1 if local.objective.device.type == "cpu" else 3
        self._first_width = self._widths[min(first, len(self._widths) - 1)] if self._widths else 0
        self._few = probes(local, 2)
        self._reference: torch.Tensor | None = None
        # Graphs are large: only the best one of a kind stays.
        self._batched: tuple[str, Any] | None = None
        self.traced: tuple[str, Any] | None = None
        self._budget, self._spent = 0.0, 0.0

        reference, *others = local.ways
        with on_batch(reference, batch):
            self._try(reference)
        passes = 1 if local.plan.keep_graphs else max(1, local.objective.batches.count)
        self._budget = self._spent + _SHARE * expected * passes * self._best()
        if self._best() > _OVERHEAD:  # then one vector at once, by a better graph, gains most
            others.sort(key=lambda way: not local[way].looped)
        tracing = _TRACING * _count_operations(local.objective, batch)
        for way in others:
            if self._spent + (tracing if local[way].traced else 0.0) >= self._budget:
                continue
            try:
                self._try(way)
            except Exception as error:
                logger.info("way %r is not available here: %s", way, error)
        if self._batched is not None:
            with contextlib.suppress(torch.OutOfMemoryError):
                self._look_around(*self._batched)

    def _try(self, way: str) -> None:
        local = self._local
        best = self._best()
        setup, apply = self._timed(lambda: local.prepare(self._batch, way))
        pair, got = self._timed(lambda: local.apply(apply, self._few, way))
        self._reference = got if self._reference is None else self._reference
        if not agree(self._reference, got, precision=self._local.objective.precision):
            logger.warning("way %r disagrees with double backward; left out", way)
            return
        self.setup[way] = setup
        if local[way].looped:
            self.seconds[way] = {1: self._per_vector(apply, way, 2, pair / 2)}
        elif self._first_width and not (pair / 2 > 1.25 * best > 1.25 * _LONG_PRODUCT):
            width = self._first_width
            before = self._best(batched=True)
            self.seconds[way] = {width: self._per_vector(apply, way, width, best)}
            if self.seconds[way][width] < before:
                self._batched = way, apply
        if way == local.reference and not local[way].looped:  # for single vectors too
            self.seconds.setdefault(way, {}).setdefault(1, pair / 2)
        if local[way].traced and min(self.seconds.get(way, {0: best}).values()) < best:
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
        taken = (way for way in self.seconds if not (batched and self._local[way].looped))
        found = [min(self.seconds[way].values()) for way in taken]
        return min(found, default=float("inf"))

    def _per_vector(self, apply: Any, way: str, width: int, best: float) -> float:
        if self._local[way].traced:  # which may go on tracing in the first call
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
        return self._local.apply(apply, probes(self._local, width), way)

    def _timed(self, fn: Callable[[], Any]) -> tuple[float, Any]:
        _synchronize(self._local.objective.device)
        start = time.perf_counter()
        out = fn()
        _synchronize(self._local.objective.device)
        seconds = time.perf_counter() - start
        self._spent += seconds
        return seconds, out


def probes(local: LocalProduct, width: int) -> torch.Tensor:
    """Return random vectors (width, D), the same every time."""
    generator = torch.Generator().manual_seed(width)
    vectors = torch.randn(
        width, local.layout.numel, generator=generator, dtype=torch.float32, device="cpu"
    )
    return vectors.to(local.objective.device, local.objective.dtype)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count_operations(objective: Objective, batch: Any) -> int:
    """Count the differentiable operations of a forward pass."""
    waiting = [objective.run(lambda: objective.loss(objective.leaves(), batch)).grad_fn]
    seen = set(waiting) - {None}
    while waiting:
        node = waiting.pop()
        new = {n for n, _ in node.next_functions if n is not None} - seen if node else set()
        seen |= new
        waiting += new
    return len(seen)
