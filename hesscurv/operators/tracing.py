"""A function's derivative as a recorded graph: what does not depend on the tangents runs once."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize, jvp
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

_ZEROS = (
    torch.ops.aten.zeros.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten._new_zeros_with_same_feature_meta.default,
)


def trace_derivative(fn: Callable[..., Any], params: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Return tangents -> (derivative of `fn` at `params`) tangents, as a graph without `fn`'s code.

    As `torch.func.linearize`, which in torch 2.13 crashes on `mse_loss` and gives wrong products
    where a tangent is written to in place (LSTM), since it folds what is written to.

    Args:
        fn: A function of the parameters; it runs while it is traced, and not again.
        params: Where the derivative is taken.

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
    written = _find_written(graph.graph)
    _drop_added_zeros(graph, written)
    with warnings.catch_warnings():
        # Folding warns about its own intermediate graph.
        warnings.filterwarnings("ignore", "Attempted to insert a get_attr Node")
        return split_const_subgraphs(graph, skip_folding_node_fn=written.__contains__)


def _record(fn: Callable[..., Any], params: tuple[Tensor, ...]) -> fx.GraphModule:
    def tangent(*tangents: Tensor) -> Any:
        with PlainZeros():
            return jvp(fn, params, tangents)[1]

    return make_fx(tangent)(*(p.new_empty(()).expand_as(p) for p in params))


@cache
def load_forward_rules() -> None:
    """Let torch load its rules of forward mode, which warns of torch's own code, deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        with torch.autograd.forward_ad.dual_level():
            torch.autograd.forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


class PlainZeros(TorchDispatchMode):
    """Make zero tangents real zeros: the tracer computes with constants, and these have no memory.

    Without it, torch 2.13 ends in a segmentation fault where it traces `mse_loss`.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._efficientzerotensor.default:
            func = torch.ops.aten.zeros.default
        return func(*args, **(kwargs or {}))


def _drop_added_zeros(graph: fx.GraphModule, written: set[fx.Node]) -> None:
    """Replace x + 0 by x: tangents that vanish come as zeros, and adding them takes its time."""
    zeros = {
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target in _ZEROS and node not in written
    }
    for node in list(graph.graph.nodes):
        if node.target is not torch.ops.aten.add.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        for kept, other in (node.args, node.args[::-1]):
            same = isinstance(kept, fx.Node) and _kind_of(kept) == _kind_of(node) is not None
            if other in zeros and same and kept not in written and node not in written:
                node.replace_all_uses_with(kept)
                graph.graph.erase_node(node)
                break
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _kind_of(node: fx.Node) -> Any:
    meta = node.meta.get("tensor_meta")
    return None if meta is None else (meta.shape, meta.dtype)


def _find_written(graph: fx.Graph) -> set[fx.Node]:
    """Find the nodes whose memory is written to, which must not be folded.

    Folded, it would be written to again in every run, and before what reads it first.
    """
    targets = [target for node in graph.nodes for target in _targets(node, writes=True)]
    return set().union(*map(_memory_of, targets))


def _memory_of(node: fx.Node) -> set[fx.Node]:
    """Follow views back to the node that made the memory."""
    if node.op != "call_function":
        raise RuntimeError(f"cannot trace a function that writes to its {node.op} {node.name}")
    chain = {node}
    for source in _targets(node, writes=False):
        chain |= _memory_of(source)
    return chain


def _targets(node: fx.Node, *, writes: bool) -> list[fx.Node]:
    """The arguments that a node writes to, or whose memory its output shares."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem or node.target is torch.ops.aten._unsafe_view.default:
        return [] if writes else [node.args[0]]  # type: ignore[list-item]
    schema = getattr(node.target, "_schema", None)
    found = []
    for i, argument in enumerate(schema.arguments if schema else []):
        alias = argument.alias_info
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if alias is not None and (alias.is_write or not writes):
            found += [given] if isinstance(given, fx.Node) else list(filter(_is_node, given or ()))  # type: ignore[arg-type]
    return found


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)
