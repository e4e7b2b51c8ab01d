r"""Check that an operator is the one of a stored Krylov space.

A fingerprint covers weights, batches and settings, but neither the loss function nor the model's
code. The projected matrix :math:`T = E^T H E` determines the operator on the space: for a random c,

.. math:: E^T H (E c) = T c

up to the rounding of products and stored vectors, whatever restarts have dropped.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.space import KrylovSpace
from hesscurv.linalg.block_norms import block_size
from hesscurv.linalg.precision import full_precision
from hesscurv.linalg.projections import inner_products

_ROWS = 32  # stored vectors cast to the operator's dtype at once
# Accepted difference, as a multiple of the asymmetry of T plus the rounding of stored vectors.
_TIMES_ROUNDING = 5.0


def require_same_operator(space: KrylovSpace, folder: str | os.PathLike[str]) -> None:
    r"""Compare H times a random combination of the expanded vectors with T's prediction.

    The asymmetry of T measures the error of products and what restarts have dropped; differences of
    that size are accepted. The matvec is not counted, so the solve continues as if it had not been
    interrupted.

    Args:
        space: The space, just loaded; collective over all ranks.
        folder: Its folder, for the message.

    Raises:
        ValueError: If they differ by more than rounding, with the remedy.

    Cost: one matvec, two reads of the m expanded vectors, 2 m D multiply-adds.
    """
    m = space.num_expanded
    if m == 0:  # no product is stored
        return
    # A separate generator, so that the solve draws the same numbers as without interruption.
    generator = torch.Generator().manual_seed(0)
    c_m = torch.randn(m, generator=generator, dtype=torch.float64, device="cpu")
    c_m /= c_m.norm()
    count = space.H.num_matvecs
    try:
        W_1D = space.product(_combination(space, c_m))
        space.require_usable(block_size(W_1D, space.across), 0.0)
    finally:
        space.H.num_matvecs = count
    pieces = [inner_products(slab, W_1D, space.across) for slab in space.basis.slabs(0, m)]
    T = space.A[:m].triu()
    T = T + T.triu(1).mT
    # Asymmetry within blocks; after the first block there is no other measure.
    within = float((space.A[:m].tril() - space.A[:m].triu().mT).norm(dim=0).max()) / space.scale
    gap = float((torch.cat(pieces)[:, 0] - T @ c_m).norm()) / space.scale
    rounding = max(space.asymmetry, within) + space.rounding
    explained = _TIMES_ROUNDING * rounding + math.sqrt(space.eps)
    if not gap <= explained:
        raise ValueError(
            f"{os.fspath(folder)} holds the checkpoint of another problem: a product with the "
            f"operator differs from the stored ones by {gap:.2g} of the operator's norm, where "
            f"rounding explains {explained:.1g}; weights, batches and settings are the same, so "
            "what differs is the loss function (its arguments, its class weights) or the model's "
            "code (activations, constants that are not buffers); give the same as before, or name "
            "another folder"
        )


def _combination(space: KrylovSpace, c_m: Tensor) -> Tensor:
    """Return E c, (1, D), this process's entries, in the operator's dtype."""
    out_1D = torch.zeros(1, space.basis.dim, dtype=space.H.dtype, device=space.H.device)
    start = 0
    with full_precision(space.H.device):
        for slab in space.basis.slabs(0, len(c_m)):
            for rows_rD in slab.split(_ROWS):
                part_1r = c_m[None, start : start + len(rows_rD)].to(out_1D)
                out_1D.addmm_(part_1r, rows_rD.to(out_1D))
                start += len(rows_rD)
    return out_1D
