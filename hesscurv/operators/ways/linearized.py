"""Products by running a trace of the derivative, recorded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.fx import GraphModule

from hesscurv.operators.ways.linearization import (
    Block,
    Linearization,
    LinearMap,
    Params,
    Product,
    gauss_newton_with,
    stack,
)
from hesscurv.operators.ways.tracing import mean_numel, trace_derivative, vectorize

# A trace whose results have fewer entries than this, on average, is vectorised for so many vectors.
_SMALL_NUMEL, _SEVERAL = 2**15, 16


def hessian_linearized(loss: Callable[[Params], Tensor], params: Params) -> Linearization:
    """Trace the derivative of the gradient once, constants folded, and run the trace per vector."""
    tangent = _traced_gradient(loss, params, in_place=True)
    return lambda block: stack([tangent(*(v[i] for v in block)) for i in range(len(block[0]))])


def hessian_linearized_batched(loss: Callable[[Params], Tensor], params: Params) -> Linearization:
    """Trace the derivative of the gradient once, and run the trace on several vectors at once.

    Of small networks, where vmap's own work in every call counts, the trace is vectorised once for
    a fixed number of vectors; what is left of a block goes through vmap.
    """
    tangent = _traced_gradient(loss, params)
    many = vmap(lambda *v: tangent(*v))  # given a module itself, vmap prints it in every call
    if mean_numel(tangent) > _SMALL_NUMEL:
        return lambda block: many(*block)
    several: list[Callable[..., Any]] = []

    def apply(block: Block) -> Product:
        parts = []
        for start in range(0, len(block[0]), _SEVERAL):
            part = tuple(v[start : start + _SEVERAL].contiguous() for v in block)
            if len(part[0]) == _SEVERAL and not several:
                several.append(vectorize(tangent, part))
            parts.append((several[0] if len(part[0]) == _SEVERAL else many)(*part))
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    return apply


def gauss_newton_linearized(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
) -> Linearization:
    """J v by running a trace of the outputs' derivative on all vectors at once."""
    tangent = trace_derivative(lambda *p: outputs(p), params)
    return gauss_newton_with(vmap(lambda *v: tangent(*v)), outputs, curvature, params)


def _traced_gradient(
    loss: Callable[[Params], Tensor], params: Params, *, in_place: bool = False
) -> GraphModule:
    gradient = grad(lambda *p: loss(p), argnums=tuple(range(len(params))))
    return trace_derivative(gradient, params, in_place=in_place)
