"""The two ways in which a preconditioner enters an optimizer's step: gradient, or update."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hesscurv.distributed.sharded import own_shard
from hesscurv.optim.flat_parameters import FlatParameters
from hesscurv.optim.low_rank_preconditioner import LowRankPreconditioner


def damp_gradient(flat: FlatParameters, P: LowRankPreconditioner, step: Callable[[], None]) -> None:
    """Step along P g, which takes the place of `.grad` meanwhile.

    Parameters without a gradient stay without one. A sparse gradient, of an embedding, stays what
    it is: its few rows are all that a step should touch.

    Args:
        flat: The parameters of P.
        P: The preconditioner.
        step: Takes the step.
    """
    found = [p.grad for p in flat.parameters]
    dense = [None if g is None or g.is_sparse else g for g in found]
    damped = flat.split(P.multiply_(flat.flatten(dense)))
    try:
        for i, (p, g) in enumerate(zip(flat.parameters, dense, strict=True)):
            if g is not None:
                p.grad = flat.like(i, damped[i].to(g.dtype))
        step()
    finally:
        for p, g in zip(flat.parameters, found, strict=True):
            p.grad = g


def damp_update(flat: FlatParameters, P: LowRankPreconditioner, step: Callable[[], None]) -> None:
    """Step, then multiply by P what the step has changed.

    Parameters without a gradient are left as the step leaves them, and those with a sparse one.

    Args:
        flat: The parameters of P.
        P: The preconditioner.
        step: Takes the step.
    """
    moving = [p if p.grad is not None and not p.grad.is_sparse else None for p in flat.parameters]
    less_D = flat.flatten(moving)
    step()
    moved = [
        (own_shard(p), part, first)
        for p, part, first in zip(moving, flat.split(less_D), flat.offsets, strict=True)
        if p is not None
    ]
    if not moved:
        return
    # What was there less what is: the update's negative.
    torch._foreach_sub_([part for _, part, _ in moved], [p for p, _, _ in moved])
    coefficients_r = P.coefficients(less_D).neg_()
    # Added where they belong; a GPU would have to be told of each parameter.
    if flat.device.type == "cpu" and all(
        p.is_contiguous() and p.dtype == flat.dtype for p, _, _ in moved
    ):
        for p, _, first in moved:
            P.add_(p.view(-1), coefficients_r, first)
        return
    P.add_(less_D.zero_(), coefficients_r)
    torch._foreach_add_([p for p, _, _ in moved], [part.to(p.dtype) for p, part, _ in moved])


DAMPED_STEPS = {"gradient": damp_gradient, "update": damp_update}
