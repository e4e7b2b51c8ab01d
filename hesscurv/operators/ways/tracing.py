"""Recording of a derivative as a graph, whose tangent-free part runs once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hesscurv.operators.ways.constant_folding import fold_constants
from hesscurv.operators.ways.simplification import accumulate_in_place, find_written, simplify


def trace_derivative(
    fn: Callable[..., Any], params: tuple[Tensor, ...], *, in_place: bool = False
) -> fx.GraphModule:
    """Return tangents -> (derivative of `fn` at `params`) tangents, as a graph without `fn`'s code.

    As `torch.func.linearize`, which in torch 2.13 crashes on `mse_loss` and gives wrong products
    where a tangent is written to in place (LSTM), since it folds what is written to; and simpler by
    the rules of `simplify`.

    Args:
        fn: A function of the parameters; it runs while it is traced, and not again.
        params: Where the derivative is taken.
        in_place: Whether to compute in place where possible: faster, not for vmap.

    Raises:
        RuntimeError: If `fn` writes to its arguments or to a constant on the way, or cannot be
            traced.
    """
    load_forward_rules()
    try:
        # Without `fn`'s own writes in place, which hold up the folding.
        graph = _record(functionalize(fn), params)
    except RuntimeError:  # no rule for what some of them turn into
        graph = _record(fn, params)
    written = _simplify(graph, in_place=in_place)
    return fold_constants(graph, written)


def vectorize(tangent: fx.GraphModule, block: tuple[Tensor, ...]) -> fx.GraphModule:
    """Record ``vmap(tangent)`` for blocks like this one, without vmap's work in every call.

    Args:
        tangent: What `trace_derivative` returned.
        block: Tangents (B, *shape), contiguous; later blocks have the same shapes and strides.
    """
    graph = make_fx(vmap(lambda *v: tangent(*v)))(*block)
    _simplify(graph, in_place=True)
    return graph


def mean_numel(graph: fx.GraphModule) -> float:
    """Return how many entries an intermediate result has on average."""
    metas = [n.meta["tensor_meta"] for n in graph.graph.nodes if "tensor_meta" in n.meta]
    sizes = [meta.shape.numel() for meta in metas if hasattr(meta, "shape")]
    return sum(sizes) / max(len(sizes), 1)


def _simplify(graph: fx.GraphModule, *, in_place: bool) -> set[fx.Node]:
    """Simplify a graph; return the nodes whose memory it writes to."""
    written = find_written(graph.graph)
    simplify(graph.graph, written)
    if in_place:
        accumulate_in_place(graph.graph, written)
    graph.recompile()
    return written


def _record(fn: Callable[..., Any], params: tuple[Tensor, ...]) -> fx.GraphModule:
    def tangent(*tangents: Tensor) -> Any:
        with PlainZeros():
            return jvp(fn, params, tangents)[1]

    return make_fx(tangent)(*(p.new_zeros(p.shape) for p in params))


@cache
def load_forward_rules() -> None:
    """Let torch load its rules of forward mode, which warns of torch's own code, deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")  # a FutureWarning from torch 2.14 on
        with torch.autograd.forward_ad.dual_level():
            zero = torch.zeros(1, dtype=torch.float32, device="cpu")
            torch.autograd.forward_ad.make_dual(zero, zero.clone())


class PlainZeros(TorchDispatchMode):
    """Make zero tangents real zeros: the tracer computes with constants, and these have no memory.

    Without it, torch 2.13 ends in a segmentation fault where it traces `mse_loss`.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._efficientzerotensor.default:
            func = torch.ops.aten.zeros.default
        return func(*args, **(kwargs or {}))
