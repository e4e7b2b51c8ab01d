"""Equal chunks: tensors that a model splits into equal parts must stay divisible.

``x.chunk(2, 1)`` determines its parts by their number. If more channels are removed from one part
than from another, the boundaries shift. So some of these channels are kept, with zero weights
wherever they are read: the model computes what it would without them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch_pruning as tp

from hesscurv.integrations.channels.slices import READERS

_logger = logging.getLogger(__name__)
_TYPES = tp.ops.OPTYPE
# Readers for which zeroing weights does not remove a channel.
_OTHERS = (_TYPES.MHA, _TYPES.LSTM, _TYPES.CUSTOMIZED)


def level_sections_(groups: Sequence[Any]) -> dict[Any, set[int]]:
    """Keep enough channels for equal chunks; they are taken out of the groups in place.

    Args:
        groups: Groups of torch-pruning, made for the present model.

    Returns:
        By layer, the inputs to be zeroed instead: of dense layers and convolutions.
    """
    staying: dict[Any, set[int]] = {}
    names: set[str] = set()
    while (uneven := _find_uneven(groups)) is not None:
        node, idx = uneven
        group = next(g for g in groups if idx in _idxs_at(g, node))
        for module, inputs in _let_stay_(group, node, idx).items():
            staying.setdefault(module, set()).update(inputs)
        names.add(group[0].dep.target.name)
    # Another channel of the group may take the kept ones along.
    for group in groups:
        for dep, idxs in group:
            if dep.handler in READERS and dep.target.module in staying:
                staying[dep.target.module] -= set(map(int, idxs))
    if names:
        _logger.warning(
            "some channels of %s stay, with weights of zero behind them, since the model cuts what "
            "they are in into equal chunks; with out_channel_groups={layer: number of chunks} for "
            "the pruner they go from all chunks alike",
            ", ".join(sorted(names)),
        )
    return staying


def _find_uneven(groups: Sequence[Any]) -> tuple[Any, int] | None:
    """Return a node that splits into equal chunks, and an index in it to keep; None if all fit."""
    nodes = {
        item[0].target: None
        for group in groups
        for item in group
        if item[0].target.type == _TYPES.SPLIT and item[0].target.module.split_sizes
    }
    for node in nodes:
        # A split by sizes that the code computes needs no equal parts.
        if type(node.grad_fn).__name__ != "SplitBackward0":
            continue
        gone = {i for group in groups for i in _idxs_at(group, node)}
        start, left = 0, []
        for size in node.module.split_sizes:
            part = [i for i in range(start, start + size) if i in gone]
            left.append((size - len(part), part))
            start += size
        most = max(kept for kept, _ in left)
        for kept, part in left:
            if kept < most and part:
                return node, part[-1]
    return None


def _idxs_at(group: Any, node: Any) -> set[int]:
    return {int(i) for dep, idxs in group if dep.target is node for i in idxs}


def _let_stay_(group: Any, node: Any, idx: int) -> dict[Any, set[int]]:
    """Take all channels out of a group that would remove an index of a node."""
    graph, (dep, roots) = group._DG, next(iter(group))
    if any(item[0].target.type in _OTHERS for item in group):
        raise ValueError(
            f"expected as many channels to go from each chunk of what {dep.target.name} writes, "
            "got more from some; pass out_channel_groups={layer: number of chunks} to the pruner"
        )
    module, handler = dep.target.module, dep.handler
    stay = [
        r for r in roots if idx in _idxs_at(graph.get_pruning_group(module, handler, [r]), node)
    ]
    inputs: dict[Any, set[int]] = {}
    for item in graph.get_pruning_group(module, handler, stay):
        if item.dep.handler in READERS:
            inputs.setdefault(item.dep.target.module, set()).update(map(int, item.idxs))
    left = [r for r in roots if r not in set(stay)]
    if left:
        group.items[:] = graph.get_pruning_group(module, handler, left).items
    else:
        for place, item in enumerate(group.items):
            group.items[place] = type(item)(item[0], [])
            group.items[place].root_idxs = []
    return inputs
