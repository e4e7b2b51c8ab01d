"""Products through retained graphs: double backward, one vector or many at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesscurv.operators.ways.linearization import (
    Block,
    Linearization,
    LinearMap,
    Params,
    Product,
    require_finite,
    require_whole,
    stack,
)


def hessian_retained(loss: Callable[[Params], Tensor], params: Params) -> Linearization:
    """Build the gradient's graph once and pull each vector back through it (Pearlmutter 1994)."""
    return _loop(_gradient_graph(loss, params), params)


def hessian_batched(loss: Callable[[Params], Tensor], params: Params) -> Linearization:
    """Build the gradient's graph once and pull all vectors back at once."""
    return _batched(_gradient_graph(loss, params), params)


def gauss_newton_retained(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
) -> Linearization:
    """Retain the graphs of z and of u -> J^T u; J v is the latter's transpose."""
    return _gauss_newton_retained(outputs, curvature, params, batched=False)


def gauss_newton_batched(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
) -> Linearization:
    """As `gauss_newton_retained`, all vectors at once."""
    return _gauss_newton_retained(outputs, curvature, params, batched=True)


def _gradient_graph(
    loss: Callable[[Params], Tensor], params: Params
) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [p.detach().requires_grad_() for p in params]
    value = loss(tuple(leaves))
    require_finite(value)
    if not value.requires_grad:
        return [], leaves
    slopes = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    require_whole(slopes)
    return [s if s is not None and s.requires_grad else None for s in slopes], leaves  # type: ignore[misc]


def _loop(graph: tuple[list[Any], list[Tensor]], params: Params) -> Linearization:
    slopes, leaves = graph
    active = [i for i, s in enumerate(slopes) if s is not None]

    def apply(block: Block) -> Product:
        if not active:
            return (None,) * len(params)
        outs = []
        for j in range(block[0].shape[0]):
            outs.append(
                torch.autograd.grad(
                    [slopes[i] for i in active],
                    leaves,
                    [block[i][j] for i in active],
                    retain_graph=True,
                    allow_unused=True,
                )
            )
        return stack(outs)

    return apply


def _batched(graph: tuple[list[Any], list[Tensor]], params: Params) -> Linearization:
    slopes, leaves = graph
    active = [i for i, s in enumerate(slopes) if s is not None]

    def apply(block: Block) -> Product:
        if not active:
            return (None,) * len(params)
        return torch.autograd.grad(
            [slopes[i] for i in active],
            leaves,
            [block[i] for i in active],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )

    return apply


def _gauss_newton_retained(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
    *,
    batched: bool,
) -> Linearization:
    leaves = [p.detach().requires_grad_() for p in params]
    z = outputs(tuple(leaves))
    middle = curvature(z)
    if not z.requires_grad:
        return lambda block: (None,) * len(params)
    u = torch.zeros_like(z).requires_grad_()
    pulled = torch.autograd.grad(z, leaves, u, create_graph=True, allow_unused=True)
    require_whole(pulled)
    active = [i for i, p in enumerate(pulled) if p is not None]

    def pull_back(block: Tensor) -> Product:
        return torch.autograd.grad(
            z, leaves, block, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    def push_forward(pieces: list[Tensor]) -> Tensor:
        (out,) = torch.autograd.grad(
            [pulled[i] for i in active], u, pieces, retain_graph=True, is_grads_batched=batched
        )
        return out

    def apply(block: Block) -> Product:
        if batched:
            return pull_back(middle(push_forward([block[i] for i in active])))
        forward = [push_forward([block[i][j] for i in active]) for j in range(len(block[0]))]
        return stack([pull_back(middle(row.unsqueeze(0))[0]) for row in forward])

    return apply
