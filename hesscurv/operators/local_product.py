"""Products with the curvature of the micro-batches of this process, each in a given way."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from hesscurv.objective.data.samples import num_rows
from hesscurv.objective.memory import MemoryPlan
from hesscurv.objective.micro_batches import MicroBatches
from hesscurv.objective.running.environment import differentiable
from hesscurv.operators.blocks import BlockCutter, put_block
from hesscurv.operators.checks.agreement import Combination
from hesscurv.operators.ways.linearization import Linearization
from hesscurv.operators.ways.way import Curvature, Way, on_batch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LocalProduct:
    """What multiplies vectors by the curvature of one micro-batch, and what is kept for the next.

    It knows nothing of ranks, of checks, of timing and of the choice among the ways: those take it.

    Args:
        curvature: The kind of curvature, of an objective whose values are taken.
        gpu_ways: Whether the ways for GPUs are among those that are tried.

    Attributes:
        micro_batches: How batches are cut.
        ways: The names of the ways that are tried; the first is the reference.
        fallbacks: The names of the references that are left, should it fail.
        own_weight: The weight of this rank's batches.
        total_weight: The weight of all ranks' batches, by which micro-batches are weighted.
        changed: Called with "reference", "plan" or "micro-batches" after that has changed.
    """

    def __init__(self, curvature: Curvature, gpu_ways: bool) -> None:
        self.curvature, self.objective = curvature, curvature.objective
        self.layout = self.objective.layout
        self.micro_batches = MicroBatches(self.objective)
        known = (*curvature.ways, *curvature.gpu_ways, *curvature.fallbacks)
        self._ways = {way.name: way for way in known}
        tried = curvature.ways + (curvature.gpu_ways if gpu_ways else ())
        self.ways: tuple[str, ...] = tuple(way.name for way in tried)
        self.fallbacks = tuple(way.name for way in curvature.fallbacks)
        self.own_weight = self.total_weight = 0.0
        self.changed: Callable[[str], None] = lambda what: None
        self._cutter = BlockCutter(self.layout)
        self._kept: dict[tuple[int, str], Linearization] = {}

    def __getitem__(self, name: str) -> Way:
        """Return a way by its name."""
        return self._ways[name]

    @property
    def reference(self) -> str:
        """The way that all others must agree with."""
        return self.ways[0]

    @property
    def plan(self) -> MemoryPlan:
        """How much goes through a product at once."""
        return self.micro_batches.plan

    def shares(self) -> Iterator[tuple[int, Any, float]]:
        """Yield number, samples and share in the mean of all that goes through at once."""
        return self.micro_batches.shares(self.total_weight)

    def describe(self, index: int) -> str:
        """Say which micro-batch a number is, for messages."""
        return self.micro_batches.describe(index, self.total_weight)

    # -- products -------------------------------------------------------------------------------

    def multiply_into(
        self,
        out_BD: Tensor,
        way: str,
        apply: Linearization,
        vectors_BD: Tensor,
        weight: float,
        chunk: int,
        *,
        add: bool,
        seen: Combination | None = None,
    ) -> None:
        """Write weight x one batch's products to `out`, or add it, `chunk` vectors at once.

        Where they are to be compared, `seen` takes them in.
        """

        def multiply() -> None:
            start = 0
            while start < len(vectors_BD):
                size = 1 if self[way].looped else min(chunk, self.plan.max_vectors)
                part_BD = vectors_BD[start : start + size]
                try:
                    product = self._cutter.apply(apply, part_BD)
                except torch.OutOfMemoryError:
                    if len(part_BD) == 1:
                        raise
                    product = None
                if product is not None:
                    if seen is not None:
                        seen.add(part_BD, product)
                    put_block(self.layout, out_BD[start : start + size], product, weight, add)
                    start += size
                    continue
                # Out of the handler, which keeps the failed frames' tensors alive.
                plan = self.plan.with_fewer_vectors(len(part_BD) // 2)
                self.micro_batches.plan = plan
                _empty_cache(self.objective.device)
                logger.warning("out of memory: going on with %d vectors at once", plan.max_vectors)

        # Checkpointed models run their forward again inside a backward pass, so wherever the model
        # as found would compute something else, it has to be put into its mode here too.
        graph = not self[way].traced and not self.objective.computes_as_found()
        if graph or self[way].runs_model_code:
            self.objective.run(multiply, compiling=way == "compiled")
            return
        with differentiable(self.objective.device, self.objective.precision):
            multiply()

    def prepare(self, batch: Any, way: str) -> Linearization:
        """Set one batch's product up, without keeping it."""
        params, room = self.objective.parameters(), self._room()
        return self.objective.run(lambda: self.curvature.linearize(self[way], params, batch, room))

    def prepared(self, index: int, batch: Any, way: str) -> Linearization:
        """Return what is kept for a micro-batch, or set it up and keep it."""
        if (index, way) in self._kept:
            return self._kept[index, way]
        apply = self.prepare(batch, way)
        self.keep(way, apply, index)
        return apply

    def keep(self, way: str, apply: Linearization, index: int = 0) -> None:
        """Keep what was set up for a micro-batch, as long as weights and memory allow."""
        if self.plan.keep_graphs and self.objective.batches.kept is not None:
            self._kept[index, way] = apply

    def apply(self, apply: Linearization, vectors_BD: Tensor, way: str) -> Tensor:
        """Apply what `prepare` returned to vectors (B, D), uncounted and unweighted."""
        out_BD = torch.empty_like(vectors_BD)
        self.multiply_into(out_BD, way, apply, vectors_BD, 1.0, len(vectors_BD), add=False)
        return out_BD

    def product_on(self, batch: Any, vectors_BD: Tensor, way: str | None = None) -> Tensor:
        """Return one batch's curvature times vectors (B, D), in the reference way by default."""
        way = way or self.reference
        with on_batch(way, batch):
            return self.apply(self.prepare(batch, way), vectors_BD, way)

    # -- what is kept ---------------------------------------------------------------------------

    def take_reference(self, way: str) -> None:
        """Let products agree with another way from here on, the first one having failed."""
        failed = self.reference
        self.ways = (way, *(w for w in self.ways if w not in (way, failed)))
        self.drop_graphs()
        self.changed("reference")

    def drop(self, index: int, way: str) -> None:
        """Give up what is kept for a micro-batch in one way."""
        self._kept.pop((index, way), None)

    def drop_graphs(self) -> None:
        """Give up all that is kept."""
        traced = any(self[way].traced for _, way in self._kept)
        self._kept.clear()
        if traced:  # a recorded graph is a cycle, which else would stay a while
            gc.collect()

    def within_memory(self, fn: Callable[[], T]) -> T:
        """Run, with less at once each time that memory runs out."""
        while True:
            try:
                return fn()
            except torch.OutOfMemoryError:
                pass  # and leave the handler, which keeps the failed frames' tensors alive
            self.drop_graphs()
            _empty_cache(self.objective.device)
            self.changed("micro-batches" if self.micro_batches.shrink() else "plan")

    def _room(self) -> int:
        """Return the bytes that each micro-batch's set-up may keep between products."""
        batches, largest = self.objective.batches, self.micro_batches.largest
        rows = 1 if largest is None else num_rows(largest)
        parts = -(-rows // self.plan.max_samples) * batches.count
        return self.plan.budget // (8 * (parts if self.plan.keep_graphs else 1))


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
