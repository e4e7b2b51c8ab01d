"""Linearizations: second derivatives applied to many vectors after one set-up.

Legend: a *block* is a tuple with one tensor (B, *shape) per parameter, B vectors at once. Each way
takes functions of the parameters and returns a map from block to block, ``None`` where it is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.fx import GraphModule

from hesscurv.operators.checks.failing_operation import CUT, is_cut, new_nodes
from hesscurv.operators.ways.tracing import (
    PlainZeros,
    load_forward_rules,
    mean_numel,
    trace_derivative,
    vectorize,
)

Params = tuple[Tensor, ...]
Block = tuple[Tensor, ...]
Product = tuple[Tensor | None, ...]
Linearization = Callable[[Block], Product]
LinearMap = Callable[[Tensor], Tensor]  # on outputs, (B, *outputs.shape) both ways

# A trace whose results have fewer entries than this, on average, is vectorised for so many vectors.
_SMALL_NUMEL, _SEVERAL = 2**15, 16


class NonFiniteLossError(ValueError):
    """The loss is NaN or infinite, so that it has no derivatives."""


# -- the Hessian of a scalar function ---------------------------------------------------------


def hessian_retained(loss: Callable[[Params], Tensor], params: Params) -> Linearization:
    """Build the gradient's graph once and pull each vector back through it (Pearlmutter 1994)."""
    return _loop(_gradient_graph(loss, params), params)


def hessian_batched(loss: Callable[[Params], Tensor], params: Params) -> Linearization:
    """Build the gradient's graph once and pull all vectors back at once."""
    return _batched(_gradient_graph(loss, params), params)


def hessian_vmapped(loss: Callable[[Params], Tensor], params: Params) -> Linearization:
    """Forward over reverse, vectorised: vmap of jvp(grad), nothing retained."""
    load_forward_rules()
    gradient = grad(lambda *p: loss(p), argnums=tuple(range(len(params))))
    return _with_plain_zeros(vmap(lambda *v: jvp(gradient, params, v)[1]))


def hessian_linearized(loss: Callable[[Params], Tensor], params: Params) -> Linearization:
    """Trace the derivative of the gradient once, constants folded, and run the trace per vector."""
    tangent = _traced_gradient(loss, params, in_place=True)
    return lambda block: _stack([tangent(*(v[i] for v in block)) for i in range(len(block[0]))])


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


# -- J^T C J for outputs z(params), Jacobian J and a curvature C on outputs --------------------


def gauss_newton_retained(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
) -> Linearization:
    """Retain the graphs of z and of u -> J^T u; J v is the latter's transpose."""
    return _gauss_newton_retained(outputs, curvature, params, batched=False)


def gauss_newton_batched(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
) -> Linearization:
    """As `gauss_newton_retained`, all vectors at once."""
    return _gauss_newton_retained(outputs, curvature, params, batched=True)


def gauss_newton_vmapped(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
) -> Linearization:
    """J v by vectorised forward mode, J^T u through a retained graph."""
    load_forward_rules()

    def forward(*tangents: Tensor) -> Tensor:
        return jvp(lambda *p: outputs(p), params, tangents)[1]

    push_forward = _with_plain_zeros(vmap(forward))
    return _gauss_newton_with(lambda *v: push_forward(v), outputs, curvature, params)


def gauss_newton_linearized(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
) -> Linearization:
    """J v by running a trace of the outputs' derivative on all vectors at once."""
    tangent = trace_derivative(lambda *p: outputs(p), params)
    return _gauss_newton_with(vmap(lambda *v: tangent(*v)), outputs, curvature, params)


# -- pieces -----------------------------------------------------------------------------------


def output_hessian(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], LinearMap]:
    """Return z -> (u -> Hessian of the loss in the outputs, times u), for blocks of u."""

    def at(outputs: Tensor) -> LinearMap:
        z = outputs.detach().requires_grad_()
        value = loss(z)
        _require_finite(value)
        (slope,) = torch.autograd.grad(value, z, create_graph=True, allow_unused=True)
        if slope is None or not slope.requires_grad:
            return torch.zeros_like

        def apply(block: Tensor) -> Tensor:
            # One at a time without vmap, for which some losses have no rule.
            many = len(block) > 1
            (out,) = torch.autograd.grad(
                slope,
                z,
                block if many else block[0],
                retain_graph=True,
                is_grads_batched=many,
                allow_unused=True,
            )
            return torch.zeros_like(block) if out is None else out.view_as(block)

        return apply

    return at


def scaled_identity(outputs: Tensor) -> LinearMap:
    """Return u -> u / n for n outputs: the curvature whose J^T C J is the empirical Fisher."""
    _require_finite(outputs)
    n = outputs.numel()
    return lambda block: block / n


def _gradient_graph(
    loss: Callable[[Params], Tensor], params: Params
) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [p.detach().requires_grad_() for p in params]
    value = loss(tuple(leaves))
    _require_finite(value)
    if not value.requires_grad:
        return [], leaves
    slopes = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    require_whole(slopes)
    return [s if s is not None and s.requires_grad else None for s in slopes], leaves  # type: ignore[misc]


def _loop(graph: tuple[list[Any], list[Tensor]], params: Params) -> Linearization:
    slopes, leaves = graph
    active = [i for i, s in enumerate(slopes) if s is not None]

    def apply(block: Block) -> Product:
        if not active:
            return (None,) * len(params)
        outs = []
        for j in range(block[0].shape[0]):
            outs.append(
                torch.autograd.grad(
                    [slopes[i] for i in active],
                    leaves,
                    [block[i][j] for i in active],
                    retain_graph=True,
                    allow_unused=True,
                )
            )
        return _stack(outs)

    return apply


def _batched(graph: tuple[list[Any], list[Tensor]], params: Params) -> Linearization:
    slopes, leaves = graph
    active = [i for i, s in enumerate(slopes) if s is not None]

    def apply(block: Block) -> Product:
        if not active:
            return (None,) * len(params)
        return torch.autograd.grad(
            [slopes[i] for i in active],
            leaves,
            [block[i] for i in active],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )

    return apply


def _traced_gradient(
    loss: Callable[[Params], Tensor], params: Params, *, in_place: bool = False
) -> GraphModule:
    gradient = grad(lambda *p: loss(p), argnums=tuple(range(len(params))))
    return trace_derivative(gradient, params, in_place=in_place)


def _gauss_newton_retained(
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
    *,
    batched: bool,
) -> Linearization:
    leaves = [p.detach().requires_grad_() for p in params]
    z = outputs(tuple(leaves))
    middle = curvature(z)
    if not z.requires_grad:
        return lambda block: (None,) * len(params)
    u = torch.zeros_like(z).requires_grad_()
    pulled = torch.autograd.grad(z, leaves, u, create_graph=True, allow_unused=True)
    require_whole(pulled)
    active = [i for i, p in enumerate(pulled) if p is not None]

    def pull_back(block: Tensor) -> Product:
        return torch.autograd.grad(
            z, leaves, block, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    def push_forward(pieces: list[Tensor]) -> Tensor:
        (out,) = torch.autograd.grad(
            [pulled[i] for i in active], u, pieces, retain_graph=True, is_grads_batched=batched
        )
        return out

    def apply(block: Block) -> Product:
        if batched:
            return pull_back(middle(push_forward([block[i] for i in active])))
        forward = [push_forward([block[i][j] for i in active]) for j in range(len(block[0]))]
        return _stack([pull_back(middle(row.unsqueeze(0))[0]) for row in forward])

    return apply


def _gauss_newton_with(
    push_forward: Callable[..., Tensor],
    outputs: Callable[[Params], Tensor],
    curvature: Callable[[Tensor], LinearMap],
    params: Params,
) -> Linearization:
    z, pull_back = vjp(lambda *p: outputs(p), *params)  # type: ignore[misc]
    middle, back = curvature(z), vmap(pull_back)
    return lambda block: back(middle(push_forward(*block)))


def _with_plain_zeros(product: Callable[..., Any]) -> Callable[[Block], Any]:
    """Call a product in forward mode; without torch's zero tangents, where these hinder it.

    Some rules (of `mse_loss`) write to them, which torch 2.13 refuses. Making them real zeros costs
    a call into Python for every operation, so it is done only where it is needed.
    """
    plain = False

    def apply(block: Block) -> Any:
        nonlocal plain
        if not plain:
            try:
                return product(*block)
            except RuntimeError as error:
                if "ZeroTensor" not in str(error):
                    raise
            plain = True
        with PlainZeros():
            return product(*block)

    return apply


def _stack(rows: list[Any]) -> Product:
    if len(rows) == 1:  # a view: at a million parameters, copies take their time
        return tuple(None if piece is None else piece.unsqueeze(0) for piece in rows[0])
    return tuple(
        None if columns[0] is None else torch.stack(columns) for columns in zip(*rows, strict=True)
    )


def require_whole(slopes: Sequence[Tensor | None]) -> None:
    """Refuse a backward pass that autograd would leave parts of out when it is differentiated."""
    if any(map(is_cut, new_nodes([s for s in slopes if s is not None], ()))):
        raise RuntimeError(CUT)


def _require_finite(value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteLossError(
            f"expected a finite loss, got {value.detach().flatten()[:3].tolist()}; lower the "
            "learning rate, or look for overflow or bad inputs with "
            "torch.autograd.set_detect_anomaly(True)"
        )
