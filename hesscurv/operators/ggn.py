"""The generalised Gauss-Newton matrix of the mean loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hesscurv.operators import linearizations as ways
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.derivative_check import Slope, random_sum
from hesscurv.operators.linearizations import Linearization

GAUSS_NEWTON_WAYS = {
    "retained": ways.gauss_newton_retained,
    "batched": ways.gauss_newton_batched,
    "linearized_batched": ways.gauss_newton_linearized,
    "vmapped": ways.gauss_newton_vmapped,
}


class GGNOperator(CurvatureOperator):
    r"""The generalised Gauss-Newton matrix :math:`G = \sum_b (n_b / N) J_b^T C_b J_b`, by products.

    :math:`J_b` is the Jacobian of a batch's outputs in the parameters and :math:`C_b` the Hessian
    of its mean loss in the outputs. G is positive semi-definite for a convex loss, of rank at most
    samples times outputs, and equals the Hessian where the outputs are linear in the parameters;
    for cross-entropy it is the Fisher information (Martens 2020, section 9.2).

    The task must have the parts `outputs` and `loss`, as `supervised` provides. See
    `CurvatureOperator` for the arguments; ``G @ v`` costs about one gradient over the data.
    """

    ways = tuple(GAUSS_NEWTON_WAYS)
    loops = ("retained",)
    needs_parts = True
    traced = ("linearized_batched",)

    def _linearize(self, way: str, params: tuple[Tensor, ...], batch: Any) -> Linearization:
        task = self.objective.task_parts
        return GAUSS_NEWTON_WAYS[way](
            lambda p: self.objective.outputs(p, batch),
            ways.output_hessian(lambda z: task.loss(z, batch)),
            params,
        )

    def _slope(self) -> Slope:
        def fn(params: tuple[Tensor, ...], batch: Any, constants: dict[str, Tensor]) -> Tensor:
            return random_sum(self.objective.outputs(params, batch, constants))

        return Slope("the model's outputs", False, fn)

    def _check_batch(self, params: tuple[Tensor, ...], batch: Any, loss: Tensor) -> None:
        self.objective.outputs(params, batch)  # a wrong type is refused before any product
