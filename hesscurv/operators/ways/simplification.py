"""Peephole rules for recorded graphs of tensor operations that are linear in their inputs.

A derivative as torch records it copies its inputs, adds zeros, turns tensors to and fro, and takes
new memory for every sum. Each rule here removes one of these, and changes no value but by rounding.
Nodes whose memory is written to, and what they are made of, are never touched: `find_written`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten

ZEROS = (
    _aten.zeros.default,
    _aten.zeros_like.default,
    _aten.new_zeros.default,
    _aten._new_zeros_with_same_feature_meta.default,
)
# Zero where their first argument is, and where any of the first two is.
_LINEAR = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.clone.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten.neg.default,
    _aten.div.Tensor,
    _aten.div.Scalar,
    _aten.sum.default,
    _aten.sum.dim_IntList,
    _aten.mean.dim,
    _aten.threshold_backward.default,
    _aten.tanh_backward.default,
    _aten.sigmoid_backward.default,
    _aten.max_pool2d_with_indices_backward.default,
    _aten.gather.default,
}
_BILINEAR = {_aten.mul.Tensor, _aten.mul.Scalar, _aten.mm.default, _aten.bmm.default}
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.alias.default,
    _aten.detach.default,
}
# Computed into another term's memory, and into their first argument: the in-place form, or the
# name of the output.
_ACCUMULATED: dict[Any, Any] = {
    _aten.mm.default: _aten.addmm_.default,
    _aten.bmm.default: _aten.baddbmm_.default,
    _aten.mul.Tensor: _aten.addcmul_.default,
}
_IN_PLACE: dict[Any, tuple[Any, str | None]] = {
    _aten.mul.Tensor: (_aten.mul_.Tensor, None),
    _aten.tanh_backward.default: (_aten.tanh_backward.grad_input, "grad_input"),
    _aten.threshold_backward.default: (_aten.threshold_backward.grad_input, "grad_input"),
    _aten.sigmoid_backward.default: (_aten.sigmoid_backward.grad_input, "grad_input"),
}
# Their results have memory of their own, which nothing else refers to; so have those of the
# operations that the rules here put in.
_FRESH = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.mul.Tensor,
    _aten.add.Tensor,
    _aten.sub.Tensor,
    _aten.neg.default,
    _aten.tanh_backward.default,
    _aten.threshold_backward.default,
    _aten.sigmoid_backward.default,
    _aten.convolution.default,
    _aten.max_pool2d_with_indices_backward.default,
    _aten.add_.Tensor,
    *_ACCUMULATED.values(),
    *(target for target, _ in _IN_PLACE.values()),
}


def simplify(graph: fx.Graph, written: set[fx.Node]) -> None:
    """Drop copies of inputs, additions of zeros, and views that change nothing; in place."""
    _drop_copies(graph, written)
    _drop_added_zeros(graph, written)
    _drop_idle_views(graph, written)
    graph.eliminate_dead_code()


def accumulate_in_place(graph: fx.Graph, written: set[fx.Node]) -> None:
    """Add to, and overwrite, intermediate results that nothing else needs; in place.

    The graph can then no longer be vectorised by vmap, nor differentiated.
    """
    fixed = written | _constants(graph)
    for node in list(graph.nodes):
        if node.target is _aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            for total, term in (node.args, node.args[::-1]):
                if _may_overwrite(total, node, fixed) and isinstance(term, fx.Node):
                    _add_into(graph, node, total, term, written)
                    break
    for node in list(graph.nodes):
        if node.target in _IN_PLACE and _may_overwrite(node.args[0], node, fixed):
            target, name = _IN_PLACE[node.target]
            _replace(graph, node, target, node.args, {name: node.args[0]} if name else {})
    graph.eliminate_dead_code()


def find_written(graph: fx.Graph) -> set[fx.Node]:
    """Find the nodes whose memory is written to, by whichever view of it.

    Raises:
        RuntimeError: If an input or a constant is written to.
    """
    targets = [target for node in graph.nodes for target in _targets(node, writes=True)]
    written = set().union(*map(_memory_of, targets))
    for node in graph.nodes:  # the other views of the same memory
        if any(source in written for source in _targets(node, writes=False)):
            written.add(node)
    return written


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Find the nodes that no input reaches: they may be computed once for many runs."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "placeholder" and all(source in constant for source in node.all_input_nodes):
            constant.add(node)
    return constant


def _add_into(
    graph: fx.Graph, node: fx.Node, total: fx.Node, term: fx.Node, written: set[fx.Node]
) -> None:
    into = _ACCUMULATED.get(term.target)
    once = len(term.users) == 1 and not term.kwargs
    # The term is computed later than it was: what it is made of must still be the same then.
    lasting = all(isinstance(a, fx.Node) and a not in written for a in term.args)
    if into is not None and once and lasting and term not in written:
        _replace(graph, node, into, (total, *term.args), {})
    else:
        _replace(graph, node, _aten.add_.Tensor, (total, term), {})


def _replace(graph: fx.Graph, node: fx.Node, target: Any, args: Any, kwargs: Any) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, tuple(args), kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _may_overwrite(value: Any, node: fx.Node, fixed: set[fx.Node]) -> bool:
    """Whether a node may be computed into an argument's memory."""
    return (
        isinstance(value, fx.Node)
        and value.target in _FRESH
        and len(value.users) == 1
        and sum(arg is value for arg in node.args) == 1
        and value not in fixed
        and node not in fixed
        and _same(value, node)
    )


def _drop_copies(graph: fx.Graph, written: set[fx.Node]) -> None:
    """Use an input itself where a copy of it, into new zeros, is only read."""
    for node in list(graph.nodes):
        if node.target is not _aten.copy_.default or len(node.args) != 2 or node.kwargs:
            continue
        zeros, source = node.args
        same = _kind_of(node) == _kind_of(source) is not None
        new = zeros.target in ZEROS and len(zeros.users) == 1
        if same and new and source.op == "placeholder" and node not in written:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            graph.erase_node(zeros)


def _drop_added_zeros(graph: fx.Graph, written: set[fx.Node]) -> None:
    zero: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node in written or node.op != "call_function":
            continue
        if _is_zero(node, zero):
            zero.add(node)
        elif node.target is _aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            for kept, other in (node.args, node.args[::-1]):
                if other in zero and _same(kept, node) and kept not in written:
                    node.replace_all_uses_with(kept)
                    graph.erase_node(node)
                    break


def _is_zero(node: fx.Node, zero: set[fx.Node]) -> bool:
    target, args = node.target, node.args
    if target in ZEROS:
        return True
    if target in _LINEAR:
        return args[0] in zero
    if target in _BILINEAR:
        return args[0] in zero or args[1] in zero
    if target in (_aten.add.Tensor, _aten.sub.Tensor):
        return args[0] in zero and args[1] in zero
    if target is _aten.convolution.default:
        return (args[0] in zero or args[1] in zero) and (args[2] is None or args[2] in zero)
    if target is operator.getitem and _target_of(args[0]) is _aten.convolution_backward.default:
        slope, inputs, weight = args[0].args[:3]  # type: ignore[union-attr]
        other = (weight, inputs, None)[args[1]]  # type: ignore[index]
        return slope in zero or other in zero
    return False


def _drop_idle_views(graph: fx.Graph, written: set[fx.Node]) -> None:
    """Drop views to the same shape, and a transposition of a transposition."""
    turns = {_aten.t.default, _aten.transpose.int}
    for node in list(graph.nodes):
        if node.op != "call_function" or node in written or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if source in written:
            continue
        if node.target in _VIEWS and _same(source, node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif node.target in turns and source.target is node.target:
            first = source.args[0]
            if source.args[1:] == node.args[1:] and first not in written:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _same(value: Any, node: fx.Node) -> bool:
    return isinstance(value, fx.Node) and _kind_of(value) == _kind_of(node) is not None


def _kind_of(node: fx.Node) -> Any:
    meta = node.meta.get("tensor_meta")
    return None if meta is None else (meta.shape, meta.dtype, meta.stride)


def _target_of(node: Any) -> Callable[..., Any] | str | None:
    return node.target if isinstance(node, fx.Node) else None


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
    if node.target is operator.getitem or node.target is _aten._unsafe_view.default:
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
