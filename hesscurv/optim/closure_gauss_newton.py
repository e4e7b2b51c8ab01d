"""The Gauss-Newton matrix of a closure's residuals, by products with the Jacobian both ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesscurv.optim.closure_hessian import ClosureHessian
from hesscurv.optim.closure_loss import LossGraph


class ClosureGaussNewton(ClosureHessian):
    r"""The Gauss-Newton matrix :math:`G = 2 J^T J` of the loss :math:`||r(w)||^2`.

    J v comes from differentiating :math:`J^T c`, which is linear in c, by c (double backward), and
    :math:`J^T (J v)` from the graph of r: together less than a product with the Hessian, about one
    and a half gradients. G is positive semidefinite, and the Hessian where r = 0.

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
        self._slopes = graph.residuals.pullback
        self._active = list(range(len(self._slopes)))

    def _differentiate(self, pieces: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        (along,) = torch.autograd.grad(
            self._slopes, self._cotangent, pieces, retain_graph=True, is_grads_batched=batched
        )
        return torch.autograd.grad(
            self._residuals,
            self._params,
            2 * along,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
