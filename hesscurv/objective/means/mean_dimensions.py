"""Test whether a loss is a mean over a dimension other than the first."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from hesscurv.objective.data.samples import is_cuttable, map_tensors, num_rows, tensors_of
from hesscurv.objective.means.mean_findings import judge
from hesscurv.objective.memory import coarser
from hesscurv.objective.objective import Objective
from hesscurv.objective.tasks import SupervisedTask, split_batch


class OtherDimensions:
    """Searches for a second dimension of the mean, among those in which batches differ.

    Args:
        objective: The objective.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._task: Any = objective.task
        self._first: tuple[Tensor | None, Any] | None = None  # outputs and batch

    def look_at(self, out: Tensor | None, batch: Any) -> int | None:
        """Return the size of a second dimension that the loss is a mean over, or None.

        Only dimensions in which this batch differs from the first one are tried, such as sequence
        length or image size: for others the choice does not matter.
        """
        if not is_cuttable(batch):
            return None
        if self._first is None:
            self._first = out, batch
            return None
        shapes, before = self._shapes(batch), self._shapes(self._first[1])
        if list(map(len, shapes)) != list(map(len, before)):
            return None
        differing = {
            sizes
            for shape, old in zip(shapes, before, strict=True)
            for sizes in zip(shape, old, strict=True)
            if sizes[0] != sizes[1]
        }
        for now, then in sorted(differing):
            if self._is_mean_along(now, out, batch) or self._is_mean_along(then, *self._first):
                return now
        return None

    def _shapes(self, batch: Any) -> list[tuple[int, ...]]:
        """Return the trailing shapes of the targets, or of everything in a batch."""
        targets = split_batch(batch)[1] if isinstance(self._task, SupervisedTask) else batch
        n = num_rows(batch)
        return [tuple(t.shape[1:]) for t in tensors_of(targets) if t.ndim and len(t) == n]

    def _is_mean_along(self, size: int, out: Tensor | None, batch: Any) -> bool:
        n, middle = num_rows(batch), size // 2
        if n < 2 or size < 2 or size == n:
            return False
        whole = out, batch
        parts = [_cut_along(whole, size, 0, middle), _cut_along(whole, size, middle, size)]
        objective = self._objective
        try:
            with objective.environment(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                losses = [self._loss_of(*part).detach() for part in (whole, *parts)]
        except Exception:  # not supported by the model or the loss
            return False
        dtype = coarser(losses[0].dtype, objective.dtype)
        loss, *others = map(float, losses)
        judged = judge(loss, [float(middle), float(size - middle)], others, dtype)
        return judged is not None and judged.holds

    def _loss_of(self, out: Tensor | None, batch: Any) -> Tensor:
        if out is not None:
            return self._task.loss(out, batch)
        return self._objective.loss(self._objective.parameters(), batch)


def _cut_along(value: Any, size: int, start: int, stop: int) -> Any:
    """Slice each tensor along its first dimension of this size, except dimension 0."""

    def cut(t: Tensor) -> Tensor:
        if size not in t.shape[1:]:
            return t
        return t.narrow(1 + t.shape[1:].index(size), start, stop - start)

    return map_tensors(value, cut)
