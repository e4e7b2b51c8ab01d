"""Principal angles between subspaces, accurate from 0 to pi/2."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hesscurv.metrics.subspace import (
    ColumnSpan,
    CoordinateSpan,
    Span,
    Subspace,
    as_spans,
    compute_dtype,
    device_of,
    row_blocks,
    without_autocast,
)


def principal_angles(a: Subspace, b: Subspace) -> Tensor:
    """Return the principal angles between two subspaces, smallest first.

    ``cos t_i`` are the singular values of ``A^T B``. Angles below 45 degrees are computed from the
    sines instead, the singular values of ``(I - A A^T) B``, because arccos near 1 loses half of the
    digits: every angle, whether 1e-9 or pi/2, is accurate to a few eps of the bases' dtype.

    Args:
        a: A bool mask (D,), a basis (D, k_a) with orthonormal columns, or `Eigenpairs`.
        b: Likewise, of the same D; its rank may differ.

    Returns:
        Shape (min(k_a, k_b),), float64, radians in [0, pi/2], on the bases' device.

    Raises:
        TypeError: If an argument is not a subspace.
        ValueError: If D differs, a mask is empty, or a basis is not finite or not orthonormal.

    Cost:
        2 D k_a k_b flops for the cosines; with s angles below 45 degrees, about 2 D s (k_a + k_b +
        s) more for their sines. Memory: row blocks of tens of MB and a few k x k float64 matrices.

    References:
        Björck and Golub, Math. Comp. 27 (1973), 579-594; the combination of cosines and sines is
        Algorithm 3.1 of Knyazev and Argentati, SIAM J. Sci. Comput. 23 (2002), 2008-2040.

    Example:
        >>> a = torch.tensor([True, True, False, False])
        >>> b = torch.tensor([True, False, True, False])
        >>> hesscurv.principal_angles(a, b)
        tensor([0.0000, 1.5708], dtype=torch.float64)
    """
    return angles_of_spans(*as_spans(a, b))


def angles_of_spans(a: Span, b: Span) -> Tensor:
    """Return the `principal_angles` of two validated spans."""
    large, small = (a, b) if a.rank >= b.rank else (b, a)
    if isinstance(large, CoordinateSpan) and isinstance(small, CoordinateSpan):
        angles = torch.full((small.rank,), math.pi / 2, dtype=torch.float64, device="cpu")
        angles[: int((large.mask & small.mask).sum())] = 0.0
        return angles.to(large.mask.device)
    inner = cross(large, small)
    _, cosines, right = torch.linalg.svd(inner, full_matrices=False)
    angles = torch.arccos(cosines.clamp(max=1.0))
    # d arccos(c)/dc = -1/sin t: an error of eps in a cosine near 1 moves an angle of 0 to
    # sqrt(eps). Below 45 degrees the sine has the smaller error, so only those angles pay for it.
    num_below_45 = int((cosines.square() > 0.5).sum())
    if num_below_45:
        sines = _sines(large, small, inner, right[:num_below_45].mT)
        angles[:num_below_45] = torch.arcsin(sines.clamp(max=1.0)).flip(0)
    return angles.sort().values


def cross(large: Span, small: Span) -> Tensor:
    """Return large^T small, (p, q), float64; or its R factor (q, q) for a mask against a basis."""
    with without_autocast(device_of(large)):
        if isinstance(large, CoordinateSpan):
            # A mask may keep millions of rows, which makes p x q as large as the basis. Its R
            # factor has the same singular values and right singular vectors.
            assert isinstance(small, ColumnSpan)
            return _r_factor(rows_at(large, small))
        if isinstance(small, CoordinateSpan):
            return large.basis[small.indices].double().mT
        dtype = compute_dtype(large, small)
        out = torch.zeros(large.rank, small.rank, dtype=torch.float64, device=large.basis.device)
        for start, stop in row_blocks(large.dim, max(large.rank, small.rank)):
            block = large.basis[start:stop].to(dtype)
            out += block.mT @ small.basis[start:stop].to(dtype)
        return out


def _sines(large: Span, small: Span, inner: Tensor, right: Tensor) -> Tensor:
    """Return the singular values, largest first, of (I - A A^T) B Z; A = large, B = small."""
    dtype = compute_dtype(large, small)
    widths = [span.rank for span in (large, small) if isinstance(span, ColumnSpan)]
    in_small = right.to(dtype)
    in_large = (inner @ right).to(dtype)

    def residual_blocks() -> Iterator[Tensor]:
        for start, stop in row_blocks(large.dim, max(widths)):
            block = small.rows_times(start, stop, in_small)
            if isinstance(large, CoordinateSpan):
                yield block.masked_fill(large.mask[start:stop, None], 0.0)
            else:
                yield block - large.rows_times(start, stop, in_large)

    with without_autocast(device_of(large)):
        return torch.linalg.svdvals(_r_factor(residual_blocks()))


def rows_at(axes: CoordinateSpan, columns: ColumnSpan) -> Iterator[Tensor]:
    """Yield the rows of a basis that a mask keeps, in blocks."""
    for start, stop in row_blocks(axes.rank, columns.rank):
        yield columns.basis[axes.indices[start:stop]]


def _r_factor(blocks: Iterable[Tensor]) -> Tensor:
    """Return the R factor of a tall matrix given in row blocks (TSQR), in float64.

    A Gram matrix would be slightly faster but squares the singular values: those below sqrt(eps)
    would be lost.
    """
    factor: Tensor | None = None
    for block in blocks:
        rows = block.double()
        stacked = rows if factor is None else torch.cat([factor, rows])
        factor = torch.linalg.qr(stacked, mode="r").R
    assert factor is not None
    return factor
