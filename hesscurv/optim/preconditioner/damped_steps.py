"""The two ways in which a preconditioner enters an optimizer's step: gradient, or update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed.sharded import own_shard
from hesscurv.optim.flat_parameters import FlatParameters
from hesscurv.optim.foreach import apply_foreach, cast_alike
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner

_LARGE = 8192  # entries, above which an operation more costs less than to write and read them


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
    has = [(i, own_shard(g)) for i, g in enumerate(dense) if g is not None]
    parts = flat.split(P.multiply_(flat.flatten(dense)))
    # In the gradients' memory format too: a base that takes all parameters at once needs that.
    damped = cast_alike([parts[i] for i, _ in has], [g for _, g in has])
    try:
        for (i, _), part in zip(has, damped, strict=True):
            flat.parameters[i].grad = flat.like(i, part)
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
        moves = [
            had or (self._within and _has_dense_gradient(p))
            for p, had in zip(flat.parameters, self._had, strict=True)
        ]
        moved = [i for i, does in enumerate(moves) if does]
        if not moved:
            return
        everywhere = flat.split(less_D)
        if self._within and len(moved) < len(moves):
            torch._foreach_zero_([everywhere[i] for i, does in enumerate(moves) if not does])
        weights = [own_shard(flat.parameters[i]) for i in moved]
        parts = [everywhere[i] for i in moved]
        # What was there less what is: the update's negative.
        apply_foreach(torch._foreach_sub_, parts, cast_alike(weights, parts))
        coefficients_r = P.coefficients(less_D)
        if self._is_added_in_place(weights):
            coefficients_r.neg_()
            for w, i in zip(weights, moved, strict=True):
                P.add_(w.view(-1), coefficients_r, flat.offsets[i])
            return
        P.combine(coefficients_r, out=less_D)
        apply_foreach(torch._foreach_sub_, weights, cast_alike(parts, weights))

    def _is_added_in_place(self, weights: Sequence[Tensor]) -> bool:
        """Whether U c is added parameter by parameter where it belongs, without a buffer.

        A GPU would have to be told of each, and on a CPU it pays for large ones alone.
        """
        flat = self.flat
        return (
            flat.device.type == "cpu"
            and sum(w.numel() for w in weights) >= _LARGE * len(weights)
            and all(w.is_contiguous() and w.dtype == flat.dtype for w in weights)
        )


def _has_dense_gradient(p: Tensor) -> bool:
    return p.grad is not None and not p.grad.is_sparse
