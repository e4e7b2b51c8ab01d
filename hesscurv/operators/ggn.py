"""The generalised Gauss-Newton matrix of the mean loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from hesscurv.objective.data.samples import num_rows
from hesscurv.operators.checks.derivative_check import Slope, random_sum
from hesscurv.operators.checks.missing_derivatives import Differentiation, of_ggn
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.ways import first_derivatives
from hesscurv.operators.ways import linearizations as ways
from hesscurv.operators.ways.linearizations import Linearization, LinearMap, Params

GAUSS_NEWTON_WAYS = {
    "retained": ways.gauss_newton_retained,
    "batched": ways.gauss_newton_batched,
    "linearized_batched": ways.gauss_newton_linearized,
    "vmapped": ways.gauss_newton_vmapped,
}


class GaussNewtonOperator(CurvatureOperator):
    """A matrix J^T C J, with the Jacobian J of some outputs and a curvature C on these.

    Only first derivatives of the model are needed. The reference way takes J v from the derivative
    of the backward pass ("retained"), which some operations do not have; then from forward mode
    ("forward"); and where that is missing too, from J by rows, a backward pass an output ("rows").
    """

    ways = tuple(GAUSS_NEWTON_WAYS)
    fallbacks = ("forward", "rows")
    loops = ("retained", "forward")
    needs_parts = True
    traced = ("linearized_batched",)

    @abstractmethod
    def parts(self, batch: Any) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], LinearMap]]:
        """Return some outputs as a function of the parameters, and their curvature at z."""

    def _linearize(self, way: str, params: tuple[Tensor, ...], batch: Any) -> Linearization:
        outputs, curvature = self.parts(batch)
        if way == "forward":
            return first_derivatives.gauss_newton_forward(outputs, curvature, params)
        if way == "rows":
            return first_derivatives.gauss_newton_rows(
                outputs, curvature, params, self._bytes_for_rows()
            )
        return GAUSS_NEWTON_WAYS[way](outputs, curvature, params)

    def _bytes_for_rows(self) -> int:
        """Return the bytes that each micro-batch's rows may take between products."""
        plan, batches = self.memory_plan, self.objective.batches
        parts = -(-num_rows(self.largest_batch) // plan.max_samples) * batches.count
        return plan.budget // (8 * (parts if plan.keep_graphs else 1))


class GGNOperator(GaussNewtonOperator):
    r"""The generalised Gauss-Newton matrix :math:`G = \sum_b (n_b / N) J_b^T C_b J_b`, by products.

    :math:`J_b` is the Jacobian of a batch's outputs in the parameters and :math:`C_b` the Hessian
    of its mean loss in the outputs. G is positive semi-definite for a convex loss, of rank at most
    samples times outputs, and equals the Hessian where the outputs are linear in the parameters;
    for cross-entropy it is the Fisher information (Martens 2020, section 9.2).

    The task must have the parts `outputs` and `loss`, as `supervised` provides. See
    `CurvatureOperator` for the arguments; ``G @ v`` costs about one gradient over the data.
    """

    def parts(self, batch: Any) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], LinearMap]]:
        """Return the outputs as a function of the parameters, and their curvature at z."""
        task = self.objective.task_parts
        return (
            lambda p: self.objective.outputs(p, batch),
            ways.output_hessian(lambda z: task.loss(z, batch)),
        )

    def needs(self, batch: Any) -> Iterable[Differentiation]:
        """Return what is differentiated on a batch, and how often."""
        return of_ggn(self.objective, batch)

    def _slope(self) -> Slope:
        def fn(params: Params, batch: Any, constants: dict[str, Tensor]) -> Tensor:
            return random_sum(self.objective.outputs(params, batch, constants))

        return Slope("the model's outputs", False, fn)

    def _check_batch(self, params: tuple[Tensor, ...], batch: Any, loss: Tensor) -> None:
        self.objective.outputs(params, batch)  # a wrong type is refused before any product
