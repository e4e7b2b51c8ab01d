"""Mean loss and gradient of the objective of an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.local_product import LocalProduct


def loss_and_gradient(H: CurvatureOperator) -> tuple[float, Tensor]:
    r"""Return the loss :math:`\sum_b (n_b / N) L_b(w)` at the present weights, and its gradient.

    In the mode and dtype of the operator's products, and over all ranks' batches where there are
    many ranks: then all call it.

    Args:
        H: The operator.

    Returns:
        The loss, and the gradient (D,) in H's dtype, on its device.

    Raises:
        ValueError: If either is not finite.
        DistributedError: If another rank fails.

    Cost: one gradient over the data, no product; D floats.
    """
    H.refresh()
    objective = H.objective
    with H.communicator.together("the loss and its gradient"), torch.inference_mode(False):
        local = H.products.local
        sums_D1 = local.within_memory(lambda: _sums(local))
    H.communicator.sum_(sums_D1)
    if not bool(torch.stack(sums_D1.aminmax()).isfinite().all()):
        raise ValueError(
            "expected a finite loss and gradient, got NaN or inf; the training has diverged, or a "
            "sample of the batches is not finite"
        )
    return float(sums_D1[-1]), sums_D1[:-1].to(objective.dtype)


def _sums(local: LocalProduct) -> Tensor:
    """Return this rank's share of the gradient, with that of the loss after it, (D + 1,)."""
    objective = local.objective
    out = torch.zeros(objective.layout.numel + 1, dtype=objective.dtype, device=objective.device)

    for _, batch, weight in local.shares():

        def differentiate(batch: object = batch) -> tuple[Tensor, tuple[Tensor, ...]]:
            leaves = objective.leaves()
            loss = objective.loss(leaves, batch)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            return loss.detach(), gradients

        loss, gradients = objective.run(differentiate)
        with torch.no_grad():
            out += weight * torch.cat([g.reshape(-1) for g in (*gradients, loss)])
    return out
