"""The Hessian of the mean loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hesscurv.objective.objective import Objective
from hesscurv.objective.tasks import map_tensors, tensors_of
from hesscurv.operators.checks.derivative_check import Slope
from hesscurv.operators.checks.missing_derivatives import Differentiation, of_hessian
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.ways.linearization import Block, Linearization, Params, Product
from hesscurv.operators.ways.linearized import hessian_linearized, hessian_linearized_batched
from hesscurv.operators.ways.retained import hessian_batched, hessian_retained
from hesscurv.operators.ways.tracing import PlainZeros
from hesscurv.operators.ways.vmapped import hessian_vmapped
from hesscurv.operators.ways.way import Curvature, Way


class HessianCurvature(Curvature):
    """Second derivatives of the loss."""

    ways = (
        Way("retained", hessian_retained, looped=True),
        Way("batched", hessian_batched),
        Way("linearized", hessian_linearized, looped=True, traced=True),
        Way("linearized_batched", hessian_linearized_batched, traced=True),
        Way("vmapped", hessian_vmapped, runs_model_code=True),
    )
    gpu_ways = (Way("compiled", hessian_vmapped, traced=True, runs_model_code=True),)

    def __init__(self, objective: Objective, name: str) -> None:
        super().__init__(objective, name)
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def linearize(self, way: Way, params: Params, batch: Any, room: int) -> Linearization:
        """Set up the product of one batch's Hessian with blocks of vectors."""
        if way.name == "compiled":
            return self._compiled_product(way, params, batch)
        return way.linearize(lambda p: self.objective.loss(p, batch), params)

    def needs(self, batch: Any) -> Iterable[Differentiation]:
        """Return what is differentiated on a batch, and how often."""
        return of_hessian(self.objective, batch)

    def slope(self) -> Slope:
        """Return the loss."""
        return Slope("the loss", True, self.objective.loss)

    def forget_compiled(self) -> None:
        """Forget compiled code."""
        self._compiled.clear()

    def _compiled_product(self, way: Way, params: Params, batch: Any) -> Linearization:
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
                return way.linearize(lambda p: self.objective.loss(p, same, others), flat[:count])(
                    flat[count : 2 * count]
                )

        def apply(block: Block) -> Product:
            flags = tuple(m.training for m in self.objective.model.modules())
            key = (frame, flags, block[0].shape[0])
            arguments = (*params, *block, *constants.values(), *tensors)
            if key not in self._compiled:
                self._compiled[key] = torch.compile(make_fx(product)(*arguments), dynamic=False)
            return self._compiled[key](*arguments)

        return apply


class HessianOperator(CurvatureOperator):
    r"""The Hessian :math:`H = \nabla^2 \sum_b (n_b / N) L_b(w)` of the mean loss, by products.

    ``H @ v`` costs one to two gradients over the data; see `CurvatureOperator` for the arguments.
    The model may be any whose loss is twice differentiable: any callable
    ``(model, batch) -> scalar mean loss`` serves as the task, and a closure without batches too.

    Ways of computing: "retained" (double backward through one graph of the gradient, also the
    reference), "batched" (the same, vectors at once), "linearized" and "linearized_batched" (a
    trace of the gradient's derivative), "vmapped" (forward over reverse, nothing retained),
    "compiled" (the same through torch.compile; tried automatically on GPUs only).

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
        >>> task = hesscurv.supervised(torch.nn.MSELoss())
        >>> H = hesscurv.HessianOperator(net, task, [(x, torch.zeros(2, 1).double())])
        >>> H @ torch.ones(2).double()
        tensor([1., 4.], dtype=torch.float64)
    """

    curvature = HessianCurvature
