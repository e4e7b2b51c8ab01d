"""The empirical Fisher matrix: the mean outer product of per-sample gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscurv.operators import linearizations as ways
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.derivative_check import Slope, random_sum
from hesscurv.operators.ggn import GAUSS_NEWTON_WAYS
from hesscurv.operators.linearizations import Linearization
from hesscurv.operators.weighted_rows import WeightedRows


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
    """

    ways = tuple(GAUSS_NEWTON_WAYS)
    loops = ("retained",)
    needs_parts = True
    traced = ("linearized_batched",)

    def _linearize(self, way: str, params: tuple[Tensor, ...], batch: Any) -> Linearization:
        rows = WeightedRows(self.objective.task_parts, batch)
        return GAUSS_NEWTON_WAYS[way](
            lambda p: self._scaled_losses(p, batch, rows), ways.scaled_identity, params
        )

    def _slope(self) -> Slope:
        def fn(params: tuple[Tensor, ...], batch: Any, constants: dict[str, Tensor]) -> Tensor:
            rows = WeightedRows(self.objective.task_parts, batch)
            return random_sum(self._sample_losses(params, batch, rows, constants))

        return Slope("the samples' losses", False, fn)

    def _scaled_losses(self, params: tuple[Tensor, ...], batch: Any, rows: WeightedRows) -> Tensor:
        """Return the samples' losses, times the roots of their weights: F is of their Jacobian."""
        losses = self._sample_losses(params, batch, rows)
        if rows.weights is None:
            return losses
        return losses * rows.weights.sqrt().to(losses.device, losses.dtype)

    def _sample_losses(
        self,
        params: tuple[Tensor, ...],
        batch: Any,
        rows: WeightedRows,
        constants: dict[str, Tensor] | None = None,
    ) -> Tensor:
        losses = rows.losses(self.objective.outputs(params, batch, constants))
        if losses.ndim != 1:
            raise ValueError(
                f"expected sample_losses of shape (n,), got {tuple(losses.shape)}; give one loss a "
                "sample in a subclass of hesscurv.Task"
            )
        return losses

    def _check_batch(self, params: tuple[Tensor, ...], batch: Any, loss: Tensor) -> None:
        rows = WeightedRows(self.objective.task_parts, batch)
        losses = self._sample_losses(params, batch, rows)
        if rows.weights is not None:
            losses = losses * rows.weights.to(losses.device, losses.dtype)
        mean = losses.mean()
        tolerance = 1e3 * torch.finfo(self.dtype).eps
        if not torch.isclose(mean, loss, rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"expected per-sample losses with the loss as their mean, {loss.item():.6g}, got "
                f"{mean.item():.6g}; this loss is no plain mean over samples (class weights, "
                "ignored targets): override sample_losses and weight in a subclass of hesscurv.Task"
            )
