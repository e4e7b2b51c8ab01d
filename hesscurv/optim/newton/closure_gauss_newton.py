"""The Gauss-Newton matrix of a closure's residuals, by products with the Jacobian both ways."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hesscurv.linalg.device_memory import memory_budget
from hesscurv.optim.newton.closure_derivatives import may_lack_derivative
from hesscurv.optim.newton.closure_hessian import ClosureHessian
from hesscurv.optim.newton.closure_loss import LossGraph

logger = logging.getLogger(__name__)


class ClosureGaussNewton(ClosureHessian):
    r"""The Gauss-Newton matrix :math:`G = 2 J^T J` of the loss :math:`||r(w)||^2`.

    J v comes from differentiating :math:`J^T c`, which is linear in c, by c (double backward), and
    :math:`J^T (J v)` from the graph of r: together less than a product with the Hessian, about one
    and a half gradients. G is positive semidefinite, and the Hessian where r = 0.

    Where an operation has no derivative of its backward pass, J v comes from the rows of J, one
    backward pass for each residual: once, where they fit into the memory budget, and otherwise for
    each product.

    Args:
        graph: What `ClosureLoss.differentiate` returned for residuals.
        vectorize: As for `ClosureHessian`.

    References:
        Nocedal, Wright, "Numerical optimization", 2nd edition, section 10.3. Martens, "Deep
        learning via Hessian-free optimization", ICML 2010.
    """

    def __init__(self, graph: LossGraph, *, vectorize: bool = True) -> None:
        super().__init__(graph, vectorize=vectorize)
        if graph.residuals is None:
            raise ValueError("expected a closure that returns residuals, got one with a loss")
        self._residuals = graph.residuals.values
        self._cotangent = graph.residuals.cotangent
        pullback = graph.residuals.pullback
        self._by_rows = pullback is None
        self._slopes = graph.slopes if pullback is None else pullback
        self._active = list(range(len(self._slopes)))
        self._rows: list[Tensor] | None = None

    def _differentiate(self, pieces: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        along = self._along(pieces, batched)
        return torch.autograd.grad(
            self._residuals,
            self._params,
            2 * along,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )

    def _along(self, pieces: Sequence[Tensor], batched: bool) -> Tensor:
        """Return J v, for several v where `batched`."""
        if not self._by_rows:
            try:
                (along,) = torch.autograd.grad(
                    self._slopes,
                    self._cotangent,
                    pieces,
                    retain_graph=True,
                    is_grads_batched=batched,
                )
                return along
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if batched or not may_lack_derivative(error):
                    raise
                logger.info("products are computed from the Jacobian's rows: %s", error)
                self._by_rows = True
        blocks = pieces if batched else [piece.unsqueeze(0) for piece in pieces]
        flat = [block.reshape(len(block), -1) for block in blocks]
        if self._rows is None and self._fits():
            columns = list(zip(*self._each_row(), strict=True))
            self._rows = [torch.stack(column) for column in columns]
        if self._rows is not None:
            terms = [v @ rows.mT for v, rows in zip(flat, self._rows, strict=True)]
            out = torch.stack(terms).sum(0)
        else:
            each = [
                torch.stack([v @ piece for v, piece in zip(flat, row, strict=True)]).sum(0)
                for row in self._each_row()
            ]
            out = torch.stack(each, dim=1)
        return out if batched else out[0]

    def _each_row(self) -> Iterator[list[Tensor]]:
        """Yield the row of J of each residual, one flat tensor for each parameter."""
        unit = torch.zeros_like(self._residuals)
        for i in range(len(unit)):
            unit[i] = 1
            found = torch.autograd.grad(
                self._residuals, self._params, unit, retain_graph=True, allow_unused=True
            )
            unit[i] = 0
            yield [
                p.new_zeros(p.numel()) if piece is None else piece.reshape(-1)
                for p, piece in zip(self._params, found, strict=True)
            ]

    def _fits(self) -> bool:
        size = sum(p.numel() * p.element_size() for p in self._params)
        return size * len(self._residuals) <= memory_budget(self.device, None) // 2
