"""Chebyshev filter bound on H outside a Krylov space, without storage in the basis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.eigenvalue_bounds import least_share
from hesscurv.eigensolvers.krylov.search import ESCAPES, LEAST_STEPS
from hesscurv.eigensolvers.krylov.space import KrylovSpace
from hesscurv.linalg.block_norms import column_norms
from hesscurv.linalg.projections import inner_products, project_out_
from hesscurv.linalg.transfers import to_device_of


def is_bounded_by_filter(
    space: KrylovSpace, last: int, side: int, spectrum: tuple[float, float], most: int
) -> bool:
    r"""Whether all eigenvalues beyond `space.bound(last)` at one end are in the space.

    True if B = H' + S of `krylov.eigenvalue_bounds` has none there. A random vector y
    outside is multiplied by the Chebyshev polynomial T_n of B, mapped so that [-1, 1] covers its
    spectrum: then ||T_n(B) y|| <= ||y||, while the component of an eigenvector beyond x grows by
    T_n(x). It stores three vectors instead of one per step as `Search`, but takes more steps and
    relies on estimates of the spectrum; too small an interval gives no result, never a wrong one.

    Args:
        space: The space.
        last: Index of the last pair to be covered.
        side: The end, +1 or -1.
        spectrum: Estimates of B's smallest and largest eigenvalue.
        most: Maximal number of matvecs; none are used if they cannot suffice.
    """
    x, m = space.bound(last), space.num_expanded
    low, high = spectrum
    # Ritz values lie inside the spectrum: widen the interval, but keep x outside.
    high += (x - high) / 4
    low -= (high - low) / 10
    center, half = (high + low) / 2, (high - low) / 2
    share = least_share(1, space.dim - m, ESCAPES)
    if not half > 0 or not (x - center) / half > 1:
        return False
    rate = math.acosh((x - center) / half)
    # T_n(x) = cosh(n rate) ~ exp(n rate) / 2 has to exceed 1 / share.
    needed = max(LEAST_STEPS, math.ceil(math.log(2 / share) / rate))
    if needed > most:
        return False
    S = space.schur_complement(side, last)

    def multiply(y_1D: Tensor) -> Tensor:
        """Return (B - center) y / half."""
        out_1D, size = space.multiply(y_1D)
        space.require_usable(size, space.scale)
        project_out_(out_1D, space.basis.slabs(0, m), across=space.across)
        out_1D *= side
        if len(S):
            pending = space.basis.slabs(m)
            C_q1 = torch.cat([inner_products(slab, y_1D, space.across) for slab in pending])
            for slab, part_r1 in zip(pending, (S @ C_q1).split([*map(len, pending)]), strict=True):
                out_1D += to_device_of(part_r1.mT, out_1D) @ slab.to(out_1D)
        return (out_1D - center * y_1D) / half

    before_1D = space.outside(1)
    norm = float(column_norms(before_1D, space.across)[0])
    y_1D = multiply(before_1D)
    for n in range(1, needed + needed // 4):
        left = float(column_norms(y_1D, space.across)[0])
        growth = math.cosh(n * rate)  # T_n(x)
        if n >= LEAST_STEPS and left < growth * share * norm:
            return True
        if left > growth * norm:  # B has an eigenvalue beyond x; the recurrence would overflow
            return False
        before_1D, y_1D = y_1D, 2 * multiply(y_1D) - before_1D
    return False
