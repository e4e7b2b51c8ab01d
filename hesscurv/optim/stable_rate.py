"""The learning rate up to which gradient descent is stable, for a largest curvature."""

from __future__ import annotations

from typing import Any


def stable_rate(curvature: float, group: dict[str, Any] | None = None) -> float:
    r"""Return the largest stable learning rate of (heavy-ball) gradient descent on a quadratic.

    .. math:: 2 / \lambda, \qquad 2 (1 + \beta) / \lambda \text{ with momentum}, \qquad
        \frac{2 (1 + \beta)}{(1 + 2 \beta) \lambda} \text{ with Nesterov's}

    and, with dampening d, :math:`2 (1 + \beta) / ((1 - d) \lambda)` for momentum.

    Args:
        curvature: The largest eigenvalue :math:`\lambda > 0`.
        group: A parameter group of `torch.optim.SGD`, whose momentum, dampening and nesterov count.

    References:
        Polyak, "Some methods of speeding up the convergence of iteration methods" (1964).
        Cohen et al., "Gradient descent on neural networks typically occurs at the edge of
        stability", ICLR 2021, section 2 and appendix B.

    Example:
        >>> hesscurv.optim.stable_rate(10.0)
        0.2
        >>> round(hesscurv.optim.stable_rate(10.0, {"momentum": 0.9}), 4)
        0.38
    """
    group = group or {}
    beta = float(group.get("momentum") or 0.0)
    if not beta:
        return 2 / curvature
    if group.get("nesterov"):
        return 2 * (1 + beta) / ((1 + 2 * beta) * curvature)
    return 2 * (1 + beta) / ((1 - float(group.get("dampening") or 0.0)) * curvature)
