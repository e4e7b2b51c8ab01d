"""Embeddings as pure functions: dense gradients, and no writes to the weight.

Sparse gradients have no second derivative and cannot be added to a flat vector. `max_norm` rescales
rows of the weight in place in every forward pass, and autograd ignores the rescaling; here values
and derivatives are the same, without the write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Position of the argument if passed by position.
_SPARSE_AT = {
    F.embedding: 6,
    F.embedding_bag: 7,
    torch.embedding: 4,
    torch.embedding_bag: 5,
}
_MAX_NORM_AT = {F.embedding: (3, 4), F.embedding_bag: (3, 4)}
_EMBEDDINGS = {*_SPARSE_AT}
_GATHERS = {torch.gather, torch.Tensor.gather}
# Added to the norm in the denominator by torch's `embedding_renorm_`.
_EPSILON = 1e-7


class PlainEmbeddings(TorchFunctionMode):
    """Compute embeddings with dense gradients, and `max_norm` without writing to the weight."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = with_plain_arguments(func, args, kwargs or {})
        return func(*args, **kwargs)


def with_plain_arguments(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a torch call without those that make gradients sparse or write."""
    if func in _GATHERS:
        return args, kwargs | {"sparse_grad": False} if "sparse_grad" in kwargs else kwargs
    if func not in _EMBEDDINGS:
        return args, kwargs
    given = list(args)
    _set(given, kwargs := dict(kwargs), _SPARSE_AT[func], "sparse", False)
    if func in _MAX_NORM_AT:
        at, norm_at = _MAX_NORM_AT[func]
        max_norm = _get(given, kwargs, at, "max_norm")
        if max_norm is not None:
            order = _get(given, kwargs, norm_at, "norm_type")
            weight = _get(given, kwargs, 1, "weight")
            rescaled = _rescaled(weight, max_norm, 2.0 if order is None else order)
            _set(given, kwargs, 1, "weight", rescaled)
            _set(given, kwargs, at, "max_norm", None)
    return tuple(given), kwargs


def makes_plain(module: nn.Module) -> bool:
    """Whether a module has sparse gradients or rescales its weight, by its attributes."""
    # Also custom modules that call the functions with attributes of these names.
    return getattr(module, "sparse", False) is True or isinstance(
        getattr(module, "max_norm", None), (int, float)
    )


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient in strided layout."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def _rescaled(weight: Tensor, max_norm: float, order: float) -> Tensor:
    fixed = weight.detach()
    norms = torch.linalg.vector_norm(fixed, order, dim=-1, keepdim=True)
    factors = torch.where(norms > max_norm, max_norm / (norms + _EPSILON), torch.ones_like(norms))
    # As in torch, the derivative ignores the rescaling.
    return weight + fixed * (factors - 1)


def _get(given: list[Any], kwargs: dict[str, Any], at: int, name: str) -> Any:
    return given[at] if len(given) > at else kwargs.get(name)


def _set(given: list[Any], kwargs: dict[str, Any], at: int, name: str, value: Any) -> None:
    if len(given) > at:
        given[at] = value
    elif name in kwargs:
        kwargs[name] = value
