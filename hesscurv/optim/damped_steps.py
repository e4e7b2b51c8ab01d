"""The two ways in which a preconditioner enters an optimizer's step: gradient, or update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed.sharded import own_shard
from hesscurv.optim.flat_parameters import FlatParameters
from hesscurv.optim.low_rank_preconditioner import LowRankPreconditioner


def damp_gradient(flat: FlatParameters, P: LowRankPreconditioner, step: Callable[[], Any]) -> Any:
    """Step along P g, which takes the place of `.grad` meanwhile.

    Parameters without a gradient stay without one. A sparse gradient, of an embedding, stays what
    it is: its few rows are all that a step should touch.

    Args:
        flat: The parameters of P.
        P: The preconditioner.
        step: Takes the step.

    Returns:
        What `step` returned.
    """
    found = [p.grad for p in flat.parameters]
    dense = [None if g is None or g.is_sparse else g for g in found]
    damped = flat.split(P.multiply_(flat.flatten(dense)))
    try:
        for i, (p, g) in enumerate(zip(flat.parameters, dense, strict=True)):
            if g is not None:
                p.grad = flat.like(i, damped[i].to(g.dtype))
        return step()
    finally:
        for p, g in zip(flat.parameters, found, strict=True):
            p.grad = g


class DampedUpdate:
    """The weights before a step, by which what the step changes is multiplied by P after it.

    Parameters without a gradient are left as the step leaves them, and those with a sparse one.

    Args:
        flat: The parameters of P.
        within: Whether the step computes the gradients itself, so that those that are there before
            it do not tell which parameters move.
    """

    def __init__(self, flat: FlatParameters, *, within: bool = False) -> None:
        self.flat, self._within = flat, within
        self._had = [_has_dense_gradient(p) for p in flat.parameters]
        self._before_D = flat.flatten(
            p if within or had else None for p, had in zip(flat.parameters, self._had, strict=True)
        )

    def moving(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter that had a gradient, with this process's part as it was."""
        parts = zip(self.flat.parameters, self.flat.split(self._before_D), self._had, strict=True)
        yield from ((p, part) for p, part, had in parts if had)

    def finish(self, P: LowRankPreconditioner) -> None:
        """Multiply by P what has changed since; once."""
        flat, less_D = self.flat, self._before_D
        moved: list[tuple[Tensor, Tensor, int]] = []
        for p, had, part, first in zip(
            flat.parameters, self._had, flat.split(less_D), flat.offsets, strict=True
        ):
            if had or (self._within and _has_dense_gradient(p)):
                moved.append((own_shard(p), part, first))
            elif self._within:
                part.zero_()
        if not moved:
            return
        # What was there less what is: the update's negative.
        torch._foreach_sub_([part for _, part, _ in moved], [w for w, _, _ in moved])
        coefficients_r = P.coefficients(less_D).neg_()
        # Added where they belong; a GPU would have to be told of each parameter.
        if flat.device.type == "cpu" and all(
            w.is_contiguous() and w.dtype == flat.dtype for w, _, _ in moved
        ):
            for w, _, first in moved:
                P.add_(w.view(-1), coefficients_r, first)
            return
        P.add_(less_D.zero_(), coefficients_r)
        torch._foreach_add_([w for w, _, _ in moved], [part.to(w.dtype) for w, part, _ in moved])


def _has_dense_gradient(p: Tensor) -> bool:
    return p.grad is not None and not p.grad.is_sparse
