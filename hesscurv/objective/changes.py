"""Detection of changes to a model, its data and its task."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed.sharded import own_shard
from hesscurv.objective.data.samples import leaves_of


class Written:
    """Versions of tensors and plain values; equal to a later instance if nothing was written.

    The tensors are kept alive, since the address of a freed one is soon reused.

    Args:
        tensors: The tensors; writes are detected by autograd's version counters.
        values: Numbers, strings and the like.
    """

    def __init__(self, tensors: Iterable[Tensor], values: Iterable[Any] = ()) -> None:
        self._tensors = tuple(tensors)
        self._versions = tuple(0 if t.is_inference() else t._version for t in self._tensors)
        self._values = tuple(values)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same tensors, unmodified in between, and equal values."""
        return (
            isinstance(other, Written)
            and len(self._tensors) == len(other._tensors)
            and all(a is b for a, b in zip(self._tensors, other._tensors, strict=True))
            and self._versions == other._versions
            and self._values == other._values
        )

    __hash__ = None  # type: ignore[assignment]


def marks_of_batches(batches: Iterable[Any]) -> Written:
    """Return the marks of a list of batches."""
    leaves = [leaf for batch in batches for leaf in leaves_of(batch)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return Written(tensors, [leaf for leaf in leaves if not isinstance(leaf, Tensor)])


def marks_of_task(task: Any) -> Written:
    """Return the marks of a `Task`: its tensors and modules, and the options of torch's losses.

    Other callables have none, since their contents may change with every call.
    """
    tensors: list[Tensor] = []
    values: list[Any] = []
    waiting = list(vars(task).values()) if hasattr(task, "sample_losses") else []
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor):
            tensors.append(part)
        elif isinstance(part, functools.partial):
            waiting += [part.func, *part.args, *part.keywords.values()]
            values += [(k, v) for k, v in part.keywords.items() if _is_plain(v)]
        elif isinstance(part, nn.Module):
            tensors += [*part.parameters(), *part.buffers()]
            if type(part).__module__.startswith("torch.nn"):
                values += [(k, v) for k, v in vars(part).items() if _is_plain(v)]
    return Written(tensors, values)


def marks_of_model(model: nn.Module, training: bool | None) -> tuple[Any, ...]:
    """Return the marks of a model that need no read of any value.

    Args:
        model: The model.
        training: None if each module's own mode applies.
    """
    tensors = map(own_shard, [*model.parameters(), *model.buffers()])
    marks: tuple[Any, ...] = tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors
    )
    if training is None:
        marks += tuple(m.training for m in model.modules())
    return marks


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
