"""The generalised Gauss-Newton matrix of the mean loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from hesscurv.operators.checks.derivative_check import Slope, random_sum
from hesscurv.operators.checks.missing_derivatives import Differentiation, of_ggn
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.sample_space.output_rows import root_columns
from hesscurv.operators.ways.first_derivatives import gauss_newton_forward, gauss_newton_rows
from hesscurv.operators.ways.linearization import Linearization, LinearMap, Params
from hesscurv.operators.ways.linearized import gauss_newton_linearized
from hesscurv.operators.ways.output_curvature import output_hessian
from hesscurv.operators.ways.retained import gauss_newton_batched, gauss_newton_retained
from hesscurv.operators.ways.vmapped import gauss_newton_vmapped
from hesscurv.operators.ways.way import Curvature, Way


class GaussNewtonCurvature(Curvature):
    """A matrix J^T C J, with the Jacobian J of some outputs and a curvature C on these.

    Only first derivatives of the model are needed. The reference way takes J v from the derivative
    of the backward pass ("retained"), which some operations do not have; then from forward mode
    ("forward"); and where that is missing too, from J by rows, a backward pass an output ("rows").
    """

    ways = (
        Way("retained", gauss_newton_retained, looped=True),
        Way("batched", gauss_newton_batched),
        Way("linearized_batched", gauss_newton_linearized, traced=True),
        Way("vmapped", gauss_newton_vmapped, runs_model_code=True),
    )
    fallbacks = (
        Way("forward", gauss_newton_forward, looped=True, runs_model_code=True),
        Way("rows", gauss_newton_rows),
    )
    needs_parts = True

    @abstractmethod
    def parts(self, batch: Any) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], LinearMap]]:
        """Return some outputs as a function of the parameters, and their curvature at z."""

    def linearize(self, way: Way, params: Params, batch: Any, room: int) -> Linearization:
        """Set up the product of one batch's matrix with blocks of vectors."""
        outputs, curvature = self.parts(batch)
        if way.name == "rows":
            return way.linearize(outputs, curvature, params, room)
        return way.linearize(outputs, curvature, params)


class GGNCurvature(GaussNewtonCurvature):
    """The model's outputs, with the Hessian of the loss in these."""

    def parts(self, batch: Any) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], LinearMap]]:
        """Return the outputs as a function of the parameters, and their curvature at z."""
        task = self.objective.task_parts
        return (
            lambda p: self.objective.outputs(p, batch),
            output_hessian(lambda z: task.loss(z, batch)),
        )

    def output_rows(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return columns of the root of the loss's Hessian in the outputs."""
        _, curvature = self.parts(batch)
        return root_columns(curvature(outputs), outputs)

    def needs(self, batch: Any) -> Iterable[Differentiation]:
        """Return what is differentiated on a batch, and how often."""
        return of_ggn(self.objective, batch)

    def slope(self) -> Slope:
        """Return a random sum of the outputs."""

        def fn(params: Params, batch: Any, constants: dict[str, Tensor]) -> Tensor:
            return random_sum(self.objective.outputs(params, batch, constants))

        return Slope("the model's outputs", False, fn)

    def check_batch(self, params: Params, batch: Any, loss: Tensor) -> None:
        """Refuse outputs of a wrong type, before any product."""
        self.objective.outputs(params, batch)


class GGNOperator(CurvatureOperator):
    r"""The generalised Gauss-Newton matrix :math:`G = \sum_b (n_b / N) J_b^T C_b J_b`, by products.

    :math:`J_b` is the Jacobian of a batch's outputs in the parameters and :math:`C_b` the Hessian
    of its mean loss in the outputs. G is positive semi-definite for a convex loss, of rank at most
    samples times outputs, and equals the Hessian where the outputs are linear in the parameters;
    for cross-entropy it is the Fisher information (Martens 2020, section 9.2).

    The task must have the parts `outputs` and `loss`, as `supervised` provides. See
    `CurvatureOperator` for the arguments; ``G @ v`` costs about one gradient over the data.

    Example:
        >>> G = hesscurv.GGNOperator(model, task, batches)
        >>> bool((torch.linalg.eigvalsh(G.to_dense()) > -1e-12).all())
        True
    """

    curvature = GGNCurvature
