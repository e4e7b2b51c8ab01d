"""The empirical Fisher matrix: the mean outer product of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hesscurv.operators import linearizations as ways
from hesscurv.operators.ggn import GaussNewtonOperator
from hesscurv.operators.linearizations import LinearMap, Params
from hesscurv.operators.missing_derivatives import Differentiation


class EmpiricalFisherOperator(GaussNewtonOperator):
    r"""The empirical Fisher :math:`F = \frac1N \sum_n g_n g_n^T`, by products.

    :math:`g_n` is the gradient of sample n's loss at its given target; F is positive semi-definite
    and of rank at most N. It is not the Fisher information, which takes targets from the model
    (Kunstner et al. 2019, equation 3); for that use `GGNOperator` with cross-entropy.

    It is computed as :math:`J^T J / N` with the Jacobian of the per-sample losses, so that no
    per-sample gradient is stored. The task must have the parts `outputs` and `loss`, and
    `sample_losses` where the loss is not a plain mean over samples. See `CurvatureOperator` for the
    arguments; ``F @ v`` costs about one gradient over the data.
    """

    def parts(self, batch: Any) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], LinearMap]]:
        """Return the samples' losses as a function of the parameters, and their curvature."""
        return lambda p: self._sample_losses(p, batch), ways.scaled_identity

    def needs(self, batch: Any) -> Iterable[Differentiation]:
        """Return what is differentiated on a batch, and how often."""
        return [
            Differentiation(lambda p: self._sample_losses(p, batch), self.objective.leaves(), 1)
        ]

    def _sample_losses(self, params: tuple[Tensor, ...], batch: Any) -> Tensor:
        return self._losses_of(self.objective.outputs(params, batch), batch)

    def _losses_of(self, outputs: Tensor, batch: Any) -> Tensor:
        losses = self.objective.task_parts.sample_losses(outputs, batch)
        if losses.ndim != 1:
            raise ValueError(
                f"expected sample_losses of shape (n,), got {tuple(losses.shape)}; give one loss a "
                "sample in a subclass of hesscurv.Task"
            )
        return losses

    def _check_batch(self, params: tuple[Tensor, ...], batch: Any, loss: Tensor) -> None:
        # Of the same outputs: those of a random model differ, and are refused elsewhere.
        outputs = self.objective.outputs(params, batch)
        mean = self._losses_of(outputs, batch).mean()
        loss = self.objective.task_parts.loss(outputs, batch)
        tolerance = 1e3 * torch.finfo(self.dtype).eps
        if not torch.isclose(mean, loss, rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"expected per-sample losses with the loss as their mean, {loss.item():.6g}, got "
                f"{mean.item():.6g}; this loss is no plain mean over samples (class weights, "
                "ignored targets): override sample_losses and weight in a subclass of hesscurv.Task"
            )
