"""Chunked sum of losses over many rows, with chunked first and second derivatives.

Checkpointing saves nothing here: the gradient's own graph, needed for second derivatives, would
keep what checkpointing frees. So the sum and its gradient are two autograd functions, each of which
saves only its inputs and recomputes its derivative chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

ChunkLoss = Callable[..., Tensor]


def chunked_sum(
    loss: ChunkLoss, rows_ND: Tensor, targets_N: Tensor, size: int, *weights: Tensor
) -> Tensor:
    r"""Return :math:`\sum_i \ell(h_i, y_i; w)`, twice differentiable in rows and weights.

    Args:
        loss: ``loss(rows, targets, *weights) -> scalar``, the sum over a few rows; it must not
            depend on other differentiable tensors.
        rows_ND: The rows h, shape (N, D).
        targets_N: The targets y, shape (N, ...), not differentiated.
        size: Rows per chunk.
        weights: The weights w that the loss depends on.

    Returns:
        The scalar sum.

    Cost: the loss once; its gradient, two evaluations and one gradient of it; a product with its
    second derivative, four gradients. Memory: that of `loss` for a single chunk.
    """
    total: Tensor = _Sum.apply(loss, size, targets_N, rows_ND, *weights)
    return total


class _Sum(Function):
    """The sum of the losses."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        loss: ChunkLoss, size: int, targets: Tensor, rows: Tensor, *weights: Tensor
    ) -> Tensor:
        parts = [loss(h, y, *weights) for h, y in _chunks(size, rows, targets)]
        return torch.stack(parts).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.loss, ctx.size, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        targets, *inputs = ctx.saved_tensors
        return None, None, None, *_Gradient.apply(ctx.loss, ctx.size, targets, grad, *inputs)


class _Gradient(Function):
    """The gradient of the sum in rows and weights, times a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        loss: ChunkLoss, size: int, targets: Tensor, factor: Tensor, rows: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        gradient = torch.func.grad(_scaled(loss), argnums=tuple(range(2, 3 + len(weights))))
        of_rows, totals = [], [torch.zeros_like(w) for w in weights]
        for h, y in _chunks(size, rows, targets):
            mine, *others = gradient(y, factor, h, *weights)
            of_rows.append(mine)
            totals = [total + other for total, other in zip(totals, others, strict=True)]
        return torch.cat(of_rows), *totals

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.loss, ctx.size, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor, *of_weights: Tensor) -> tuple[Tensor | None, ...]:
        targets, factor, rows, *weights = ctx.saved_tensors
        gradient = torch.func.grad(_scaled(ctx.loss), argnums=tuple(range(2, 3 + len(weights))))
        second, totals = [], [torch.zeros_like(t) for t in (factor, *weights)]
        start = 0
        for h, y in _chunks(ctx.size, rows, targets):
            pull = torch.func.vjp(lambda f, h, *w, y=y: gradient(y, f, h, *w), factor, h, *weights)
            direction = (of_rows[start : start + len(h)], *of_weights)
            for_factor, mine, *others = pull[1](direction)
            second.append(mine)
            totals = [t + o for t, o in zip(totals, (for_factor, *others), strict=True)]
            start += len(h)
        return None, None, None, totals[0], torch.cat(second), *totals[1:]


def _scaled(loss: ChunkLoss) -> ChunkLoss:
    return lambda targets, factor, rows, *weights: factor * loss(rows, targets, *weights)


def _chunks(size: int, rows: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(rows.split(size), targets.split(size), strict=True)
