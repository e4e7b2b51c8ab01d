"""The empirical Fisher matrix: the mean outer product of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hesscurv.objective.weighted_rows import WeightedRows
from hesscurv.operators.checks.derivative_check import Slope, random_sum
from hesscurv.operators.checks.missing_derivatives import Differentiation
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.ggn import GaussNewtonCurvature
from hesscurv.operators.ways.linearization import LinearMap, Params
from hesscurv.operators.ways.output_curvature import scaled_identity


class FisherCurvature(GaussNewtonCurvature):
    """The samples' losses, scaled by the roots of their weights, with the identity over n."""

    def parts(self, batch: Any) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], LinearMap]]:
        """Return the samples' losses as a function of the parameters, and their curvature."""
        rows = WeightedRows(self.objective.task_parts, batch)

        def scaled_losses(params: Params) -> Tensor:
            return self._scaled_losses(self.objective.outputs(params, batch), rows)

        return scaled_losses, scaled_identity

    def output_rows(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the slopes of the samples' losses, scaled as their mean outer product is."""
        rows = WeightedRows(self.objective.task_parts, batch)
        z = outputs.detach().requires_grad_()
        losses = self._scaled_losses(z, rows)
        (slopes,) = torch.autograd.grad(losses.sum(), z)
        return slopes.unsqueeze(0) / len(losses) ** 0.5

    def needs(self, batch: Any) -> Iterable[Differentiation]:
        """Return what is differentiated on a batch, and how often."""
        outputs, _ = self.parts(batch)
        return [Differentiation(outputs, self.objective.leaves(), 1)]

    def slope(self) -> Slope:
        """Return a random sum of the samples' losses."""

        def fn(params: Params, batch: Any, constants: dict[str, Tensor]) -> Tensor:
            outputs = self.objective.outputs(params, batch, constants)
            rows = WeightedRows(self.objective.task_parts, batch)
            return random_sum(self._losses_of(outputs, rows))

        return Slope("the samples' losses", False, fn)

    def _scaled_losses(self, outputs: Tensor, rows: WeightedRows) -> Tensor:
        """Return the losses times the roots of their weights: F is of their Jacobian."""
        losses = self._losses_of(outputs, rows)
        if rows.weights is None:
            return losses
        return losses * rows.weights.sqrt().to(losses.device, losses.dtype)

    def _losses_of(self, outputs: Tensor, rows: WeightedRows) -> Tensor:
        losses = rows.losses(outputs)
        if losses.ndim != 1:
            raise ValueError(
                f"expected sample_losses of shape (n,), got {tuple(losses.shape)}; give one loss a "
                "sample in a subclass of hesscurv.Task"
            )
        return losses

    def check_batch(self, params: Params, batch: Any, loss: Tensor) -> None:
        """Refuse per-sample losses whose mean is not the loss."""
        # Of the same outputs: those of a random model differ, and are refused elsewhere.
        outputs = self.objective.outputs(params, batch)
        rows = WeightedRows(self.objective.task_parts, batch)
        losses = self._losses_of(outputs, rows)
        if rows.weights is not None:
            losses = losses * rows.weights.to(losses.device, losses.dtype)
        mean = losses.mean()
        loss = self.objective.task_parts.loss(outputs, batch)
        tolerance = 1e3 * torch.finfo(self.objective.dtype).eps
        if not torch.isclose(mean, loss, rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"expected per-sample losses with the loss as their mean, {loss.item():.6g}, got "
                f"{mean.item():.6g}; this loss is no plain mean over samples (class weights, "
                "ignored targets): override sample_losses and weight in a subclass of hesscurv.Task"
            )


class EmpiricalFisherOperator(CurvatureOperator):
    r"""The empirical Fisher :math:`F = \frac1N \sum_n g_n g_n^T`, by products.

    :math:`g_n` is the gradient of sample n's loss at its given target; F is positive semi-definite
    and of rank at most N. It is not the Fisher information, which takes targets from the model
    (Kunstner et al. 2019, equation 3); for that use `GGNOperator` with cross-entropy.

    Where the loss is a weighted mean, :math:`\sum_n w_n \ell_n / \sum_n w_n` (class weights,
    ignored targets, sequences with other numbers of tokens), so is the matrix:
    :math:`F = \sum_n w_n g_n g_n^T / \sum_n w_n`. A sample of weight 2 counts as two samples, an
    ignored one as none, however data are batched; :math:`g_n` is that of the sample alone.

    It is computed as :math:`J^T J / N` with the Jacobian of the per-sample losses, so that no
    per-sample gradient is stored. The task must have the parts `outputs` and `loss`, and
    `sample_losses` where the loss is no mean of its samples' own. See `CurvatureOperator` for the
    arguments; ``F @ v`` costs about one gradient over the data.

    Example:
        >>> F = hesscurv.EmpiricalFisherOperator(model, task, batches)
        >>> F.shape, int(torch.linalg.matrix_rank(F.to_dense())) <= 32
        (torch.Size([23, 23]), True)
    """

    curvature = FisherCurvature
