"""Micro-batches: splitting of batches so that a product fits its memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from hesscurv.objective.data.batches import split
from hesscurv.objective.data.samples import describe, num_rows
from hesscurv.objective.memory import (
    MemoryPlan,
    is_mean_over_parts,
    is_mean_over_samples,
    plan_memory,
    weighed_part,
)
from hesscurv.objective.objective import Objective

logger = logging.getLogger(__name__)


class MicroBatches:
    """The micro-batches of an objective, and the number of vectors per pass.

    Args:
        objective: The objective.

    Attributes:
        plan: Sizes that keep a product within its memory.
        largest: The batch with the most samples, once `note` has seen them all.
        separable: Whether batches may be split: their loss is the mean of their parts' losses.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.plan = MemoryPlan(objective.budget)
        self.largest: Any = None
        self.separable = False
        self._weights: dict[int, list[float]] = {}  # weights of kept batches, by number
        self._weighed: tuple[Any, ...] = ()  # the batches and plan of these weights

    def note(self, batch: Any) -> None:
        """Remember the largest of the batches that count."""
        if self.largest is None or num_rows(batch) > num_rows(self.largest):
            self.largest = batch

    def make_plan(self, checking: bool) -> None:
        """Decide whether batches may be split, and plan the memory, by a few forward passes.

        Args:
            checking: Whether to test every batch that the plan would split.
        """
        self._set_separable(is_mean_over_samples(self._objective, self.largest))
        if checking and not self._may_cut(self.plan.max_samples):
            self._set_separable(False)

    def few(self, size: int) -> Any:
        """Return some samples of the largest batch, or all of it if it cannot be split."""
        if not self.separable:
            return self.largest
        return weighed_part(self._objective, self.largest, size)

    def shares(self, total_weight: float) -> Iterator[tuple[int, Any, float]]:
        """Yield number, samples and share in the mean of each micro-batch."""
        index = 0
        for number, batch in enumerate(self._objective.batches):
            own, *weights = self._weigh(number, batch)
            share = own / total_weight
            if share == 0:  # its mean would be 0 / 0
                continue
            for part, w in zip(self._cut(batch), weights, strict=True):
                if w != 0:
                    yield index, part, share * w / sum(weights)
                    index += 1

    def forget_weights(self) -> None:
        """Recompute all weights at the next pass, after a change of batches or task."""
        self._weights.clear()

    def describe(self, index: int, total_weight: float) -> str:
        """Describe a micro-batch by its number, for messages."""
        batch = next(part for i, part, _ in self.shares(total_weight) if i == index)
        return f"micro-batch {index}, {describe(batch)} with {num_rows(batch)} samples"

    def shrink(self) -> bool:
        """Reduce the plan after an out-of-memory error; return whether micro-batches changed.

        Raises:
            OutOfMemoryError: If nothing can be reduced any more.
        """
        if self.plan.keep_graphs:
            logger.warning("out of memory: going on without keeping graphs between products")
            self.plan = self.plan.without_kept_graphs()
            return False
        samples = min(self.plan.max_samples, num_rows(self.largest)) // 2
        if samples == 0 or not self.separable or not self._may_cut(samples):
            raise torch.OutOfMemoryError(
                "out of memory for a single vector on "
                + ("one sample" if samples == 0 else "one batch, which cannot be cut")
                + "; use smaller batches, a subset of the parameters, or a larger device"
            )
        logger.warning("out of memory: going on with micro-batches of %d samples", samples)
        self.plan = self.plan.with_fewer_samples(samples)
        return True

    def _cut(self, batch: Any) -> list[Any]:
        return split(batch, self.plan.max_samples) if self.separable else [batch]

    def _weigh(self, number: int, batch: Any) -> list[float]:
        """Return the weight of a batch, and the relative weights of its parts; none if it is empty.

        Cached for kept batches, since computing a weight may synchronise a GPU.
        """
        batches = self._objective.batches
        present = (batches.reads, self.separable, self.plan.max_samples)
        if self._weighed != present:
            self._weights, self._weighed = {}, present
        if number in self._weights:
            return self._weights[number]
        weights = [self._objective.weight(batch)]
        if weights[0] != 0:
            parts = self._cut(batch)
            # Each part's loss is its own mean, so parts are combined by their weights.
            weights += [self._objective.weight(p) for p in parts] if len(parts) > 1 else [1.0]
        if batches.kept is not None:
            self._weights[number] = weights
        return weights

    def _set_separable(self, separable: bool) -> None:
        self.separable = separable
        self._objective.batches.ordered = not separable
        self.plan = plan_memory(self._objective, self._objective.budget, self.largest, separable)

    def _may_cut(self, size: int) -> bool:
        """Whether every batch's loss is the mean of its parts; cheap if none has to be split."""
        return num_rows(self.largest) <= size or all(
            is_mean_over_parts(self._objective, batch, size)
            for batch in self._objective.batches
            if num_rows(batch) > size and self._objective.weight(batch)
        )
