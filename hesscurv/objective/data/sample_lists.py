"""Batches that are lists of samples, as returned by collate functions for detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hesscurv.objective.data.samples import is_cuttable, mapping_like, tensors_of


def select_listed(batch: Any, n: int, which: Sequence[int]) -> Any | None:
    """Return a batch with some of the n samples that it lists; None if it has no such lists.

    Supported are a list of n samples, ``[(x_1, y_1), ...]``, two lists of inputs and targets,
    ``([x_1, ...], [y_1, ...])``, and these in a mapping. Tensors next to lists are indexed by row.

    Args:
        batch: The batch.
        n: Its number of samples.
        which: The samples to select.
    """
    if is_cuttable(batch):
        has_rows = any(t.ndim > 0 and len(t) == n for t in tensors_of(batch))
        if has_rows or not _is_sequence(batch) or any(isinstance(v, Tensor) for v in batch):
            return None
    return _select(batch, n, which) if _lists(batch, n) else None


def _lists(value: Any, n: int) -> bool:
    """Whether a batch contains a list of length n."""
    if _is_sequence(value):
        return len(value) == n or any(_lists(v, n) for v in value)
    return isinstance(value, Mapping) and any(_lists(v, n) for v in value.values())


def _select(value: Any, n: int, which: Sequence[int]) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != n:
            return value
        return value[list(which)].detach().requires_grad_(value.requires_grad)
    if _is_sequence(value):
        if len(value) == n and not _is_pair_of_lists(value, n):
            return type(value)([value[i] for i in which])
        return type(value)([_select(v, n, which) for v in value])
    if isinstance(value, Mapping):
        return mapping_like(value, {key: _select(v, n, which) for key, v in value.items()})
    return value


def _is_pair_of_lists(value: Sequence[Any], n: int) -> bool:
    """Whether two lists are inputs and targets, not two samples, which would be of one type."""
    if len(value) != 2 or not all(_is_sequence(v) and len(v) == n for v in value):
        return False
    first, second = ([(type(v), getattr(v, "ndim", 0)) for v in part] for part in value)
    return first != second


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields")
