"""Element-wise operations on many tensors at once, a few kernels whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def apply_foreach(
    operation: Callable[[Any, Any], Any], targets: Sequence[Tensor], others: Sequence[Tensor]
) -> None:
    """Apply an operation of torch's ``_foreach_*`` family, in place, to pairs of tensors.

    CUDA takes a whole list in one launch if all of it has one dtype, and both tensors of a pair
    have the same strides; with a single pair that differs it takes all of them one by one. So pairs
    that differ in either get a list of their own.

    Args:
        operation: Such as `torch._foreach_add_`.
        targets: What is changed.
        others: One for each, of its shape.
    """
    groups: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for target, other in zip(targets, others, strict=True):
        plain = target.is_contiguous() and other.is_contiguous()
        groups.setdefault((target.dtype, other.dtype, plain), []).append((target, other))
    for pairs in groups.values():
        operation([target for target, _ in pairs], [other for _, other in pairs])


def cast_alike(tensors: Sequence[Tensor], models: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in the dtype and memory format of others, those that have both as they are.

    Args:
        tensors: Any.
        models: One for each, of its shape.
    """
    out = list(tensors)
    odd = [
        i
        for i, (t, model) in enumerate(zip(tensors, models, strict=True))
        if t.dtype != model.dtype or not (t.is_contiguous() and model.is_contiguous())
    ]
    for i in odd:
        out[i] = torch.empty_like(models[i])
    apply_foreach(torch._foreach_copy_, [out[i] for i in odd], [tensors[i] for i in odd])
    return out
