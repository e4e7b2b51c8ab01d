"""Conversion between blocks of flat vectors (B, D) and one tensor (B, *shape) per parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesscurv.objective.parameters import ParameterLayout
from hesscurv.objective.running.plain_embeddings import dense


class BlockCutter:
    """Cuts blocks of vectors into pieces that a product can take.

    A parameter's piece begins wherever those before it end, so that it may lie at an odd offset;
    `view_as_complex` takes none. Where a product fails on such pieces, it gets copies, in the next
    blocks from the start; usual models, which take any offset, are spared the copies.

    Args:
        layout: Where each piece lies.
    """

    def __init__(self, layout: ParameterLayout) -> None:
        self._layout = layout
        self._aligning = False

    def apply(
        self, product: Callable[[tuple[Tensor, ...]], tuple[Any, ...]], block_BD: Tensor
    ) -> tuple[Any, ...]:
        """Call a product with a block's pieces."""
        pieces = cut_block(self._layout, block_BD)
        if not self._aligning:
            try:
                return product(pieces)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if all(map(is_aligned, pieces)):
                    raise
        out = product(tuple(map(align, pieces)))
        self._aligning = True
        return out


def cut_block(layout: ParameterLayout, block_BD: Tensor) -> tuple[Tensor, ...]:
    """Return the parameters' pieces of a block: views (B, *shape) where strides allow."""
    spans = zip(layout.slices().values(), layout.shapes, strict=True)
    return tuple(block_BD[:, span].reshape(len(block_BD), *shape) for span, shape in spans)


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
