"""Blocks of flat vectors (B, D), and as one tensor (B, *shape) for each parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscurv.operators.parameters import ParameterLayout


def cut_block(layout: ParameterLayout, block_BD: Tensor) -> tuple[Tensor, ...]:
    """Return the parameters' pieces of a block: views (B, *shape) where strides allow."""
    spans = zip(layout.slices().values(), layout.shapes, strict=True)
    return tuple(block_BD[:, span].reshape(len(block_BD), *shape) for span, shape in spans)


def put_block(
    layout: ParameterLayout, out_BD: Tensor, pieces: tuple[Any, ...], weight: float, add: bool
) -> None:
    """Write weight x pieces to a block, or add it.

    Args:
        layout: Where each piece lies.
        out_BD: The block to write to.
        pieces: One tensor (B, *shape) per parameter, None where it is zero.
        weight: The factor.
        add: Whether to add to the block instead.
    """
    for span, piece in zip(layout.slices().values(), pieces, strict=True):
        target = out_BD[:, span]
        if piece is None:
            if not add:
                target.zero_()
            continue
        entries = piece.detach().reshape(target.shape)
        if add:
            target.add_(entries, alpha=weight)
        else:
            torch.mul(entries, weight, out=target)
