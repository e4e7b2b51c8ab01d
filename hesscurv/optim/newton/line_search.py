"""Step length along a direction, and trust in the quadratic model for the next step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A step length that decreases the loss enough.

    Args:
        length: t > 0.
        loss: f(t).
    """

    length: float
    loss: float


def armijo(
    evaluate: Callable[[float], float],
    loss: float,
    slope: float,
    *,
    first: float,
    decrease: float,
    shrink: float,
    max_backtracks: int,
) -> Step | None:
    r"""Shorten a step until :math:`f(t) \le f(0) + c\, t\, f'(0)` (Armijo's condition).

    Args:
        evaluate: f, at a length t; NaN and infinity count as no decrease.
        loss: f(0).
        slope: f'(0), negative.
        first: The first t.
        decrease: c, between 0 and 1.
        shrink: The factor between one t and the next.
        max_backtracks: How often to shorten.

    Returns:
        The first such t; None if there is none, or none that decreases f by more than rounding.

    Cost: an evaluation for each t.

    References:
        Nocedal, Wright, "Numerical optimization", 2nd edition, algorithm 3.1.
    """
    t = first
    for _ in range(max_backtracks + 1):
        value = evaluate(t)
        # Where t f'(0) drowns in f(0), the condition alone would let f stay as it is.
        if math.isfinite(value) and value < loss and value <= loss + decrease * t * slope:
            return Step(t, value)
        t *= shrink
    return None


def next_damping(
    damping: float, ratio: float, *, refused: bool, bounds: tuple[float, float]
) -> float:
    r"""Return the damping for the next step (Levenberg-Marquardt).

    Args:
        damping: mu.
        ratio: The actual decrease over that which the quadratic model predicts.
        refused: Whether no decrease was found at all.
        bounds: The least and the largest mu.

    A shortened step or negative curvature alone do not raise it, since the line search and the
    stop of conjugate gradients have answered them: raising it then left losses of physics-informed
    networks 5 to 20 times higher after the same work.

    References:
        Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", J. SIAM 11
        (1963). Martens, "Deep learning via Hessian-free optimization", ICML 2010.
    """
    if refused:
        damping *= 10
    elif ratio < 0.25:
        damping *= 3
    elif ratio > 0.75:
        damping /= 3
    return min(max(damping, bounds[0]), bounds[1])
