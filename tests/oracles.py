"""Dense curvature matrices by plain loops over the model itself, sharing no code with the library.

All of them run the problem's model in place, in the mode that the problem asks for, so they take a
deep copy. They are exact to rounding in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import cases
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@cache
def dense(name: str, kind: str, batches: int | None = None) -> Tensor:
    """The "hessian", "ggn" or "fisher" of a registered case, or of its first batches; once."""
    return MATRICES[kind](cases.build(name, batches))


def dense_hessian(problem: cases.Problem) -> Tensor:
    """Sum of w_b Hessian(L_b): double backward, one row at a time."""
    rows_sum: Any = 0
    for model, params, batch, weight in _batches(problem):
        loss = problem.loss(model, batch)
        slopes = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        slope = _flat(slopes, params)
        rows = [_flat(_row(entry, params), params) for entry in slope]
        rows_sum = rows_sum + weight * torch.stack(rows)
    return rows_sum


def dense_ggn(problem: cases.Problem) -> Tensor:
    """Sum of w_b J^T C J with an explicit Jacobian and an explicit Hessian of the loss in z."""
    total: Any = 0
    for model, params, batch, weight in _batches(problem):
        z = problem.outputs(model, batch)
        jacobian = torch.stack([_flat(_row(entry, params), params) for entry in z.flatten()])
        curvature = torch.autograd.functional.hessian(
            lambda flat, batch=batch, z=z: problem.output_loss(flat.view_as(z), batch),
            z.detach().flatten(),
        )
        total = total + weight * jacobian.T @ curvature @ jacobian
    return total


def dense_fisher(problem: cases.Problem) -> Tensor:
    """Mean of g g^T over the samples, one backward pass for each."""
    total: Any = 0
    for model, params, batch, weight in _batches(problem):
        z = problem.outputs(model, batch)
        n = z.shape[0]
        for i in range(n):
            loss = problem.output_loss(z[i : i + 1], _sample(batch, i))
            gradient = _flat(_row(loss, params), params)
            total = total + weight / n * torch.outer(gradient, gradient)
    return total


MATRICES = {"hessian": dense_hessian, "ggn": dense_ggn, "fisher": dense_fisher}


def _batches(
    problem: cases.Problem,
) -> Iterator[tuple[nn.Module, list[Tensor], Any, float]]:
    # A closure has captured its model, which a copy would not be.
    model = problem.model if problem.batches is None else copy.deepcopy(problem.model)
    found = dict(model.named_parameters())
    params = [found[name] for name in problem.selected()]
    batches = [None] if problem.batches is None else problem.batches
    sizes = [_size(batch) for batch in batches]
    if problem.training is not None:
        model.train(problem.training)
    # Fused attention has no second derivative; the plain one computes the same.
    with sdpa_kernel(SDPBackend.MATH):
        for batch, size in zip(batches, sizes, strict=True):
            yield model, params, batch, size / sum(sizes)


def _row(entry: Tensor, params: list[Tensor]) -> tuple[Any, ...]:
    if not entry.requires_grad:
        return (None,) * len(params)
    return torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)


def _flat(pieces: Any, params: list[Tensor]) -> Tensor:
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(pieces, params, strict=True)]
    return torch.cat([piece.reshape(-1) for piece in filled])


def _size(batch: Any) -> int:
    if batch is None:
        return 1
    if isinstance(batch, Tensor):
        return len(batch)
    return len(next(iter(batch.values()))) if hasattr(batch, "values") else len(batch[0])


def _sample(batch: Any, i: int) -> Any:
    if hasattr(batch, "values"):
        return {key: value[i : i + 1] for key, value in batch.items()}
    return tuple(value[i : i + 1] for value in batch)
