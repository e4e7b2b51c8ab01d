"""Choice between sample space and products, by predicted cost."""

from __future__ import annotations

import logging
import warnings
from math import prod

import torch
from torch import nn

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.residuals import ConvergenceWarning
from hesscurv.eigensolvers.sample_space.solver import sample_space
from hesscurv.objective.data.samples import num_rows
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.sample_space.output_rows import NoRowsError
from hesscurv.operators.sample_space.sample_rows import MOST_ROWS, require_rows

logger = logging.getLogger(__name__)

_MOST_OUTPUTS = 256  # of a sample, for whose root so many products in the outputs are taken
_EIGH = 5  # multiply-adds of a product of matrices in the time that eigh takes, over n^3
_OVERHEAD = 2e7  # the same of a pass's own work, a millisecond of one core: what small nets cost
_MARGIN = 0.7  # of the predicted cost of products: both are rough


def sample_space_if_cheaper(
    H: LinearOperator,
    k: int,
    *,
    which: str,
    tol: float,
    generator: torch.Generator | None,
    progress: bool,
) -> Eigenpairs | None:
    """Return the pairs by sample space where that is predicted to be cheaper, else None.

    None as well where rows cannot be had, or the dtype carries fewer digits than `tol` needs: the
    caller then takes products.
    """
    if which == "SA":
        return None
    state = None if generator is None else generator.get_state()
    try:
        G = require_rows(H)
        if G.objective.precision != "highest":
            return None
        rows, products = predicted_costs(G, k)
        logger.info("predicted multiply-adds: %.2g by rows, %.2g by products", rows, products)
        if rows > _MARGIN * products:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            return sample_space(H, k, which=which, tol=tol, generator=generator, progress=progress)
    except (NoRowsError, ConvergenceWarning, ValueError, torch.OutOfMemoryError) as error:
        logger.info("products are taken: %s", error)
    if generator is not None and state is not None:
        generator.set_state(state)
    return None


def predicted_costs(H: CurvatureOperator, k: int) -> tuple[float, float]:
    """Return the multiply-adds of the top k pairs by rows, and by products.

    From a forward pass over a few samples, whose operations are counted. Infinite for rows where
    there are too many.

    Returns:
        Both costs.
    """
    from torch.utils.flop_counter import FlopCounterMode  # which an import need not wait for

    H.refresh()
    local, dim = H.products.local, H.shape[0]
    few = local.micro_batches.few(2)
    if few is None:
        return float("inf"), 0.0
    objective = H.objective
    with objective.environment(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        z = objective.outputs(objective.parameters(), few)
    samples = sum(num_rows(batch) for batch in objective.batches)
    forward = counter.get_total_flops() / 2 / max(1, num_rows(few)) * samples
    if z.ndim == 0 or prod(z.shape[1:]) > _MOST_OUTPUTS:
        return float("inf"), forward
    with objective.environment(), torch.enable_grad():
        columns = len(local.curvature.output_rows(z.detach(), few))
    n = samples * columns
    if n > MOST_ROWS or n < k:
        return float("inf"), forward
    matvecs = 1.25 * k + 30
    products = matvecs * (4.5 * forward + _OVERHEAD) + 2 * matvecs**2 * dim
    passes = 1 + columns * len(objective.batches.kept or [None])
    # Of linear layers that see one vector a sample, nothing of size n^2 D or n k D is computed.
    factored = 0 if z.ndim > 2 else _numel_of_linear_layers(H)
    multiplied_out = dim - factored
    gram = 0.6 * n**2 * multiplied_out + _EIGH * n**3
    vectors = 3 * k * (n * multiplied_out + samples * factored)
    return (1 + columns) * forward + passes * _OVERHEAD + gram + vectors, products


def _numel_of_linear_layers(H: CurvatureOperator) -> int:
    own = {id(p): p.numel() for p in H.objective.model.parameters() if p.requires_grad}
    layers = (m for m in H.objective.model.modules() if isinstance(m, nn.Linear))
    return min(H.shape[0], sum(own.get(id(layer.weight), 0) for layer in layers))
