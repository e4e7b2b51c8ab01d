r"""Comparison of an operator with the one that a stored Krylov space was grown with.

A fingerprint knows weights, batches and settings, and neither the loss function nor the model's
code. The projected matrix :math:`T = E^T H E` knows the operator itself: for a random c,

.. math:: E^T H (E c) = T c

up to the rounding of products and stored vectors, whatever restarts have dropped since.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.space import KrylovSpace
from hesscurv.linalg.block_norms import block_size
from hesscurv.linalg.orthogonalization import inner_products
from hesscurv.linalg.precision import full_precision

_ROWS = 32  # stored vectors that are cast to the operator's dtype at once
# How many times as much as the asymmetry of T and the rounding of its vectors explain.
_TIMES_ROUNDING = 5.0


def require_same_operator(space: KrylovSpace, folder: str | os.PathLike[str]) -> None:
    r"""Compare a product with a random combination of the expanded vectors with what T says.

    T's columns differ from its rows by the error of products and by what restarts have dropped:
    neither may make another operator of it. The product does not count, since it belongs to no
    space: the solve goes on as if it had not been interrupted.

    Args:
        space: The space, just loaded; on all ranks together.
        folder: Where it comes from, for the message.

    Raises:
        ValueError: If they differ by more than rounding, with the remedy.

    Cost: one product, two readings of the m expanded vectors, 2 m D multiply-adds.
    """
    m = space.num_expanded
    if m == 0:  # no product is stored
        return
    # A generator of its own: the solve's has to go on as before.
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
    # Within a block too, and after the first one there is nothing else to see it by.
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
            "code (activations, constants that are no buffers); give the same as before, or name "
            "another folder"
        )


def _combination(space: KrylovSpace, c_m: Tensor) -> Tensor:
    """Return E c, (1, D), own entries, in the operator's dtype."""
    out_1D = torch.zeros(1, space.basis.dim, dtype=space.H.dtype, device=space.H.device)
    start = 0
    with full_precision(space.H.device):
        for slab in space.basis.slabs(0, len(c_m)):
            for rows_rD in slab.split(_ROWS):
                part_1r = c_m[None, start : start + len(rows_rD)].to(out_1D)
                out_1D.addmm_(part_1r, rows_rD.to(out_1D))
                start += len(rows_rD)
    return out_1D
