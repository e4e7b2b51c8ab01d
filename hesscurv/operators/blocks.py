"""Blocks of flat vectors (B, D), and as one tensor (B, *shape) for each parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscurv.objective.parameters import ParameterLayout
from hesscurv.objective.running.plain_embeddings import dense


def cut_block(
    layout: ParameterLayout, block_BD: Tensor, align_pieces: bool = False
) -> tuple[Tensor, ...]:
    """Return the parameters' pieces of a block: views (B, *shape) where strides allow.

    Args:
        layout: Where each piece lies.
        block_BD: The block.
        align_pieces: Whether pieces that do not lie at an even offset are copied. A parameter's
            piece begins wherever those before it end; `view_as_complex` takes no odd offset, while
            usual models take any, and are spared the copies.
    """
    spans = zip(layout.slices().values(), layout.shapes, strict=True)
    pieces = (block_BD[:, span].reshape(len(block_BD), *shape) for span, shape in spans)
    return tuple(map(align, pieces)) if align_pieces else tuple(pieces)


def is_aligned(piece: Tensor) -> bool:
    """Whether each row of a piece (B, *shape) lies as in a tensor of its own, at an even offset."""
    return (
        piece[0].is_contiguous()
        and piece.storage_offset() % 2 == 0
        and (len(piece) == 1 or piece.stride(0) % 2 == 0)
    )


def align(piece: Tensor) -> Tensor:
    """Return a piece (B, *shape) such that it `is_aligned`: itself, or a copy."""
    if is_aligned(piece):
        return piece
    count, size = len(piece), piece[0].numel()
    rows = piece.new_empty(count, size + size % 2)[:, :size]
    return rows.copy_(piece.reshape(count, size)).view(piece.shape)


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
        entries = dense(piece.detach()).reshape(target.shape)
        if add:
            target.add_(entries, alpha=weight)
        else:
            torch.mul(entries, weight, out=target)
