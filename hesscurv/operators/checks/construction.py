"""Checks at construction: finite, deterministic, dependent on the parameters, symmetric."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.objective.objective import Objective
from hesscurv.operators.checks.embedding_gradients import cause_of_wrong_gradients
from hesscurv.operators.checks.references import AsymmetryError
from hesscurv.operators.checks.rounding_floor import rounding_floor
from hesscurv.operators.local_product import LocalProduct
from hesscurv.operators.ways.linearization import NonFiniteLossError
from hesscurv.operators.ways.way import WayError

logger = logging.getLogger(__name__)


def check_deterministic(objective: Objective, batch: Any) -> None:
    """Evaluate the loss of one batch twice and compare; two forward passes.

    Raises:
        ValueError: If the two differ by more than rounding, with the likely cause.
    """
    with objective.environment():
        params = objective.parameters()
        # Two evaluations within one environment draw different random numbers.
        first, second = (float(objective.loss(params, batch).detach()) for _ in range(2))
        active = [
            name or type(m).__name__
            for name, m in objective.model.named_modules()
            if m.training and _drops_out(m)
        ]
    tolerance = 1e2 * torch.finfo(objective.dtype).eps
    if abs(first - second) <= tolerance * max(abs(first), abs(second), tolerance):
        return
    if active:
        cause = f"dropout is active in {active[:4]}"
        remedy = "measure in eval mode, training=False (the default)"
    else:
        cause = (
            "the model or the loss draws random numbers, or keeps a state between calls "
            "(functional dropout without training=self.training, sampled latents, noise)"
        )
        remedy = "make it deterministic in eval mode, or fix its noise as part of the batch"
    raise ValueError(
        f"the loss is not deterministic: {first:.9g} and {second:.9g} on the same batch; {cause}; "
        f"{remedy}"
    )


def check_finite(loss: Tensor, index: int) -> None:
    """Require a batch's loss to be finite.

    Raises:
        NonFiniteLossError: If it is not.
    """
    if not bool(torch.isfinite(loss)):
        raise NonFiniteLossError(
            f"expected a finite loss, got {loss.item()} on batch {index}; look for bad inputs "
            "there, overflow, or diverged weights"
        )


def check_loss(objective: Objective, index: int, batch: Any) -> Tensor:
    """Evaluate a batch's loss, in an environment; embeddings that write to their weights stop it.

    Raises:
        NonFiniteLossError: If it is not finite.
        ValueError: If the forward pass writes to parameters in another way.
    """
    loss = objective.loss(objective.parameters(), batch).detach()
    if objective.find_writes():
        with objective.environment():  # in which embeddings do not write
            loss = objective.loss(objective.parameters(), batch).detach()
        objective.find_writes()
    check_finite(loss, index)
    return loss


def check_dependent(objective: Objective, batch: Any) -> None:
    """Warn where the loss does not involve the selected parameters; one gradient."""

    def depends() -> bool:
        leaves = objective.leaves()
        loss = objective.loss(leaves, batch)
        return loss.requires_grad and any(
            slope is not None for slope in torch.autograd.grad(loss, leaves, allow_unused=True)
        )

    if not objective.run(depends):
        warnings.warn(
            f"the loss does not depend on any of {list(objective.layout.names[:4])}, so its "
            "curvature there is zero; a closure must use this very model, and nothing on the way "
            "may detach or run under no_grad",
            stacklevel=6,
        )


def check_symmetric(local: LocalProduct, batch: Any) -> None:
    """Compare u.(H v) with v.(H u) for two random pairs on part of a batch; four products.

    Where both are below what rounding leaves of a flat loss, nothing is decided.

    Raises:
        WayError: If they differ by more than rounding; its error has the likely cause.
    """
    generator = torch.Generator().manual_seed(0)
    size = local.layout.numel
    probes_BD = torch.randn(4, size, generator=generator, dtype=torch.float64, device="cpu")
    probes_BD = probes_BD.to(local.objective.device, local.objective.dtype)
    products_BD = local.product_on(batch, probes_BD)
    for i in (0, 2):
        u, v, h_u, h_v = probes_BD[i], probes_BD[i + 1], products_BD[i], products_BD[i + 1]
        left, right = float(u.double() @ h_v.double()), float(v.double() @ h_u.double())
        # Each side is a sum of D products with random signs, of size |u| |Hv| / sqrt(D).
        scale = float(u.norm() * h_v.norm() + v.norm() * h_u.norm()) / (2 * size**0.5)
        # 2e-2 in float32: a derivative that is wrong somewhere is wrong by far more.
        gap = abs(left - right)
        if gap > torch.finfo(local.objective.dtype).eps ** 0.25 * scale:
            if gap <= rounding_floor(local, batch, u, v):
                logger.info(
                    "the curvature is below the rounding of %s (products of size %.2g), as that of "
                    "a loss of nearly 0 is; compute_dtype=torch.float64 shows more of it",
                    local.objective.dtype,
                    scale,
                )
                continue
            cause = cause_of_wrong_gradients(local.objective, batch)
            error = AsymmetryError(
                f"the operator is not symmetric: u.Hv = {left:.6g} but v.Hu = {right:.6g} for "
                f"random u, v; {cause}, or pass check=False to go on at your own risk"
            )
            raise WayError(local.reference, batch, error) from error


def _drops_out(module: nn.Module) -> bool:
    # Attention and recurrent layers have a probability of their own.
    rate = getattr(module, "dropout", 0)
    drops = isinstance(rate, float) and rate > 0
    return drops or isinstance(module, nn.modules.dropout._DropoutNd)
