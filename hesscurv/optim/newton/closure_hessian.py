"""The Hessian of a closure's loss, by products through the graph of its gradient."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from hesscurv.linalg.precision import full_precision
from hesscurv.objective.running.environment import without_fallback_warnings
from hesscurv.operators.blocks import align, is_aligned
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.optim.newton.closure_loss import LossGraph

logger = logging.getLogger(__name__)

# Vectors at once. On one core 8 took a half to a quarter of the time per vector on small networks,
# and as long as one by one on large ones, where more took longer.
_AT_ONCE = 8
_AGREEMENT = 1e-3  # of one product both ways, relative; rounding makes far less


class ClosureHessian(LinearOperator):
    r"""The Hessian :math:`H = \nabla^2 L(w)` at the point where a closure was differentiated.

    ``H v = \nabla (\nabla L \cdot v)``: the graph of the gradient is pulled back once for each
    vector (Pearlmutter 1994), which costs about two gradients.

    Args:
        graph: What `ClosureLoss.differentiate` returned; kept alive for as long as this is.
        vectorize: Whether up to 8 vectors of a block go through the graph at once (vmap). Where an
            operation has no rule for that, or the first such product is another than that of one
            vector alone, they go one by one after all. At once they take memory for as many
            backward passes.
    """

    def __init__(self, graph: LossGraph, *, vectorize: bool = True) -> None:
        self._layout = graph.layout
        super().__init__(self._layout.numel, self._layout.dtype, self._layout.device)
        self._params, self._vectorize, self._checked = graph.params, vectorize, False
        self._aligning = False  # whether the pieces of vectors are copied, see `align`
        # Where the loss is linear in a parameter, its slope has no graph.
        self._active = [i for i, slope in enumerate(graph.slopes) if slope.requires_grad]
        self._slopes = [graph.slopes[i] for i in self._active]

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        if not self._slopes:
            return torch.zeros_like(vectors_DB)
        with full_precision(self.device):
            parts = [self._several(part_Db) for part_Db in vectors_DB.split(_AT_ONCE, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _several(self, vectors_Db: Tensor) -> Tensor:
        if self._vectorize and vectors_Db.shape[1] > 1:
            products_Db = self._at_once(vectors_Db)
            if products_Db is not None:
                return products_Db
            self._vectorize = False
        columns = [self._product(vector_D) for vector_D in vectors_Db.unbind(1)]
        return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, dim=1)

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

    def _product(self, vector_D: Tensor) -> Tensor:
        pieces = self._layout.split(vector_D)
        return self._layout.flatten(
            self._aligned(
                [pieces[i].to(self._params[i].dtype) for i in self._active], batched=False
            )
        )

    def _aligned(self, pieces: list[Tensor], batched: bool) -> Sequence[Tensor | None]:
        """Differentiate; with copies of the pieces where their offsets are what hinders it."""
        if not self._aligning:
            try:
                return self._differentiate(pieces, batched)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                rows = pieces if batched else [piece.unsqueeze(0) for piece in pieces]
                if all(map(is_aligned, rows)):
                    raise
        if batched:
            copies = [align(piece) for piece in pieces]
        else:
            copies = [align(piece.unsqueeze(0))[0] for piece in pieces]
        out = self._differentiate(copies, batched)
        self._aligning = True
        return out

    def _at_once(self, vectors_Db: Tensor) -> Tensor | None:
        """Return all products, or None where that does not work, or not rightly."""
        count = vectors_Db.shape[1]
        parts = vectors_Db.split(self._layout.sizes)
        blocks = [parts[i].mT.reshape(count, *self._params[i].shape) for i in self._active]
        try:
            with without_fallback_warnings():
                products = self._aligned(
                    [
                        block.to(self._params[i].dtype)
                        for i, block in zip(self._active, blocks, strict=True)
                    ],
                    batched=True,
                )
        except RuntimeError as error:  # no rule for an operation, or no memory
            logger.info("products are computed one by one: %s", error)
            return None
        rows = [
            vectors_Db.new_zeros(count, size)
            if product is None
            else product.reshape(count, size).to(self.dtype)
            for product, size in zip(products, self._layout.sizes, strict=True)
        ]
        products_Db = torch.cat(rows, dim=1).mT
        if not self._checked:
            alone_D = self._product(vectors_Db[:, 0])
            gap = torch.linalg.vector_norm(products_Db[:, 0] - alone_D)
            if not bool(gap <= _AGREEMENT * torch.linalg.vector_norm(alone_D)):
                logger.info("products are computed one by one: at once they come out otherwise")
                return None
            self._checked = True
        return products_Db
