"""The Hessian of the mean loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hesscurv.objective.tasks import map_tensors, tensors_of
from hesscurv.operators.checks.missing_derivatives import Differentiation, of_hessian
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.ways import linearizations as ways
from hesscurv.operators.ways.linearizations import Block, Linearization, Product
from hesscurv.operators.ways.tracing import PlainZeros

_WAYS = {
    "retained": ways.hessian_retained,
    "batched": ways.hessian_batched,
    "linearized": ways.hessian_linearized,
    "linearized_batched": ways.hessian_linearized_batched,
    "vmapped": ways.hessian_vmapped,
}


class HessianOperator(CurvatureOperator):
    r"""The Hessian :math:`H = \nabla^2 \sum_b (n_b / N) L_b(w)` of the mean loss, by products.

    ``H @ v`` costs one to two gradients over the data; see `CurvatureOperator` for the arguments.
    The model may be any whose loss is twice differentiable: any callable
    ``(model, batch) -> scalar mean loss`` serves as the task, and a closure without batches too.

    Ways of computing: "retained" (double backward through one graph of the gradient, also the
    reference), "batched" (the same, vectors at once), "linearized" and "linearized_batched" (a
    trace of the gradient's derivative), "vmapped" (forward over reverse, nothing retained),
    "compiled" (the same through torch.compile; tried by itself on GPUs alone).

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
        >>> task = supervised(torch.nn.MSELoss())
        >>> H = HessianOperator(net, task, [(x, torch.zeros(2, 1).double())])
        >>> H @ torch.ones(2).double()
        tensor([1., 4.], dtype=torch.float64)
    """

    ways = tuple(_WAYS)
    extra_ways = ("compiled",)
    loops = ("retained", "linearized")
    traced = ("linearized", "linearized_batched", "compiled")

    def _linearize(self, way: str, params: tuple[Tensor, ...], batch: Any) -> Linearization:
        if way == "compiled":
            return self._compiled_product(params, batch)
        return _WAYS[way](lambda p: self.objective.loss(p, batch), params)

    def needs(self, batch: Any) -> Iterable[Differentiation]:
        """Return what is differentiated on a batch, and how often."""
        return of_hessian(self.objective, batch)

    def _compiled_product(self, params: tuple[Tensor, ...], batch: Any) -> Linearization:
        """Trace forward over reverse to a plain graph of tensor operations, and compile that.

        The traced graph has weights, buffers and batch as arguments, so that it serves all batches
        of a shape and later weights too; and nothing in it is more than torch.compile can take.
        """
        tensors, frame = tensors_of(batch), repr(map_tensors(batch, lambda t: (t.shape, t.dtype)))
        constants = self.objective.constants
        count = len(params)

        def product(*flat: Tensor) -> Any:
            left = iter(flat[2 * count :])
            others = {name: next(left) for name in constants}
            same = map_tensors(batch, lambda _: next(left))
            with PlainZeros():
                return ways.hessian_vmapped(
                    lambda p: self.objective.loss(p, same, others), flat[:count]
                )(flat[count : 2 * count])

        def apply(block: Block) -> Product:
            flags = tuple(m.training for m in self.objective.model.modules())
            key = (frame, flags, block[0].shape[0])
            arguments = (*params, *block, *constants.values(), *tensors)
            if key not in self._compiled:
                self._compiled[key] = torch.compile(make_fx(product)(*arguments), dynamic=False)
            return self._compiled[key](*arguments)

        return apply
