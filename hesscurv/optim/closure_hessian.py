"""The Hessian of a closure's loss, by products through the graph of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscurv.linalg.precision import full_precision
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.optim.closure_loss import LossGraph


class ClosureHessian(LinearOperator):
    r"""The Hessian :math:`H = \nabla^2 L(w)` at the point where a closure was differentiated.

    ``H v = \nabla (\nabla L \cdot v)``: the graph of the gradient is pulled back once for each
    vector (Pearlmutter 1994), which costs about two gradients.

    Args:
        graph: What `ClosureLoss.differentiate` returned; kept alive for as long as this is.
        vectorize: Whether the vectors of a block go through the graph at once: faster where small
            tensors or a GPU's launches make the time, slower on large ones; and where an operation
            has no batching rule, it fails.
    """

    def __init__(self, graph: LossGraph, *, vectorize: bool = False) -> None:
        self._layout = graph.layout
        super().__init__(self._layout.numel, self._layout.dtype, self._layout.device)
        self._params, self._vectorize = graph.params, vectorize
        # Where the loss is linear in a parameter, its slope has no graph.
        self._active = [i for i, slope in enumerate(graph.slopes) if slope.requires_grad]
        self._slopes = [graph.slopes[i] for i in self._active]

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        if not self._slopes:
            return torch.zeros_like(vectors_DB)
        with full_precision(self.device):
            if self._vectorize and vectors_DB.shape[1] > 1:
                return self._at_once(vectors_DB)
            columns = [self._product(vector_D) for vector_D in vectors_DB.unbind(1)]
        return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, dim=1)

    def _product(self, vector_D: Tensor) -> Tensor:
        pieces = self._layout.split(vector_D)
        products = torch.autograd.grad(
            self._slopes,
            self._params,
            [pieces[i].to(self._params[i].dtype) for i in self._active],
            retain_graph=True,
            allow_unused=True,
        )
        return self._layout.flatten(products)

    def _at_once(self, vectors_DB: Tensor) -> Tensor:
        parts = vectors_DB.split(self._layout.sizes)
        blocks = [
            part.mT.reshape(-1, *p.shape).to(p.dtype)
            for part, p in zip(parts, self._params, strict=True)
        ]
        products = torch.autograd.grad(
            self._slopes,
            self._params,
            [blocks[i] for i in self._active],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        rows = [
            vectors_DB.new_zeros(vectors_DB.shape[1], p.numel())
            if product is None
            else product.reshape(vectors_DB.shape[1], -1).to(self.dtype)
            for p, product in zip(self._params, products, strict=True)
        ]
        return torch.cat(rows, dim=1).mT
