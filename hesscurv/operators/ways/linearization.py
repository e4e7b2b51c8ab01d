"""What the ways of computing products have in common.

Legend: a *block* is a tuple with one tensor (B, *shape) per parameter, B vectors at once. Each way
takes functions of the parameters and returns a `Linearization`, a map from block to block, ``None``
where it is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from hesscurv.operators.checks.failing_operation import CUT, is_cut, new_nodes

Params = tuple[Tensor, ...]
Block = tuple[Tensor, ...]
Product = tuple[Tensor | None, ...]
Linearization = Callable[[Block], Product]
LinearMap = Callable[[Tensor], Tensor]  # on outputs, (B, *outputs.shape) both ways


class NonFiniteLossError(ValueError):
    """The loss is NaN or infinite, so that it has no derivatives."""


def gauss_newton_with(
    push_forward: Callable[..., Tensor],
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
) -> Linearization:
    """Return J^T C J from a way of computing J v; J^T u comes through a retained graph."""
    z, pull_back = vjp(lambda *p: outputs(p), *params)  # type: ignore[misc]
    middle, back = curvature(z), vmap(pull_back)
    return lambda block: back(middle(push_forward(*block)))


def stack(rows: list[Any]) -> Product:
    """Return products of single vectors as the product of a block."""
    if len(rows) == 1:  # a view: at a million parameters, copies take their time
        return tuple(None if piece is None else piece.unsqueeze(0) for piece in rows[0])
    return tuple(
        None if columns[0] is None else torch.stack(columns) for columns in zip(*rows, strict=True)
    )


def require_whole(slopes: Sequence[Tensor | None]) -> None:
    """Refuse a backward pass that autograd would leave parts of out when it is differentiated."""
    if any(map(is_cut, new_nodes([s for s in slopes if s is not None], ()))):
        raise RuntimeError(CUT)


def require_finite(value: Tensor) -> None:
    """Refuse a loss, or losses, without derivatives.

    Raises:
        NonFiniteLossError: If an entry is NaN or infinite.
    """
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteLossError(
            f"expected a finite loss, got {value.detach().flatten()[:3].tolist()}; lower the "
            "learning rate, or look for overflow or bad inputs with "
            "torch.autograd.set_detect_anomaly(True)"
        )
