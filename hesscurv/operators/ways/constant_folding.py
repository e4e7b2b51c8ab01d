"""Constant folding of recorded graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx


def fold_constants(module: fx.GraphModule, kept: set[fx.Node]) -> fx.GraphModule:
    """Compute the nodes that no input reaches, and hold the results that others use; in place.

    As `torch.fx.experimental.const_fold`, which fails on such graphs before torch 2.8.

    Args:
        module: A graph of tensor operations, as `make_fx` records it.
        kept: Nodes to compute in every run: those whose memory is written to.

    Returns:
        The module.

    Memory: that of the results; intermediate ones are freed as soon as nothing needs them.
    """
    graph = module.graph
    values: dict[fx.Node, Any] = {}
    left: dict[fx.Node, int] = {}  # how many folded nodes still need a value
    folded: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "get_attr" and node not in kept:
            values[node] = _attribute(module, str(node.target))
        elif (
            node.op == "call_function"
            and node not in kept
            and all(source in values for source in node.all_input_nodes)
        ):
            values[node] = None  # not yet computed
            folded.append(node)
    for node in values:
        left[node] = sum(user in values for user in node.users)
    with torch.no_grad():
        for node in folded:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for source in node.all_input_nodes:
                left[source] -= 1
                if left[source] == 0 and all(user in values for user in source.users):
                    values[source] = None
    for number, node in enumerate(folded):
        if any(user not in values for user in node.users):
            _hold(module, node, f"_folded_{number}", values[node])
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _hold(module: fx.GraphModule, node: fx.Node, name: str, value: Any) -> None:
    """Let the users of a node take a value that the module holds instead."""
    if isinstance(value, Tensor):
        module.register_buffer(name, value)
    else:  # of an operation with several results
        setattr(module, name, value)
    with module.graph.inserting_before(node):
        new = module.graph.create_node("get_attr", name)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _attribute(module: fx.GraphModule, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
