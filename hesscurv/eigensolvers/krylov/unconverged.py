"""Warning of pairs that have not converged: cause and remedy."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.space import KrylovSpace
from hesscurv.eigensolvers.residuals import ConvergenceWarning

# Asymmetry of products, relative to the norm of the operator, that rounding does not explain.
_ASYMMETRIC = 1e-3


def warn_unconverged(
    space: KrylovSpace,
    max_matvecs: int,
    values: Tensor,
    residuals: Tensor,
    within: Tensor,
    complete: int,
    noise: float,
    repeated: float,
) -> None:
    """Warn of pairs that have not converged, with the cause and the remedy.

    Args:
        space: The space, at the end of the solve.
        max_matvecs: The most products that were allowed.
        values: The Ritz values, shape (k,).
        residuals: Their residuals, shape (k,).
        within: Whether these are within the tolerance, shape (k,), bool.
        complete: The number of leading pairs known to have none missed before them.
        noise: The norm of a product's error.
        repeated: That part of it which another product does not repeat.

    Warns:
        ConvergenceWarning: Always.
    """
    k, told = space.k, []
    done = within & (torch.arange(k, device="cpu") < complete)
    if not bool(within.all()):
        worst = int((residuals / values.abs().clamp(min=1e-300)).argmax())
        told.append(
            f"pair {worst} has eigenvalue {values[worst]:.3g} and residual "
            f"{residuals[worst]:.2g}; "
            + _reason(space, max_matvecs, values, residuals[~within], noise, repeated)
        )
    if bool((within & ~done).any()):
        told.append(
            f"{int((within & ~done).sum())} pairs have residuals within tol, but larger ones "
            "may have been missed before them, since no search for these was conclusive; raise "
            f"max_matvecs (now {max_matvecs}) or max_basis (now {space.capacity})"
        )
    warnings.warn(
        f"{int(done.sum())} of {k} eigenpairs have converged to tol={space.tol:g} after "
        f"{space.num_matvecs} products; {'; '.join(told)}. See `converged` and `residuals`",
        ConvergenceWarning,
        stacklevel=4,
    )


def _reason(
    space: KrylovSpace,
    max_matvecs: int,
    values: Tensor,
    residuals: Tensor,
    noise: float,
    repeated: float,
) -> str:
    """Return the cause and remedy for residuals above tol."""
    # Errors of norm s in random directions differ by s sqrt(2 m / D) in m of D directions.
    random = repeated * math.sqrt(2 * space.num_expanded / space.dim) / space.scale
    if space.asymmetry > max(_ASYMMETRIC, 5 * random):
        return (
            "the products are not those of a symmetric operator: v^T (H w) and w^T (H v) "
            f"differ by {space.asymmetry:.1g} of its norm; look for a wrong backward pass in "
            "custom functions, or symmetrise it; where the loss is nearly 0, its curvature is "
            "below rounding: compute in float64 (compute_dtype=torch.float64)"
        )
    if float(residuals.min()) > 5 * noise:
        if space.num_restarts > 2 and space.capacity < 2 * space.k + 10 * space.block:
            return (
                f"the basis is small: raise max_basis (now {space.capacity}), max_matvecs (now "
                f"{max_matvecs}) or tol"
            )
        return f"raise max_matvecs (now {max_matvecs}), max_basis or tol"
    if space.rounding * float(values.abs().max()) > 0.2 * noise:
        return (
            f"the rounding of the stored vectors is a noise of {noise:.2g}: store them in "
            f"{space.H.dtype} (storage_dtype) or raise tol"
        )
    cause = "differ from call to call: fix their randomness (dropout), or" if repeated else ""
    return (
        f"the products' noise is {noise:.2g}: {cause + ' ' if cause else ''}compute them in "
        "float64 (compute_dtype=torch.float64) or raise tol"
    )
