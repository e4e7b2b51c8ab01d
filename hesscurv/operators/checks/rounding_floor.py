r"""Rounding of products where a loss is flat, as that of an overfit network.

The curvature of a cross-entropy in the outputs is :math:`C = diag(p) - p p^T`. Where one class has
all the probability its entries are the differences of numbers near 1, of which eps is left: each
entry of C is off by about eps, however small C is, and :math:`u^T J^T C J v` by about
eps :math:`\|J u\| \|J v\|`. That is known from the outputs alone.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from hesscurv.operators.local_product import LocalProduct
from hesscurv.operators.ways.output_curvature import output_hessian

logger = logging.getLogger(__name__)

# Of eps times the size of what cancels: a few operations each add their rounding.
_TIMES_EPS = 10.0


def rounding_floor(local: LocalProduct, batch: Any, u_D: Tensor, v_D: Tensor) -> float:
    r"""Return about how large the rounding of ``u . (H v)`` may be, whatever H is.

    ``10 eps (||J u|| ||C J v|| + ||J v|| ||C J u||) / 2``, with the outputs' slopes J u by
    differences, and the loss's curvature C where the outputs are of size 1 and nothing saturates.

    Args:
        local: What multiplies.
        batch: Some samples.
        u_D: A vector.
        v_D: Another one.

    Returns:
        The floor; 0 where the loss does not come as a function of outputs.

    Cost: five forward passes.
    """
    objective = local.objective
    eps = torch.finfo(local.objective.dtype).eps

    def measure() -> float:
        params, task = objective.parameters(), objective.task_parts
        scale = torch.stack([p.abs().max() for p in params if p.numel()]).max().clamp(min=1e-3)

        def slope(x_D: Tensor) -> Tensor:
            h = eps ** (1 / 3) * float(scale) / float(x_D.abs().max())
            pieces = list(local.layout.split(x_D).values())
            up, down = (
                objective.outputs(
                    tuple(p + side * h * d for p, d in zip(params, pieces, strict=True)), batch
                )
                for side in (1, -1)
            )
            return (up - down) / (2 * h)

        with torch.no_grad():
            z = objective.outputs(params, batch)
            slopes = [slope(u_D), slope(v_D)]
        z = z / z.abs().max().clamp(min=1)
        curved = output_hessian(lambda out: task.loss(out, batch))(z)(torch.stack(slopes))
        left, right = (float(s.double().norm()) for s in slopes)
        bent_left, bent_right = (float(c.double().norm()) for c in curved)
        return _TIMES_EPS * eps * (left * bent_right + right * bent_left) / 2

    try:
        floor = objective.run(measure)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a loss of no parts, or of outputs that must not be scaled
        logger.info("the rounding of flat losses is not known here: %s", error)
        return 0.0
    return float(floor)
