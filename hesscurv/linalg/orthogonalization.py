"""Block orthonormalisation by matrix products: CholeskyQR2 and SVQB.

Shapes: b vectors in a block, r <= b independent ones, m vectors in the basis, D the length of a
vector. Blocks and bases are row-contiguous, (b, D), one vector per row: the columns of the
formulas. Small matrices (Gram matrices, coefficients, triangular factors) are float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hesscurv.linalg.block_norms import BlockSize, Reduction, block_size, column_norms
from hesscurv.linalg.precision import full_precision
from hesscurv.linalg.projections import (
    check_slabs,
    inner_products,
    products,
    subtract_known_,
    subtract_projection_,
)
from hesscurv.linalg.ritz import rotate_

_MAX_PASSES = 12  # a block of condition 1/eps takes 4 or 5
_SAFE_PIVOT = 0.1  # least pivot of a Gram matrix of unit diagonal


def orthonormalize_(W_BD: Tensor, *, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Orthonormalise a block in place, dropping numerically dependent directions.

    ``W_DB = Q_Dr R_rb``, ``Q^T Q = I``. The block is multiplied by the inverse Cholesky factor of
    its Gram matrix, scaled to unit diagonal, until that is the identity: twice for a well
    conditioned block (CholeskyQR2). If the Cholesky factorisation is unsafe, the inverse square
    root with eigenvalues clipped from below replaces it (SVQB); repetition resolves the directions
    that one pass does not. Singular values of W at or below
    ``max(floor, 4 eps ||W||_2)`` count as zero.

    Args:
        W_BD: Shape (b, D), row-contiguous, float32 or float64, any device. Overwritten: the first
            r rows hold Q, the others are undefined.
        floor: Norm at or below which a direction is noise: absolute, in the units of W.

    Returns:
        Q, the view ``W_BD[:r]`` of shape (r, D), orthonormal to a few eps; and R, shape (r, b),
        float64 on the CPU, upper triangular if the block is well conditioned. r = 0 for zero W.

    Raises:
        TypeError: If W is not float32 or float64.
        ValueError: If W is not a matrix, or has NaN or inf entries.

    Cost: 4 b^2 D multiply-adds for a well conditioned block; a chunk of temporary storage.

    References:
        Fukaya et al., "CholeskyQR2: a simple and communication-avoiding algorithm for computing a
        tall-skinny QR factorization on a large-scale parallel system" (2014).
        Stathopoulos, Wu, "A block orthogonalization procedure with constant synchronization
        requirements", SIAM J. Sci. Comput. 23 (2002).
    """
    Q_rD, _, R_rb = orthonormalize_against_(W_BD, (), floor=floor)
    return Q_rD, R_rb


def orthonormalize_against_(
    W_BD: Tensor,
    slabs: Sequence[Tensor],
    *,
    floor: float = 0.0,
    known_nb: Tensor | None = None,
    size: BlockSize | None = None,
    across: Reduction | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormalise a block against a basis and within itself, in place.

    ``W_DB = B_Dm C_mb + Q_Dr R_rb``, ``B^T Q = 0``, ``Q^T Q = I``: projection, orthonormalisation,
    and both again on the result. The second projection acts on unit vectors and so removes what
    the first orthonormalisation amplified: a direction that keeps only 1e-6 of its norm carries
    1e6 times the rounding error of the first projection. It is repeated while its coefficients are
    large. Singular values of the projected W at or below
    ``max(floor, (4 + sqrt(m)/2) eps max_j ||w_j||, 4 eps ||W||_2)``, with the column norms before
    the projection, count as zero: such a direction lies in the span of the basis.

    Args:
        W_BD: Shape (b, D), row-contiguous, float32 or float64. Overwritten, as in
            `orthonormalize_`.
        slabs: The basis B in pieces of shape (m_i, D), row-contiguous, orthonormal together;
            another dtype or device is cast chunk by chunk.
        floor: Norm at or below which a direction is noise: absolute, in the units of W.
        known_nb: ``B^T W`` for the first n <= m basis vectors up to the noise of W, float64 on the
            CPU, shape (n, b), as known by symmetry for W = H Q. The first projection uses these,
            which saves computing them, and all work where they are zero; the second removes the
            remainder.
        size: `block_size` of W, if known already.
        across: Reduction over processes that each hold D_local of the D entries of all vectors; all
            get the same coefficients. None: this process holds all entries.

    Returns:
        Q, the view ``W_BD[:r]``, shape (r, D); C, shape (m, b), the coefficients of all
        projections together; R, shape (r, b). C and R are float64 on the CPU.

    Raises:
        TypeError: If W is not float32 or float64.
        ValueError: If W is not a matrix, has NaN or inf entries, or a slab does not fit it.
        ArithmeticError: If W does not become orthonormal: something else writes to its storage.

    Cost: 4 m b D + 5 b^2 D multiply-adds; four passes over the basis. Half of that with known
    coefficients of which most are zero.

    References:
        Giraud, Langou, Rozloznik, "The loss of orthogonality in the Gram-Schmidt orthogonalization
        process", Comput. Math. Appl. 50 (2005): twice is enough, unless W is numerically singular.
    """
    if W_BD.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"expected float32 or float64 vectors, got {W_BD.dtype}; cast them first")
    check_slabs(W_BD, slabs)
    size = size or block_size(W_BD, across)
    if known_nb is None:
        known_nb = torch.zeros(0, W_BD.shape[0], dtype=torch.float64, device="cpu")
    if size.is_read or across is not None or len(W_BD) == 0:
        begun = _begin_(W_BD, slabs, floor, known_nb, size, across)
    else:
        begun = _begin_ahead_(W_BD, slabs, floor, known_nb, size)
    scale, threshold, C_mb, R_rb, G_bb, again = begun
    Q_rD, R_rb = _factor_(W_BD, G_bb, R_rb, threshold, across)
    for _ in range(_MAX_PASSES if again else 0):
        if C_mb.shape[0] == 0 or Q_rD.shape[0] == 0:
            break
        with full_precision(Q_rD.device):
            correction_mr = subtract_projection_(Q_rD, slabs, across)
        correction_mr, G_rr = _read(correction_mr, products(Q_rD, Q_rD), across)
        C_mb += correction_mr @ R_rb
        Q_rD, R_rb = _factor_(Q_rD, G_rr, R_rb, threshold, across)
        # What remains in the basis' span is eps times what was just found there.
        if correction_mr.norm(dim=0).max() < 0.1:
            break
    return Q_rD, C_mb * scale, R_rb * scale


class _Begun(NamedTuple):
    """A block W after its first projections: ``W = scale (B C + P R)``, P stored in W."""

    scale: float
    threshold: float  # what counts as zero, relative to the scale
    C_mb: Tensor
    R_bb: Tensor
    G_bb: Tensor  # P^T P
    again: bool  # whether to project once more when P is orthonormal


def _noise(m: int, dtype: torch.dtype) -> float:
    # The rounding error of sums of m terms that cancel was measured as 0.2 sqrt(m) eps ||w||.
    return (4 + math.sqrt(m) / 2) * torch.finfo(dtype).eps


def _begin_(
    W_BD: Tensor,
    slabs: Sequence[Tensor],
    floor: float,
    known_nb: Tensor,
    size: BlockSize,
    across: Reduction | None,
) -> _Begun:
    """Project a block once: P = W - B C."""
    scale, norms = _normalize_scale_(W_BD, size, across)
    largest = max(norms, default=0.0)
    negligible = torch.finfo(W_BD.dtype).eps * largest
    taken_nb, measured_pb = subtract_known_(W_BD, slabs, known_nb / scale, negligible, across)
    # Coefficients and Gram matrix are read together, so that a GPU is synchronised once.
    measured_pb, G_bb = _read(measured_pb, products(W_BD, W_BD), across)
    C_mb = torch.cat([taken_nb, measured_pb])
    threshold = max(floor / scale, _noise(len(C_mb), W_BD.dtype) * largest)
    start_bb = torch.eye(W_BD.shape[0], dtype=torch.float64, device="cpu")
    return _Begun(scale, threshold, C_mb, start_bb, G_bb, True)


def _begin_ahead_(
    W_BD: Tensor,
    slabs: Sequence[Tensor],
    floor: float,
    known_nb: Tensor,
    size: BlockSize,
) -> _Begun:
    """Project, orthonormalise by Cholesky and project again, synchronising a GPU only once.

    The device decides whether the Cholesky factor is safe; if not, the block is projected twice
    and not orthonormalised.
    """
    eps, (b, device) = torch.finfo(W_BD.dtype).eps, (len(W_BD), W_BD.device)
    # A power of two as in `_normalize_scale_`, so that scaling does not round.
    exponent = torch.frexp(size.numbers[:2].abs().max()).exponent.clamp(-100, 100)
    exponent = torch.where(exponent.abs() <= 16, 0, exponent)
    shrink = torch.ldexp(torch.ones((), dtype=torch.float64, device=device), -exponent)
    W_BD.mul_(shrink.to(W_BD.dtype))
    # The norm of the known part bounds that of W from below; W's own is still on the device.
    negligible = eps * float(known_nb.norm(dim=0).max()) if known_nb.numel() else 0.0
    taken_nb, measured_pb = subtract_known_(W_BD, slabs, known_nb, negligible, None, shrink)
    G_bb = products(W_BD, W_BD)
    noise = _noise(sum(map(len, slabs)), W_BD.dtype) * size.numbers[2:].max()
    eye_bb = torch.eye(b, dtype=torch.float64, device=device)
    norms_b = G_bb.diagonal().clamp(min=0).sqrt()
    kept = (norms_b > noise.clamp(min=floor) * shrink).all()
    # Branches are taken by torch.where: an if would wait for the device.
    norms_b = torch.where(kept, norms_b, 1.0)
    L_bb, info = torch.linalg.cholesky_ex(G_bb / torch.outer(norms_b, norms_b))
    safe = kept & (info == 0) & (L_bb.diagonal().min() > _SAFE_PIVOT)
    T_bb = torch.linalg.solve_triangular(L_bb, eye_bb, upper=False) / norms_b
    rotate_(W_BD, torch.where(safe, T_bb, eye_bb).mT)
    R_bb = torch.where(safe, L_bb.mT * norms_b, eye_bb)
    measured_pb = measured_pb.to(device)
    correction_mb = measured_pb[:0]
    if slabs:
        with full_precision(device):
            correction_mb = subtract_projection_(W_BD, slabs, None)
    small = [measured_pb, R_bb, correction_mb, products(W_BD, W_BD)]
    decided = torch.stack([exponent.double(), safe.double()])
    numbers = torch.cat([size.numbers, decided, *(t.flatten() for t in small)]).cpu()
    size.take(numbers[: 2 + b])
    _require_finite(size)
    rest = numbers[4 + b :].split([t.numel() for t in small])
    measured_pb, R_bb, correction_mb, G_bb = (
        t.view(like.shape) for t, like in zip(rest, small, strict=True)
    )
    scale = 2.0 ** float(numbers[2 + b])
    largest = max(size.norms) / scale
    C_mb = torch.cat([taken_nb / scale, measured_pb])
    # The correction bounds the loss of orthogonality only if the vectors had unit norm.
    enough = numbers[3 + b] > 0 and bool((correction_mb.norm(dim=0) < 0.1).all())
    return _Begun(
        scale,
        max(floor / scale, _noise(len(C_mb), W_BD.dtype) * largest),
        # Without a basis, both have no rows.
        C_mb + correction_mb @ R_bb,
        R_bb,
        G_bb,
        not enough,
    )


def complete_(basis_mD: Tensor, rank: int, generator: torch.Generator) -> None:
    """Fill rows rank, ..., m - 1 of a stored basis with random orthonormal directions, in place.

    Args:
        basis_mD: Shape (m, D), m <= D, row-contiguous; the first `rank` rows are orthonormal and
            stay.
        rank: Number of rows already present.
        generator: Source of the random numbers, which are drawn on its device.

    Raises:
        ValueError: If m > D.

    Cost: as `orthonormalize_against_` for a block of m - rank vectors.
    """
    m, dim = basis_mD.shape
    if m > dim:
        raise ValueError(f"expected at most {dim} vectors of length {dim}, got {m}")
    # Repeated, since random rows may turn out dependent on the basis or on each other.
    while rank < m:
        for row in basis_mD[rank:]:
            row.copy_(_drawn(dim, generator))
        Q_rD, _, _ = orthonormalize_against_(basis_mD[rank:], [basis_mD[:rank]])
        rank += Q_rD.shape[0]


def _drawn(dim: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    return torch.randn(dim, generator=generator, dtype=torch.float32, device=device)


def _identity_like(G_bb: Tensor) -> Tensor:
    return torch.eye(len(G_bb), dtype=G_bb.dtype, device=G_bb.device)


def _read(C_mb: Tensor, G_bb: Tensor, across: Reduction | None) -> tuple[Tensor, Tensor]:
    """Return two small matrices on the CPU in one transfer; the second summed over processes."""
    if C_mb.device == G_bb.device and C_mb.device.type != "cpu":
        both = torch.cat([C_mb.flatten(), G_bb.flatten()]).cpu()
        C_mb, G_bb = both[: C_mb.numel()].view_as(C_mb), both[C_mb.numel() :].view_as(G_bb)
    G_bb = G_bb.cpu()
    return C_mb.cpu(), G_bb if across is None else across.sum_(G_bb)


def _factor_(
    P_BD: Tensor, G_bb: Tensor, R_bn: Tensor, threshold: float, across: Reduction | None
) -> tuple[Tensor, Tensor]:
    """Orthonormalise P in place, keeping ``W_Dn = P_DB R_bn``; G is its Gram matrix.

    Directions that contribute at most `threshold` to W are dropped.
    """
    eps = torch.finfo(P_BD.dtype).eps
    for turn in range(_MAX_PASSES):
        if turn > 0:
            G_bb = inner_products(P_BD, P_BD, across)
        norms = G_bb.diagonal().clamp(min=0).sqrt()
        # A direction adds its column of P times its row of R to W.
        keep = norms * R_bn.norm(dim=1) > threshold
        if not keep.any():
            return P_BD[:0], R_bn[:0]
        if keep.all() and (G_bb - _identity_like(G_bb)).abs().max() <= 8 * eps:
            break
        # Unit diagonal, so that pivots measure dependence and not the scale of the columns.
        norms = norms[keep]
        scaled = G_bb[keep][:, keep] / torch.outer(norms, norms)
        T_rr, F_rr = _whitening(scaled, eps)
        if across is not None:  # LAPACK may return other eigenvectors on another processor
            T_rr, F_rr = across.broadcast_(torch.stack([T_rr.contiguous(), F_rr.contiguous()]))
        R_bn = F_rr @ (norms[:, None] * R_bn[keep])
        T_rb = torch.zeros(len(norms), len(keep), dtype=torch.float64, device="cpu")
        T_rb[:, keep] = T_rr / norms
        P_BD = rotate_(P_BD, T_rb.mT)
        # Gershgorin: the condition is below 3, after which one pass reaches eps.
        if (scaled - _identity_like(scaled)).abs().sum(dim=1).max() < 0.5:
            break
    else:
        raise ArithmeticError(
            f"a block of {len(P_BD)} vectors did not become orthonormal in {_MAX_PASSES} passes; "
            "check that nothing else writes to it meanwhile"
        )
    # R is not rank-revealing: only its singular values tell which directions are noise.
    sigma = torch.linalg.svdvals(R_bn)
    threshold = max(threshold, 4 * eps * sigma[0].item())
    if sigma[-1] > threshold:
        return P_BD, R_bn
    U_br, sigma, Vh = torch.linalg.svd(R_bn, full_matrices=False)
    if across is not None:
        U_br, Vh = across.broadcast_(U_br.contiguous()), across.broadcast_(Vh.contiguous())
    rank = int((sigma > threshold).sum())
    return rotate_(P_BD, U_br[:, :rank]), sigma[:rank, None] * Vh[:rank]


def _whitening(G: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return T and F with ``T G T^T = I`` (as far as eps allows) and ``F = T^-T``.

    G has unit diagonal and entries accurate to eps. T is the inverse Cholesky factor or, if a pivot
    is small, the inverse square root with clipped eigenvalues: it still gives ``P = F^T (T P)`` to
    a few eps, while the rounding of ``L (L^-1 P)`` grows with the condition of L.
    """
    n = len(G)
    L, info = torch.linalg.cholesky_ex(G)
    if info == 0 and L.diagonal().min() > _SAFE_PIVOT:
        return torch.linalg.solve_triangular(
            L, torch.eye(n, dtype=G.dtype, device="cpu"), upper=False
        ), L.mT
    # Eigenvalues of G are accurate to about sqrt(n) eps of the largest: clip there.
    values, Z = torch.linalg.eigh(G)
    roots = values.clamp(min=math.sqrt(n) * eps * values[-1].item()).sqrt()
    return (Z / roots).mT, (Z * roots).mT


def _normalize_scale_(
    W_BD: Tensor, size: BlockSize, across: Reduction | None
) -> tuple[float, list[float]]:
    """Divide W by a power of two, without rounding, if its squares could over- or underflow.

    Returns:
        The power, and the norms of W's vectors after the division.
    """
    _require_finite(size)
    largest = size.largest
    exponent = math.frexp(largest)[1]
    # Squares of usual magnitudes are safe in float32: spare the pass over W.
    if largest == 0 or abs(exponent) <= 16:
        return 1.0, size.norms
    exponent = max(-100, min(100, exponent))  # so that 2^-exponent is a normal float32
    W_BD.mul_(2.0**-exponent)
    return 2.0**exponent, column_norms(W_BD, across).tolist()


def _require_finite(size: BlockSize) -> None:
    if not math.isfinite(size.largest):
        raise ValueError(
            "expected finite vectors, got NaN or inf entries; check the operator's products"
        )
