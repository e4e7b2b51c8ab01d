"""The curvature C of a loss in the model's outputs, the middle of J^T C J."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesscurv.operators.ways.linearization import LinearMap, require_finite


def output_hessian(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], LinearMap]:
    """Return z -> (u -> Hessian of the loss in the outputs, times u), for blocks of u."""

    def at(outputs: Tensor) -> LinearMap:
        z = outputs.detach().requires_grad_()
        value = loss(z)
        require_finite(value)
        (slope,) = torch.autograd.grad(value, z, create_graph=True, allow_unused=True)
        if slope is None or not slope.requires_grad:
            return torch.zeros_like

        def apply(block: Tensor) -> Tensor:
            # One at a time without vmap, for which some losses have no rule.
            many = len(block) > 1
            (out,) = torch.autograd.grad(
                slope,
                z,
                block if many else block[0],
                retain_graph=True,
                is_grads_batched=many,
                allow_unused=True,
            )
            return torch.zeros_like(block) if out is None else out.view_as(block)

        return apply

    return at


def scaled_identity(outputs: Tensor) -> LinearMap:
    """Return u -> u / n for n outputs: the curvature whose J^T C J is the empirical Fisher."""
    require_finite(outputs)
    n = outputs.numel()
    return lambda block: block / n
