"""Products by vectorised forward mode: nothing retained for the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import grad, jvp, vmap

from hesscurv.operators.ways.linearization import (
    Block,
    Linearization,
    LinearMap,
    Params,
    gauss_newton_with,
)
from hesscurv.operators.ways.tracing import PlainZeros, load_forward_rules


def hessian_vmapped(loss: Callable[[Params], Tensor], params: Params) -> Linearization:
    """Forward over reverse, vectorised: vmap of jvp(grad), nothing retained."""
    load_forward_rules()
    gradient = grad(lambda *p: loss(p), argnums=tuple(range(len(params))))
    return _with_plain_zeros(vmap(lambda *v: jvp(gradient, params, v)[1]))


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
    return gauss_newton_with(lambda *v: push_forward(v), outputs, curvature, params)


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
