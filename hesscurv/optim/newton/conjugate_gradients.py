"""Preconditioned conjugate gradients for Newton directions, stopped at negative curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner


@dataclass(frozen=True)
class NewtonDirection:
    """Result of conjugate gradients.

    Args:
        direction: d, shape (D,).
        slope: g^T d, negative for a descent direction.
        curvature: d^T H d, without the damping.
        num_matvecs: Products, one for each iteration.
        converged: Whether ``||(H + mu I) d + g|| <= tol ||g||``.
        negative_curvature: Whether a direction p with p^T (H + mu I) p <= 0 was met.
    """

    direction: Tensor
    slope: float
    curvature: float
    num_matvecs: int
    converged: bool
    negative_curvature: bool


def newton_direction(
    H: LinearOperator,
    gradient_D: Tensor,
    damping: float,
    precondition: LowRankPreconditioner,
    *,
    tol: float,
    max_iterations: int,
) -> NewtonDirection:
    r"""Solve :math:`(H + \mu I) d = -g` by preconditioned conjugate gradients, from d = 0.

    At a direction p with :math:`p^T (H + \mu I) p \le 0` the solve ends: d goes on along p, as far
    as it would if that curvature had the other sign. (Steihaug's method goes to the border of a
    trust region, of which there is none here; algorithm 7.1 of Nocedal and Wright goes along p only
    if it is the first direction, and crept along plateaus.) Every d on the way is a descent
    direction, :math:`g^T d < 0` up to rounding.

    Args:
        H: The Hessian, D x D.
        gradient_D: g, shape (D,), not zero.
        damping: mu, not negative.
        precondition: P, positive definite, about a multiple of the inverse of H + mu I.
        tol: On the residual relative to ||g||.
        max_iterations: The most products.

    Returns:
        The direction with its slope and curvature.

    Raises:
        ValueError: If a product has NaN or inf entries.

    Cost: a product, a preconditioning and 10 D operations for each iteration; 5 D numbers.

    References:
        Steihaug, "The conjugate gradient method and trust regions in large scale optimization",
        SIAM J. Numer. Anal. 20 (1983). Nocedal, Wright, "Numerical optimization", 2nd edition,
        algorithm 7.1.
    """
    d_D = torch.zeros_like(gradient_D)
    r_D = -gradient_D
    z_D = precondition(r_D)
    p_D = z_D
    rz = float(r_D @ z_D)
    target = tol * float(torch.linalg.vector_norm(gradient_D))
    eps = torch.finfo(gradient_D.dtype).eps
    done = negative = False
    products = 0
    while products < max_iterations and not done and rz > 0:
        Ap_D = (H @ p_D).add_(p_D, alpha=damping)
        products += 1
        curvature, p_norm, Ap_norm = torch.stack(
            [p_D @ Ap_D, torch.linalg.vector_norm(p_D), torch.linalg.vector_norm(Ap_D)]
        ).tolist()
        require_finite(Ap_norm, products)
        # What is not above the rounding of this sum has no sign.
        negative = curvature <= eps * p_norm * Ap_norm
        least = max(damping * p_norm**2, eps * p_norm * Ap_norm)
        alpha = rz / (max(-curvature, least) or rz) if negative else rz / curvature
        d_D.add_(p_D, alpha=alpha)
        r_D.sub_(Ap_D, alpha=alpha)
        if negative:
            break
        done = float(torch.linalg.vector_norm(r_D)) <= target
        if not done:
            z_D = precondition(r_D)
            rz, before = float(r_D @ z_D), rz
            p_D = torch.add(z_D, p_D, alpha=rz / before)
    # r = -g - (H + mu I) d, whatever the steps were.
    slope, through, square = torch.stack([gradient_D @ d_D, r_D @ d_D, d_D @ d_D]).tolist()
    return NewtonDirection(
        d_D, slope, -slope - through - damping * square, products, done, negative
    )


def ensure_descent(
    solved: NewtonDirection, gradient_D: Tensor, precondition: LowRankPreconditioner
) -> tuple[NewtonDirection, int]:
    """Replace a direction that rounding has spoiled by the preconditioned, or the plain gradient.

    Args:
        solved: The result of `newton_direction`.
        gradient_D: g, shape (D,).
        precondition: P.

    Returns:
        A descent direction, with a curvature of NaN if it is another one, and which one it is:
        0 for the one given, 1 for -P g over |lambda_{r+1}| + mu, 2 for -g.
    """
    if _is_descent(solved.direction, solved.slope, gradient_D):
        return solved, 0
    preconditioned_D = precondition(gradient_D) / -precondition.bulk
    slope = float(gradient_D @ preconditioned_D)
    kind = 1 if _is_descent(preconditioned_D, slope, gradient_D) else 2
    direction_D = preconditioned_D if kind == 1 else -gradient_D
    slope = float(gradient_D @ direction_D)
    return replace(solved, direction=direction_D, slope=slope, curvature=math.nan), kind


def require_finite(norm: float, number: int) -> None:
    """Refuse a Hessian product with NaN or inf entries, by its norm and number in the solve.

    Raises:
        ValueError: If the norm is not finite.
    """
    if not math.isfinite(norm):
        raise ValueError(
            f"Hessian product {number} has NaN or inf entries, though loss and gradient are "
            "finite; the weights are left as they were; look for a square root or a norm at zero, "
            "or compute in float64"
        )


def _is_descent(direction_D: Tensor, slope: float, gradient_D: Tensor) -> bool:
    """Whether the loss falls along a direction by more than rounding."""
    eps = torch.finfo(direction_D.dtype).eps
    scale = float(torch.linalg.vector_norm(direction_D) * torch.linalg.vector_norm(gradient_D))
    return math.isfinite(scale) and slope < -eps * scale < 0
