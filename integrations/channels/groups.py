"""Groups of torch-pruning that stay valid while others are removed.

A group lists, for each of its layers, indices in the model as it was when the group was made.
Behind a concatenation one axis belongs to several groups: once one of them is removed, the indices
of the others shift. Here each group is updated for earlier removals.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
import torch_pruning as tp
from torch import nn

from hesscurv.integrations.channels.graph import remake_, repair_

_Attention = nn.MultiheadAttention
# A layer's node in the graph, and the pruning function for one of its sides.
Axis = tuple[Any, Callable[..., Any]]


class _Log:
    """Log of removals from each axis of a graph: root of the group and indices, in order."""

    def __init__(self) -> None:
        self.removed: dict[Axis, list[tuple[Any, list[int]]]] = {}

    def count(self, axis: Axis) -> int:
        return len(self.removed.get(axis, ()))

    def now(self, axis: Axis, idxs: Sequence[int], since: int) -> list[int]:
        """Return the present positions of indices, in order, omitting removed ones."""
        left = sorted(set(map(int, idxs)))
        for _, gone in self.removed.get(axis, [])[since:]:
            taken = set(gone)
            left = [i - sum(g < i for g in gone) for i in left if i not in taken]
        return left

    def only_by_itself(self, axis: Axis) -> bool:
        """Whether all removals from an axis were by groups rooted there."""
        return all(root is axis[0] for root, _ in self.removed.get(axis, []))


_logs: weakref.WeakKeyDictionary[Any, _Log] = weakref.WeakKeyDictionary()


def current_groups(groups: Iterable[Any]) -> list[Any]:
    """Check groups of torch-pruning, and remake outdated ones in place.

    Outdated are groups of a graph whose index mappings were wrong, and those made before others
    were removed.

    Returns:
        The groups.

    Raises:
        TypeError: If one is not a group of torch-pruning.
        ValueError: If one cannot be remade, since its root layer has lost other channels.
    """
    groups = list(groups)
    for group in groups:
        if not isinstance(group, tp.Group) or group._DG is None or not len(group):
            raise TypeError(
                f"expected groups of torch-pruning, got {type(group).__name__}; pass "
                "list(pruner.step(interactive=True))"
            )
    for graph in {id(g._DG): g._DG for g in groups}.values():
        repair_(graph)
    for group in groups:
        before = _contents(group)
        old = list(group.items)
        remake_(group)
        if _contents(group) != before:
            log, (dep, _) = _logs.get(group._DG), old[0]
            if log is not None and not log.only_by_itself((dep.target, dep.handler)):
                group.items[:] = old
                raise ValueError(
                    f"expected groups of the model as it is now, got one of {dep.target.name} that "
                    "was made before others were removed; pass all groups of a step at once"
                )
        else:
            group.items[:] = old
    return groups


def follow_removals_(groups: Iterable[Any]) -> None:
    """Replace the `prune` of each group by one that translates its indices after removals."""
    for group in groups:
        log = _logs.setdefault(group._DG, _Log())
        stamps = {axis: (log.count(axis), _size(group._DG, axis)) for axis in _axes(group)}
        group.prune = partial(_prune, group, log, stamps)


def _prune(
    group: Any,
    log: _Log,
    stamps: dict[Axis, tuple[int, int | None]],
    idxs: Sequence[int] | None = None,
    record_history: bool = True,
) -> None:
    """Stand in for `torch_pruning.Group.prune`."""
    if idxs is not None:
        dep = group[0].dep
        other = group._DG.get_pruning_group(dep.target.module, dep.handler, list(idxs))
        follow_removals_([other])
        other.prune(record_history=record_history)
        return
    items, left = list(group.items), []
    if not any(len(item[1]) for item in items):
        return  # all of its channels stay
    for item in items:
        dep, found = item[0], item[1]
        axis = (dep.target, dep.handler)
        since, size = stamps[axis]
        now, gone = log.now(axis, found, since), log.removed.get(axis, [])[since:]
        wanted = None if size is None else size - sum(len(g) for _, g in gone)
        if _size(group._DG, axis) != wanted:
            raise ValueError(
                f"expected {dep.target.name} with {wanted} channels, as left by the groups that "
                f"were removed, got {_size(group._DG, axis)}; it was pruned in another way since "
                "this group was made: make the group again"
            )
        if now or not found:
            left.append((type(items[0])(dep, now), axis))
    if not left or left[0][1] != (items[0][0].target, items[0][0].handler):
        _refuse(items[0][0].target.name)
    for item, _ in left:
        item.root_idxs = [None] * len(item.idxs)
    group.items[:] = [item for item, _ in left]
    attentions = {m: m.head_dim for i, _ in left if isinstance(m := i[0].target.module, _Attention)}
    type(group).prune(group, record_history=record_history)
    for attention, head_dim in attentions.items():
        keep_scale_(attention, head_dim)
    for item, axis in left:
        log.removed.setdefault(axis, []).append((left[0][1][0], list(item.idxs)))
    group.prune = partial(_refuse, items[0][0].target.name)


@torch.no_grad()
def keep_scale_(attention: nn.MultiheadAttention, head_dim: int) -> None:
    """Keep the softmax scale of an attention after its heads have become smaller.

    Args:
        attention: The module, whose queries are scaled in place.
        head_dim: The previous size of its heads.
    """
    scale, width = (attention.head_dim / head_dim) ** 0.5, attention.embed_dim
    weight = attention.in_proj_weight
    (attention.q_proj_weight if weight is None else weight[:width]).mul_(scale)
    if attention.in_proj_bias is not None:
        attention.in_proj_bias[:width].mul_(scale)


def _refuse(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(f"expected present channels of {name}, got a group that has been pruned")


def _axes(group: Any) -> list[Axis]:
    return [(item[0].target, item[0].handler) for item in group]


def _contents(group: Any) -> dict[Axis, list[int]]:
    return {axis: sorted(map(int, item[1])) for axis, item in zip(_axes(group), group, strict=True)}


def _size(graph: Any, axis: Axis) -> int | None:
    node, handler = axis
    if graph.is_out_channel_pruning_fn(handler):
        return graph.get_out_channels(node)
    return graph.get_in_channels(node)
