"""The Hessian of a closure's loss, by products through the graph of its gradient."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from hesscurv.linalg.precision import full_precision
from hesscurv.objective.parameters import layout_of
from hesscurv.objective.running.environment import without_fallback_warnings
from hesscurv.operators.blocks import BlockCutter
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.optim.newton.closure_loss import LossGraph

logger = logging.getLogger(__name__)

# Vectors at once. On one core 8 took a half to a quarter of the time per vector on small networks,
# and as long as one by one on large ones, where more took longer.
_AT_ONCE = 8
_AGREEMENT = 1e-3  # of one product both ways, relative; rounding makes far less


class ClosureHessian(LinearOperator):
    r"""The Hessian :math:`H = \nabla^2 L(w)` at the point where a closure was differentiated.

    ``H v = \nabla (\nabla L \cdot v)``: each vector is pulled back through the gradient's graph
    (Pearlmutter 1994), which costs about two gradients.

    Args:
        graph: What `ClosureLoss.differentiate` returned; kept alive for as long as this is.
        vectorize: Whether up to 8 vectors of a block go through the graph at once (vmap), in the
            memory of as many backward passes. Where an operation has no rule for that, or the first
            such product differs from that of one vector alone, they go one by one.
    """

    def __init__(self, graph: LossGraph, *, vectorize: bool = True) -> None:
        flat, self._params = graph.layout, graph.params
        super().__init__(flat.numel, flat.dtype, flat.device)
        self._sizes, self._vectorize, self._checked = flat.sizes, vectorize, False
        self._cutter = BlockCutter(layout_of({str(i): p for i, p in enumerate(self._params)}))
        # Where the loss is linear in a parameter, its slope has no graph.
        self._active = [i for i, slope in enumerate(graph.slopes) if slope.requires_grad]
        self._slopes = [graph.slopes[i] for i in self._active]

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        if not self._slopes:
            return torch.zeros_like(vectors_DB)
        with full_precision(self.device):
            parts = [self._several(part_BD) for part_BD in vectors_DB.mT.split(_AT_ONCE)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).mT

    def _several(self, block_BD: Tensor) -> Tensor:
        if self._vectorize and len(block_BD) > 1:
            products_BD = self._at_once(block_BD)
            if products_BD is not None:
                return products_BD
            self._vectorize = False
        rows = [self._products(row_1D, batched=False) for row_1D in block_BD.split(1)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _differentiate(self, pieces: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        """Return a product's part for each parameter, from the vector's for those with a graph."""
        return torch.autograd.grad(
            self._slopes,
            self._params,
            pieces,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )

    def _products(self, block_BD: Tensor, *, batched: bool) -> Tensor:
        """Return the products of some rows: all at once, or of the only one."""

        def product(block: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
            pieces = [block[i].to(self._params[i].dtype) for i in self._active]
            pieces = pieces if batched else [piece[0] for piece in pieces]
            return tuple(self._differentiate(pieces, batched))

        count = len(block_BD)
        parts = zip(self._cutter.apply(product, block_BD), self._sizes, strict=True)
        rows = [
            block_BD.new_zeros(count, size)
            if part is None
            else part.reshape(count, size).to(self.dtype)
            for part, size in parts
        ]
        return torch.cat(rows, dim=1)

    def _at_once(self, block_BD: Tensor) -> Tensor | None:
        """Return all products, or None where vmap does not work, or gives others."""
        try:
            with without_fallback_warnings():
                products_BD = self._products(block_BD, batched=True)
        except RuntimeError as error:  # no rule for an operation, or no memory
            logger.info("products are computed one by one: %s", error)
            return None
        if not self._checked:
            alone_D = self._products(block_BD[:1], batched=False)[0]
            gap = torch.linalg.vector_norm(products_BD[0] - alone_D)
            if not bool(gap <= _AGREEMENT * torch.linalg.vector_norm(alone_D)):
                logger.info("products are computed one by one: at once they come out otherwise")
                return None
            self._checked = True
        return products_BD
