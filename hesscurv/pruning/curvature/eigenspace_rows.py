"""Rows of a quadratic model from the top eigenspace of the Hessian."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers import eigsh
from hesscurv.objective.objective import Objective
from hesscurv.operators.hessian import HessianOperator
from hesscurv.pruning.weights import pruned_weights, refresh_


def eigenspace_rows(
    objective: Objective,
    params: tuple[Tensor, ...],
    batches: list[Any],
    rank: int,
    generator: torch.Generator,
) -> tuple[list[Tensor], int]:
    """Return ``sqrt|lambda_j| v_j^T`` of the top eigenpairs on some samples, and the matvecs.

    Args:
        objective: The model, the task and the selected parameters.
        params: Values at which the Hessian is taken.
        batches: The samples.
        rank: Number of pairs.
        generator: Generator of the starting block.

    Returns:
        The rows, (rank, p) for each parameter, and the number of matvecs.

    Cost:
        2 to 4 matvecs per pair, and a copy of the model.
    """
    for weight in pruned_weights(objective.model).values():
        refresh_(*weight)  # deepcopy refuses a masked weight with an autograd graph
    # On a copy, since the operator reads its weights from the model, which must not be written.
    model = copy.deepcopy(objective.model)
    found = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in zip(objective.layout.names, params, strict=True):
            found[name].copy_(value)
    operator = HessianOperator(
        model,
        objective.task,
        batches,
        list(objective.layout.names),
        compute_dtype=objective.dtype,
    )
    pairs = eigsh(operator, min(rank, operator.shape[0]), tol=1e-2, generator=generator)
    vectors = pairs.eigenvectors * pairs.eigenvalues.abs().sqrt()
    sizes = [p.numel() for p in params]
    return [part.mT.contiguous() for part in vectors.split(sizes)], pairs.num_matvecs
