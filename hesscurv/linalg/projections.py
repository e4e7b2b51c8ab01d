"""Projections of blocks of long vectors onto a stored basis (block Gram-Schmidt).

Shapes: b vectors in a block, m vectors in the basis, D the length of a vector. Blocks and bases are
row-contiguous, (b, D), one vector per row: the columns of the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch
from torch import Tensor

from hesscurv.linalg.block_norms import Reduction
from hesscurv.linalg.device_memory import chunk_entries
from hesscurv.linalg.precision import full_precision
from hesscurv.linalg.transfers import prefetched, to_device_of

_CHUNK_NUMEL = 2**23  # entries of one chunk of a basis: bounds the memory of casts to W's dtype
_SUM_LENGTH = 4096  # products summed in W's dtype; partial sums are added in float64


def project_out_(
    W_BD: Tensor,
    slabs: Sequence[Tensor],
    *,
    passes: int = 2,
    across: Reduction | None = None,
) -> Tensor:
    """Remove the span of an orthonormal basis from a block, in place (block Gram-Schmidt).

    ``W <- W - B (B^T W)``, `passes` times. After two passes ``|B^T w| <= few eps ||w||`` holds for
    the projected w, but not for combinations in which the columns of W cancel: use
    `orthonormalize_against_` for a block that is to be orthonormal.

    Args:
        W_BD: Shape (b, D), row-contiguous, float32 or float64; overwritten.
        slabs: The basis in pieces of shape (m_i, D), row-contiguous, orthonormal together; another
            dtype or device is cast chunk by chunk. An empty sequence is a basis of m = 0 vectors.
        passes: The number of projections, 2 by default.
        across: As in `orthonormalize_against_`.

    Returns:
        C, shape (m, b), float64: the coefficients of all passes, ``W_before = B C + W_after``. On
        W's device, without synchronisation, or on the CPU if summed over processes.

    Raises:
        ValueError: If W is not a matrix, or a slab does not fit it.

    Cost: 2 m b D multiply-adds and two reads of the basis for each pass.
    """
    check_slabs(W_BD, slabs)
    device = W_BD.device if across is None else "cpu"
    C_mb = torch.zeros(sum(map(len, slabs)), W_BD.shape[0], dtype=torch.float64, device=device)
    with full_precision(W_BD.device):
        for _ in range(passes if slabs else 0):
            C_mb += subtract_projection_(W_BD, slabs, across)
    return C_mb


def inner_products(A_mD: Tensor, B_BD: Tensor, across: Reduction | None = None) -> Tensor:
    """Return the small matrix ``A^T B`` of two sets of long vectors, summed accurately.

    A plain float32 product over D = 1e6 entries is off by 2e-6 to 6e-5 of the norms (MKL; worse
    for fewer vectors). Here sums of 4096 terms, a batched product in B's dtype, are added in
    float64: 1e-7, in the same time.

    Args:
        A_mD: Shape (m, D), row-contiguous; another dtype or device is cast chunk by chunk.
        B_BD: Shape (b, D), row-contiguous; its dtype and device are those of the computation.
        across: As in `orthonormalize_against_`.

    Returns:
        Shape (m, b), float64 on the CPU.

    Cost: m b D multiply-adds.
    """
    total_mb = products(A_mD, B_BD).cpu()
    return total_mb if across is None else across.sum_(total_mb)


def products(A_mD: Tensor, B_BD: Tensor) -> Tensor:
    """Return `inner_products` on B's device, unsynchronised."""
    (m, dim), b = A_mD.shape, B_BD.shape[0]
    total_mb = torch.zeros(m, b, dtype=torch.float64, device=B_BD.device)
    entries = chunk_entries(B_BD.device, _CHUNK_NUMEL)
    per_chunk = max(1, entries // (_SUM_LENGTH * max(m, b, 1)))
    whole = dim - dim % _SUM_LENGTH
    ranges = [
        slice(start, min(start + per_chunk * _SUM_LENGTH, whole))
        for start in range(0, whole, per_chunk * _SUM_LENGTH)
    ]
    ranges.append(slice(whole, dim))
    read = prefetched((A_mD[:, columns] for columns in ranges), B_BD.device, B_BD.dtype)
    with full_precision(B_BD.device), closing(read):
        for columns in ranges[:-1]:
            A_nms = next(read).unflatten(1, (-1, _SUM_LENGTH)).transpose(0, 1)
            B_nbs = B_BD[:, columns].unflatten(1, (-1, _SUM_LENGTH)).transpose(0, 1)
            total_mb += (A_nms @ B_nbs.mT).sum(dim=0, dtype=torch.float64)
        total_mb += next(read) @ B_BD[:, whole:].mT
    return total_mb


def subtract_projection_(W_BD: Tensor, slabs: Sequence[Tensor], across: Reduction | None) -> Tensor:
    """Subtract ``B B^T W`` and return ``B^T W``, (m, b), float64.

    On W's device, or on the CPU if summed over processes.
    """
    # All coefficients before any subtraction: classical, not modified, Gram-Schmidt.
    C_mb = torch.cat([products(slab, W_BD) for slab in slabs])
    if across is not None:
        C_mb = across.sum_(C_mb.cpu())
    for slab_mD, C_part in zip(slabs, C_mb.split(list(map(len, slabs))), strict=True):
        _subtract_(W_BD, slab_mD, C_part)
    return C_mb


def _subtract_(W_BD: Tensor, slab_mD: Tensor, C_mb: Tensor, factor: Tensor | None = None) -> None:
    C_bm = to_device_of(C_mb.mT, W_BD)
    if factor is not None:
        C_bm = C_bm * factor.to(C_bm.dtype)
    entries = chunk_entries(W_BD.device, _CHUNK_NUMEL)
    chunk = max(_SUM_LENGTH, entries // max(slab_mD.shape[0], 1))
    ranges = [slice(start, start + chunk) for start in range(0, W_BD.shape[1], chunk)]
    read = prefetched((slab_mD[:, columns] for columns in ranges), W_BD.device, W_BD.dtype)
    with closing(read):
        for columns in ranges:
            W_BD[:, columns].addmm_(C_bm, next(read), alpha=-1)


def subtract_known_(
    W_BD: Tensor,
    slabs: Sequence[Tensor],
    known_nb: Tensor,
    negligible: float,
    across: Reduction | None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Subtract the basis times coefficients, given for its first n vectors, computed for the rest.

    A `factor` on W's device multiplies the given coefficients.

    Returns:
        The subtracted coefficients: of the first n vectors, (n, b), float64 on the CPU, and of the
        others, see `subtract_projection_`.
    """
    taken_nb, start, rest = torch.zeros_like(known_nb), 0, []
    with full_precision(W_BD.device):
        for slab_mD in slabs:
            known = known_nb[start : start + len(slab_mD)]
            for low, high in _runs((known.abs() > negligible).any(dim=1)):
                _subtract_(W_BD, slab_mD[low:high], known[low:high], factor)
                taken_nb[start + low : start + high] = known[low:high]
            if len(known) < len(slab_mD):
                rest.append(slab_mD[len(known) :])
            start += len(slab_mD)
        if rest:
            return taken_nb, subtract_projection_(W_BD, rest, across)
    return taken_nb, known_nb.new_zeros(0, W_BD.shape[0])


def _runs(marked: Tensor) -> list[tuple[int, int]]:
    """Cover the marked entries by few ranges, bridging gaps shorter than a block."""
    ranges: list[tuple[int, int]] = []
    for i in marked.nonzero().flatten().tolist():
        if ranges and i - ranges[-1][1] < 16:
            ranges[-1] = ranges[-1][0], i + 1
        else:
            ranges.append((i, i + 1))
    return ranges


def check_slabs(W_BD: Tensor, slabs: Sequence[Tensor]) -> None:
    """Refuse a block that is no matrix, or a slab of vectors of another length.

    Raises:
        ValueError: If there is one.
    """
    if W_BD.ndim != 2:
        raise ValueError(f"expected a block of shape (b, D), got {tuple(W_BD.shape)}")
    for slab in slabs:
        if slab.ndim != 2 or slab.shape[1] != W_BD.shape[1]:
            raise ValueError(
                f"expected slabs of shape (m, {W_BD.shape[1]}), one vector in each row, "
                f"got {tuple(slab.shape)}"
            )
