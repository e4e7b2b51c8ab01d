"""Gauss-Newton products from first derivatives alone.

J^T u always comes from the graph of the outputs z. J v, which `gauss_newton_retained` takes from
the derivative of the backward pass, comes from forward mode here, or from the rows of J.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hesscurv.objective.running.plain_embeddings import dense
from hesscurv.operators.ways.linearization import Block, Linearization, LinearMap, Params, Product
from hesscurv.operators.ways.tracing import load_forward_rules


def gauss_newton_forward(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
) -> Linearization:
    """J v by running the model in forward mode for each vector, J^T u through a retained graph."""
    load_forward_rules()
    graph = _OutputGraph(outputs, params)
    middle = curvature(graph.z)

    def push_forward(tangents: tuple[Tensor, ...]) -> Tensor:
        with forward_ad.dual_level():
            # Not `torch.func.jvp`: it refuses any autograd.Function of the older style.
            duals = tuple(map(forward_ad.make_dual, params, tangents))
            tangent = forward_ad.unpack_dual(outputs(duals)).tangent
        return torch.zeros_like(graph.z) if tangent is None else tangent.detach()

    def apply(block: Block) -> Product:
        if not graph.z.requires_grad:
            return (None,) * len(params)
        rows = [push_forward(tuple(v[j] for v in block)) for j in range(len(block[0]))]
        return graph.pull_back(middle(torch.stack(rows)))

    return apply


def gauss_newton_rows(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
    keep_bytes: int = 0,
) -> Linearization:
    """J v from the rows of J, a backward pass for each output; the rest as in forward mode.

    The rows are computed once where they fit in `keep_bytes`, and then a product is two matrix
    products; otherwise once for each block of vectors, one row in memory at a time.
    """
    graph = _OutputGraph(outputs, params)
    z = graph.z
    middle = curvature(z)
    size = z.numel() * sum(p.numel() * p.element_size() for p in params)
    kept: list[Tensor] | None = None

    def apply(block: Block) -> Product:
        nonlocal kept
        if not z.requires_grad:
            return (None,) * len(params)
        count = len(block[0])
        if size > keep_bytes:
            columns = [_inner_products(block, row) for row in graph.rows()]
            return graph.pull_back(middle(torch.stack(columns, dim=1).view(count, *z.shape)))
        if kept is None:
            kept = _stack_rows(graph, params)
        # Flat: matrix products of (B, entries) with (entries, outputs), parameter by parameter.
        forward = [v.reshape(count, -1) @ rows.mT for v, rows in zip(block, kept, strict=True)]
        u = middle(torch.stack(forward).sum(0).view(count, *z.shape)).reshape(count, -1)
        return tuple((u @ rows).view_as(v) for v, rows in zip(block, kept, strict=True))

    return apply


class _OutputGraph:
    """The graph of the outputs z at some parameters, for any number of backward passes."""

    def __init__(self, outputs: Callable[[Params], Tensor], params: Params) -> None:
        self._leaves = [p.detach().requires_grad_() for p in params]
        self.z = outputs(tuple(self._leaves))

    def pull_back(self, block: Tensor) -> Product:
        """Return J^T u for several u of z's shape, one after the other."""
        found = [self._gradients(u) for u in block]
        return tuple(
            None if columns[0] is None else torch.stack(columns)
            for columns in zip(*found, strict=True)
        )

    def rows(self) -> Iterator[tuple[Tensor | None, ...]]:
        """Yield the row of J of each output, as one tensor for each parameter."""
        unit = torch.zeros_like(self.z, memory_format=torch.contiguous_format)
        entries = unit.view(-1)
        for i in range(len(entries)):
            entries[i] = 1
            yield self._gradients(unit)
            entries[i] = 0

    def _gradients(self, u: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.autograd.grad(self.z, self._leaves, u, retain_graph=True, allow_unused=True)
        return tuple(None if g is None else dense(g) for g in found)


def _inner_products(block: Block, row: tuple[Tensor | None, ...]) -> Tensor:
    found = [
        v.reshape(len(v), -1) @ piece.reshape(-1)
        for v, piece in zip(block, row, strict=True)
        if piece is not None
    ]
    return torch.stack(found).sum(0) if found else block[0].new_zeros(len(block[0]))


def _stack_rows(graph: _OutputGraph, params: Params) -> list[Tensor]:
    kept = [p.new_empty(graph.z.numel(), p.numel()) for p in params]
    for i, row in enumerate(graph.rows()):
        for rows, piece in zip(kept, row, strict=True):
            if piece is None:
                rows[i].zero_()
            else:
                rows[i].copy_(piece.reshape(-1))
    return kept
