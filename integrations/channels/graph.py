"""Corrected index mappings of torch-pruning's graph for splits, concatenations and flattens.

torch-pruning 1.6.1 maps channels across these operations wrongly for models outside of its
assumptions: it assigns readers of a split in reverse order of traversal; gives every reader its own
part, even if two read the same; omits inputs of a concatenation that need no gradient; considers
only dimension 1; and keeps the offsets of a split after a pruning step. Here the shapes of the
operations are read off the traced autograd graph, and the resulting mappings replace its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import torch_pruning as tp
from torch import nn

from hesscurv.integrations.channels.shapes import Edges, dimension, shape_of, signed

_TYPES = tp.ops.OPTYPE
_repaired: weakref.WeakSet[Any] = weakref.WeakSet()


def repair_(graph: Any) -> bool:
    """Put exact index mappings into a graph of torch-pruning, once.

    Args:
        graph: A built `torch_pruning.DependencyGraph`. Operations whose channels cannot be located,
            such as behind a general reshape, keep torch-pruning's mappings.

    Returns:
        Whether the graph was changed; existing groups must be remade then.
    """
    if graph in _repaired:
        return False
    _repaired.add(graph)
    edges = Edges(graph)
    nodes = list(graph.module2node.values())
    splits = [n for n in nodes if n.type == _TYPES.SPLIT and _divide(graph, n, edges)]
    joins = {n: found for n in nodes if n.type == _TYPES.CONCAT and (found := _join(n, edges))}
    for node, (sizes, sources) in joins.items():
        _fill_in(graph, node, sizes, sources)
    strides = {n: s for n in nodes if n.type == _TYPES.RESHAPE and (s := _stride(n, edges))}
    slices = {n: a for n in nodes if n.type == _TYPES.SLICE and (a := _slice_axis(n, edges))}
    if not (splits or joins or strides or slices):
        return False
    for node in graph.module2node.values():
        node.dependencies.clear()
    graph._build_dependency(graph.module2node)
    for node in splits:
        for k, part in enumerate(node.outputs):
            if node.module.split_sizes is not None:
                _connect(node, [part], _Part(node.module, "split_sizes", k), 0)
            else:
                _connect(node, [part], None, 0)
    for node, (sizes, _) in joins.items():
        places: dict[Any, list[int]] = {}
        for k, source in enumerate(node.inputs):
            places.setdefault(source, []).append(k)
        for source, ks in places.items():
            parts = [None if sizes is None else _Part(node.module, "concat_sizes", k) for k in ks]
            _connect_each(node, source, parts, 1)
    for node, stride in strides.items():
        for source in dict.fromkeys(node.inputs):
            _connect(node, [source], stride, 0)
        _connect(node, list(dict.fromkeys(node.outputs)), None, 0)
    for node, is_along in slices.items():
        for source in dict.fromkeys(node.inputs):
            _connect(node, [source], _Sliced(node.module) if is_along == "channels" else None, 0)
    return True


def remake_(group: Any) -> None:
    """Remake a group in place from its root layer and that layer's indices.

    Entries that the pruner has emptied on purpose stay empty: the keys and values shared by several
    heads.
    """
    graph = group._DG
    (dep, idxs), *_ = list(group)
    emptied = {(id(d.target), d.handler) for d, i in group if len(i) == 0}
    new = graph.get_pruning_group(dep.target.module, dep.handler, list(idxs))
    for place, item in enumerate(new):
        if (id(item.dep.target), item.dep.handler) in emptied:
            item = type(item)(item.dep, [])
            item.root_idxs = []
            new[place] = item
    group.items[:] = new.items


class _Mappings(list[Any]):
    """The two index mappings of a dependency, with fixed ones that torch-pruning cannot replace."""

    def __init__(self) -> None:
        super().__init__([None, None])
        self._fixed: set[int] = set()

    def fix(self, slot: int, mapping: Any) -> None:
        super().__setitem__(slot, mapping)
        self._fixed.add(slot)

    def __setitem__(self, slot: Any, mapping: Any) -> None:
        if slot not in self._fixed:
            super().__setitem__(slot, mapping)


class _Part:
    """Maps indices between a whole and one of its consecutive parts, whose sizes may change.

    Args:
        op: The operation of torch-pruning that holds the sizes.
        sizes: The name of its attribute, a list.
        place: Index of the part.
    """

    def __init__(self, op: Any, sizes: str, place: int) -> None:
        self._op, self._sizes, self._place = op, sizes, place

    def to_node(self, idxs: Sequence[Any]) -> list[Any]:
        """Map indices of the part to those of the whole."""
        start = sum(getattr(self._op, self._sizes)[: self._place])
        return [i._replace(idx=i.idx + start) for i in idxs]

    def from_node(self, idxs: Sequence[Any]) -> list[Any]:
        """Map indices of the whole to those of the part, dropping others."""
        sizes = getattr(self._op, self._sizes)
        start = sum(sizes[: self._place])
        stop = start + sizes[self._place]
        return [i._replace(idx=i.idx - start) for i in idxs if start <= i.idx < stop]


class _Stride:
    """Maps a channel to its consecutive entries of a flattened axis, and back."""

    def __init__(self, stride: int, *, flattens: bool) -> None:
        self._stride, self._flattens = stride, flattens

    def to_node(self, idxs: Sequence[Any]) -> list[Any]:
        return self._spread(idxs) if self._flattens else self._gather(idxs)

    def from_node(self, idxs: Sequence[Any]) -> list[Any]:
        return self._gather(idxs) if self._flattens else self._spread(idxs)

    def _spread(self, idxs: Sequence[Any]) -> list[Any]:
        s = self._stride
        return [i._replace(idx=i.idx * s + k) for i in idxs for k in range(s)]

    def _gather(self, idxs: Sequence[Any]) -> list[Any]:
        return list(dict.fromkeys(i._replace(idx=i.idx // self._stride) for i in idxs))


class _Sliced:
    """Maps channels to those of a slice with changing bounds, and back."""

    def __init__(self, op: Any) -> None:
        self._op = op

    def to_node(self, idxs: Sequence[Any]) -> list[Any]:
        start, stop, step = self._op.start, self._op.end, self._op.step
        kept = [i for i in idxs if start <= i.idx < stop and (i.idx - start) % step == 0]
        return [i._replace(idx=(i.idx - start) // step) for i in kept]

    def from_node(self, idxs: Sequence[Any]) -> list[Any]:
        return [i._replace(idx=i.idx * self._op.step + self._op.start) for i in idxs]


def _connect(node: Any, others: Sequence[Any], mapping: Any, slot: int) -> None:
    """Fix the mapping of all dependencies between a node and others, in both directions."""
    for other in others:
        count = sum(dep.target is other for dep in node.dependencies)
        _connect_each(node, other, [mapping] * count, slot)


def _connect_each(node: Any, other: Any, mappings: Sequence[Any], slot: int) -> None:
    outward = [dep for dep in node.dependencies if dep.target is other]
    inward = [dep for dep in other.dependencies if dep.target is node]
    for deps, direction in ((outward, "from_node"), (inward, "to_node")):
        for dep, mapping in zip(deps, mappings, strict=True):
            if not isinstance(dep.index_mapping, _Mappings):
                dep.index_mapping = _Mappings()
            dep.index_mapping.fix(slot, getattr(mapping, direction, None))


def _divide(graph: Any, node: Any, edges: Edges) -> bool:
    """Insert a node between a split and the readers of each part; return whether possible."""
    fn = node.grad_fn
    source, output = fn.next_functions[0]
    shape, axis = shape_of(source, output), edges.axis(source, output)
    count = len(getattr(fn, "_input_metadata", ()))
    if shape is None or axis is None:
        return False
    reading: dict[Any, list[int]] = {}
    for k in range(count):
        for reader, _ in edges.readers.get((fn, k), ()):
            if reader not in reading:
                reading[reader] = [o for s, o in reader.next_functions if s is fn]
    for reader, outputs in reading.items():
        known = edges.node_of.get(reader)
        if known is None or sum(n is node for n in known.inputs) != len(outputs):
            return False  # a layer called several times
    parts = [_new_node(graph, f"part {k} of {node.name}") for k in range(count)]
    for reader, outputs in reading.items():
        known, left = edges.node_of[reader], iter(outputs)
        known.inputs = [parts[next(left)] if n is node else n for n in known.inputs]
        for k in outputs:
            parts[k].add_output(known)
    for part in parts:
        part.add_input(node)
    node.outputs = parts
    op, dim = node.module, dimension(fn, len(shape))
    op.split_sizes = op.offsets = None
    if dim == axis:
        op.split_sizes = [shape_of(fn, k)[dim] for k in range(count)]
        op.offsets = [sum(op.split_sizes[:k]) for k in range(count + 1)]
    return True


def _join(node: Any, edges: Edges) -> tuple[list[int] | None, list[Any]] | None:
    """Return the sizes and source nodes of the inputs of a concatenation, or None.

    Sizes are None along other dimensions than channels; nodes are None for inputs that need no
    gradient and for parameters that are not pruned.
    """
    fn, shape = node.grad_fn, shape_of(node.grad_fn, 0)
    found = (edges.axis(*edge) for edge in fn.next_functions if edge[0] is not None)
    axis = next((a for a in found if a is not None), None)
    if shape is None or axis is None or node.module.concat_sizes is None:
        return None
    left, sources, sizes = iter(node.inputs), [], []
    dim = dimension(fn, len(shape))
    for source, output in fn.next_functions:
        known = None if source is None else edges.node_of.get(source)
        size = None if source is None else shape_of(source, output)
        sources.append(None if known is None else next(left, None))
        sizes.append(None if size is None else size[dim])
    if next(left, None) is not None or len(node.inputs) != sum(s is not None for s in sources):
        return None
    if dim != axis:
        return None, sources
    if None in sizes:
        # Adjacent inputs without nodes are merged.
        first = sizes.index(None)
        stop = next((k for k in range(first, len(sizes)) if sizes[k] is not None), len(sizes))
        if None in sizes[stop:]:
            return None
        missing = shape[dim] - sum(s for s in sizes if s is not None)
        sizes[first:stop], sources[first:stop] = [missing], [None]
    return [s for s in sizes if s is not None], sources


def _fill_in(graph: Any, node: Any, sizes: list[int] | None, sources: list[Any]) -> None:
    """Set the sizes of a concatenation, and add nodes for inputs that torch-pruning omits."""
    if sizes is None:
        return
    node.inputs = []
    for k, source in enumerate(sources):
        if source is None:
            source = _new_node(graph, f"part {k} of {node.name}, of fixed size")
            source.add_output(node)
        node.add_input(source)
    node.module.concat_sizes = sizes


def _stride(node: Any, edges: Edges) -> _Stride | None:
    """Return how a reshape between (n, c, ...) and (n, c * ...) maps channels, or None."""
    source, output = node.grad_fn.next_functions[0]
    if source is None:
        return None
    before, after = shape_of(source, output), shape_of(node.grad_fn, 0)
    if before is None or after is None or before[0] != after[0]:
        return None
    if len(before) > 2 and len(after) == 2 and edges.axis(source, output) == 1:
        return _Stride(prod(before[2:]), flattens=True)
    is_unflattened = len(before) == 2 and len(after) > 2 and prod(after[1:]) == before[1]
    if is_unflattened and edges.is_read_by_channel(node.grad_fn):
        return _Stride(prod(after[2:]), flattens=False)
    return None


def _slice_axis(node: Any, edges: Edges) -> str | None:
    """Return the axis of a slice, "channels" or "another axis"; None if unknown."""
    source, output = node.grad_fn.next_functions[0]
    if source is None:
        return None
    shape, axis = shape_of(source, output), edges.axis(source, output)
    if shape is None or axis is None:
        return None
    dim = dimension(node.grad_fn, len(shape))
    if dim != axis:
        return "another axis"
    op, size = node.module, shape[dim]
    op.start, op.end = (
        min(max(i + size if i < 0 else i, 0), size)
        for i in (signed(node.grad_fn._saved_start), signed(node.grad_fn._saved_end))
    )
    return "channels"


def _new_node(graph: Any, name: str) -> Any:
    node = tp.dependency.Node(nn.Identity(), None, name)
    graph.module2node[node.module] = node
    return node
