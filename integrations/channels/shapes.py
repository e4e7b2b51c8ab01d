"""Channel axes of a traced model's tensors, from the attributes of autograd nodes."""

from __future__ import annotations

from typing import Any

import torch_pruning as tp

_TYPES = tp.ops.OPTYPE
_FIRST_AXIS = (_TYPES.CONV, _TYPES.DEPTHWISE_CONV, _TYPES.BN, _TYPES.GN, _TYPES.IN)
_LAST_AXIS = (_TYPES.LINEAR, _TYPES.LN, _TYPES.EMBED, _TYPES.MHA)
_SIZED = (_TYPES.SPLIT, _TYPES.CONCAT, _TYPES.SLICE)


class Edges:
    """The tensors between the nodes of a graph: their readers and shapes.

    Args:
        graph: A `torch_pruning.DependencyGraph`, with its traced autograd graph.

    Attributes:
        node_of: The graph's nodes by autograd operation.
        readers: For an operation and one of its outputs, the operations that read it, with the
            index of the input.
    """

    def __init__(self, graph: Any) -> None:
        self.node_of = {node.grad_fn: node for node in graph.module2node.values() if node.grad_fn}
        self.readers: dict[Any, list[tuple[Any, int]]] = {}
        seen, stack = set(self.node_of), list(self.node_of)
        while stack:
            fn = stack.pop()
            for place, (source, output) in enumerate(getattr(fn, "next_functions", ())):
                if source is None:
                    continue
                self.readers.setdefault((source, output), []).append((fn, place))
                if source not in seen:
                    seen.add(source)
                    stack.append(source)

    def axis(self, source: Any, output: int) -> int | None:
        """Return the channel axis of an output, or None if unknown."""
        moves: list[tuple[int, ...]] = []
        while source is not None:
            found, node = shape_of(source, output), self.node_of.get(source)
            if found is None:
                return None
            shape: tuple[int, ...] = found
            if len(shape) == 2 and not moves:
                return 1
            if node is not None and node.type == _TYPES.PARAMETER:
                return None
            if node is not None and node.type in (*_FIRST_AXIS, *_LAST_AXIS):
                is_first = node.type in _FIRST_AXIS
                if is_first and len(shape) == len(_kernel(node.module)) + 1:
                    return None  # without a batch
                axis = 1 if is_first else len(shape) - 1
                for move in reversed(moves):
                    axis = move.index(axis)
                return axis
            order = _permutation(source, len(shape))
            if order is not None:
                moves.append(order)
                shape = tuple(shape[order.index(d)] for d in range(len(shape)))
            source, output = _alike(source, shape, node is not None and node.type in _SIZED)
        return None

    def is_read_by_channel(self, fn: Any) -> bool:
        """Whether an operation's output reaches a convolution through operations of equal shape."""
        shape, seen, stack = shape_of(fn, 0), {fn}, [fn]
        while stack:
            for reader, _ in self.readers.get((stack.pop(), 0), ()):
                node = self.node_of.get(reader)
                if node is not None and node.type in _FIRST_AXIS:
                    return True
                if reader not in seen and shape_of(reader, 0) == shape:
                    seen.add(reader)
                    stack.append(reader)
        return False


def shape_of(fn: Any, output: int) -> tuple[int, ...] | None:
    """Return the shape of an output of an operation, as recorded by autograd."""
    noted = getattr(fn, "_input_metadata", ())
    return tuple(map(int, noted[output].shape)) if output < len(noted) else None


def dimension(fn: Any, ndim: int) -> int:
    """Return the dimension that an operation ran along."""
    return signed(fn._saved_dim) % ndim


def signed(number: int) -> int:
    """Return an integer that autograd stored unsigned."""
    return number - 2**64 if number >= 2**63 else number


def _kernel(module: Any) -> tuple[int, ...]:
    return getattr(module, "kernel_size", ()) or (0,)


def _permutation(fn: Any, ndim: int) -> tuple[int, ...] | None:
    """Return the input axis of each output axis of a transpose."""
    name, order = type(fn).__name__, list(range(ndim))
    if name == "PermuteBackward0":
        return tuple(signed(d) % ndim for d in fn._saved_dims)
    if name == "TransposeBackward0":
        a, b = signed(fn._saved_dim0) % ndim, signed(fn._saved_dim1) % ndim
        order[a], order[b] = b, a
        return tuple(order)
    if name == "TBackward0":
        return tuple(reversed(order))
    return None


def _alike(fn: Any, shape: tuple[int, ...], is_resized: bool) -> tuple[Any, int]:
    """Return the input with the same axes as an operation's output, or (None, 0).

    Pooling changes the spatial sizes, a concatenation or a slice the size of one axis.
    """
    for matches in (
        lambda found: found == shape,
        lambda found: len(found) == len(shape) and (is_resized or found[:2] == shape[:2]),
    ):
        for source, output in fn.next_functions:
            found = None if source is None else shape_of(source, output)
            if found is not None and matches(found):
                return source, output
    return None, 0
