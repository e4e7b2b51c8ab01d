"""Number of samples and tensors of a batch in any container.

A batch is a tensor, or tensors in nested dicts, lists, tuples, dataclasses, or objects of other
libraries: `BatchEncoding`, `TensorDict`, torch-geometric's `Data`, or any object with attributes.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
import types
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

TARGET_KEYS = ("labels", "label", "targets", "target", "y")

# Frequent types without tensors.
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)

# The values in a container, and a function that rebuilds the container from new ones.
_Opened = tuple[list[Any], Callable[[list[Any]], Any]]


def num_samples(batch: Any) -> int:
    """Return the number of samples of a batch; 1 for None, the data of a closure.

    With targets by name ("labels", "label", "targets", "target", "y"), it is their first dimension;
    for a batch of graphs `num_graphs`; otherwise the first dimension of the first tensor that has
    one or, if that is 1, the most frequent one, since position ids and masks broadcast. For a list
    of single samples it is the length.

    Raises:
        ValueError: If it cannot be determined.
    """
    number = 1 if batch is None else _number(batch)
    if number is None:
        raise ValueError(
            "expected a batch whose number of samples is known, by a tensor with a first dimension "
            f"or by num_graphs, got {describe(batch)}; say what a batch counts in the mean: define "
            "weight(batch) in a subclass of hesscurv.Task"
        )
    return number


def num_rows(batch: Any) -> int:
    """Return the maximal number of parts that a batch can be split into; 1 if unknown."""
    number = None if batch is None else _number(batch)
    return 1 if number is None else number


def is_cuttable(batch: Any) -> bool:
    """Whether samples are rows of a batch's tensors; false for joined graphs."""
    if isinstance(batch, (list, tuple)) and _listed_samples(batch) is not None:
        return False
    if _is_graphs(batch) or isinstance(batch, PackedSequence):
        return False
    if isinstance(batch, Tensor):
        return True
    opened = _open(batch)
    return opened is None or all(map(is_cuttable, opened[0]))


def is_list_of_samples(batch: Any) -> bool:
    """Whether a batch is a list of single samples."""
    return isinstance(batch, (list, tuple)) and bool(_listed_samples(batch))


def counts_graphs_by_chance(batch: Any) -> bool:
    """Whether the number of averaged items of joined graphs is ambiguous: by masks, or no rows.

    The divisor of the mean cannot be read off the batch then.
    """
    if not _is_graphs(batch):
        return False
    tensors = tensors_of(batch)
    rows = {t.shape[0] for t in tensors if t.ndim}
    return num_rows(batch) not in rows or any(t.dtype == torch.bool for t in tensors)


def map_tensors(value: Any, fn: Callable[[Tensor], Any]) -> Any:
    """Apply a function to every tensor in a batch; containers are copied and keep their type."""
    return _map(value, fn, frozenset())


def tensors_of(value: Any) -> list[Tensor]:
    """Return every tensor that `map_tensors` finds, in order."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def leaves_of(value: Any) -> list[Any]:
    """Return the tensors of a batch, as `tensors_of`, with its numbers and strings, in order."""
    found: list[Any] = []
    _collect(value, found, frozenset())
    return found


def first_dimensions(batch: Any) -> tuple[int, ...]:
    """Return the first dimension of each tensor of a batch, 0-dimensional ones left out."""
    return tuple(t.shape[0] for t in tensors_of(batch) if t.ndim)


def describe(value: Any) -> str:
    """Describe a batch for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"a {type(value).__name__}"


# -- number of samples ------------------------------------------------------------------------


def _number(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim else None
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        listed = _listed_samples(value)
        if listed is not None:
            return listed or None
    for key in TARGET_KEYS:
        found = _number_of_targets(value, key)
        if found is not None:
            return found
    graphs = _num_graphs(value)
    if graphs is not None:
        return graphs
    if _is_graphs(value):
        return None  # its tensors have rows of nodes and of edges
    if _is_tensordict(value) and len(value.batch_size):
        return int(value.batch_size[0])
    opened = _open(value)
    numbers = [] if opened is None else [n for n in map(_number, opened[0]) if n is not None]
    if numbers:
        return numbers[0] if numbers[0] != 1 else _most_frequent(numbers)
    if opened is None and hasattr(value, "to") and hasattr(value, "__len__"):
        return len(value)  # an object that hides its tensors
    return None


def _number_of_targets(value: Any, key: str) -> int | None:
    if isinstance(value, Mapping):
        targets = value[key] if key in value.keys() else None  # noqa: SIM118 - TensorDict
    elif type(value) in (list, tuple) or _is_code(value):
        return None
    else:
        targets = getattr(value, key, None)
    return None if targets is None or targets is value else _number(targets)


def _num_graphs(value: Any) -> int | None:
    try:
        return operator.index(value.num_graphs)
    except (AttributeError, TypeError):
        return None


def _most_frequent(numbers: list[int]) -> int:
    return Counter(numbers).most_common(1)[0][0]


def _listed_samples(value: Sequence[Any]) -> int | None:
    """Return the length of a list of single samples; None for other lists, 0 if ambiguous.

    Single samples are containers of equal structure, each with a number or a 0-dimensional tensor
    among its tensors; or, as in detection, a list of images with a list of as many dicts.
    """
    if not value or not all(isinstance(v, (list, tuple, Mapping)) for v in value):
        return None
    if isinstance(value[-1], list) and len(value) == 2 and isinstance(value[0], (list, tuple)):
        images, targets = value
        if (
            targets
            and len(images) == len(targets)
            and all(isinstance(t, Mapping) for t in targets)
            and len(set(first_dimensions(value))) > 1
        ):
            return len(targets)
    shapes = [_shapes(v) for v in value]
    if shapes[0] is None or any(s != shapes[0] for s in shapes):
        return None
    return len(value) if len(value) > 1 else 0


def _shapes(sample: Any) -> tuple[Any, ...] | None:
    """Return the shapes in a single sample; None for anything without a number in it."""
    values = list(sample.values()) if isinstance(sample, Mapping) else list(sample)
    shapes = tuple(
        tuple(v.shape) if isinstance(v, Tensor) else ()
        for v in values
        if isinstance(v, (Tensor, int, float))
    )
    return shapes if len(shapes) > 1 and () in shapes and set(shapes) != {()} else None


# -- tensors ----------------------------------------------------------------------------------


def _map(value: Any, fn: Callable[[Tensor], Any], outer: frozenset[int]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    opened = None if id(value) in outer else _open(value)
    if opened is None:
        return value
    children, rebuild = opened
    return rebuild([_map(child, fn, outer | {id(value)}) for child in children])


def _collect(value: Any, found: list[Any], outer: frozenset[int]) -> None:
    if isinstance(value, (Tensor, *_PLAIN)):
        found.append(value)
        return
    opened = None if id(value) in outer else _open(value)
    for child in () if opened is None else opened[0]:
        _collect(child, found, outer | {id(value)})


def _open(value: Any) -> _Opened | None:
    """Return the contents of a container, and how to rebuild it; None for anything else."""
    if value is None or isinstance(value, _PLAIN):
        return None
    if _is_tensordict(value) or _is_graphs(value):
        return _open_by_apply(value)
    if isinstance(value, PackedSequence):
        # The sizes of its steps stay on the CPU, whatever becomes of the data.
        return [value.data], lambda new: value._replace(data=new[0])
    if isinstance(value, Mapping):
        keys = list(value)
        return [value[k] for k in keys], lambda new: mapping_like(
            value, dict(zip(keys, new, strict=True))
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(value), lambda new: type(value)(*new)
    if isinstance(value, (list, tuple)):
        return list(value), lambda new: type(value)(new)
    if _is_code(value):
        return None
    names = _attribute_names(value)
    if not names:
        return None
    return [getattr(value, n) for n in names], lambda new: _with_attributes(value, names, new)


def _is_code(value: Any) -> bool:
    return isinstance(value, (type, types.ModuleType, nn.Module)) or inspect.isroutine(value)


def mapping_like(like: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return a mapping of the same type with other items."""
    if type(like) is dict or not isinstance(like, MutableMapping):
        return items
    out = copy.copy(like)  # a Hugging Face BatchEncoding stays one
    for key, item in items.items():
        out[key] = item
    return out


def _attribute_names(value: Any) -> list[str]:
    """Return the names of an object's attributes that hold tensors."""
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
    else:
        names = list(getattr(value, "__dict__", ()))
    return [name for name in names if _holds_tensors(getattr(value, name), 0)]


def _holds_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth > 8:
        return False
    if isinstance(value, Mapping):
        return any(_holds_tensors(v, depth + 1) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(v, depth + 1) for v in value)
    if _is_code(value):
        return False
    attributes = getattr(value, "__dict__", None) or {}
    return any(_holds_tensors(v, depth + 1) for v in attributes.values())


def _with_attributes(like: Any, names: list[str], values: list[Any]) -> Any:
    # Without calling __init__, whose processing of the tensors must not be repeated.
    out = _copy(like)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(out, name, value)
    return out


def _is_graphs(value: Any) -> bool:
    """Whether an object is like torch-geometric's `Data`: one graph, or several joined."""
    if isinstance(value, (Tensor, Mapping, list, tuple, str, nn.Module, type)):
        return False
    if _is_tensordict(value) or not callable(getattr(value, "to", None)):
        return False
    return callable(getattr(value, "apply", None)) or _num_graphs(value) is not None


def _is_tensordict(value: Any) -> bool:
    has_size = isinstance(getattr(value, "batch_size", None), torch.Size)
    return has_size and callable(getattr(value, "apply", None))


def _open_by_apply(value: Any) -> _Opened | None:
    """Open an object whose `apply` calls a function on each of its tensors."""
    if not callable(getattr(value, "apply", None)):
        names = _attribute_names(value)
        return [getattr(value, n) for n in names], lambda new: _with_attributes(value, names, new)
    found: list[Tensor] = []

    def note(tensor: Any) -> Any:
        if isinstance(tensor, Tensor):
            found.append(tensor)
        return tensor

    _copy_apart(value).apply(note)

    def rebuild(new: list[Any]) -> Any:
        left = iter(new)

        def replace(tensor: Any) -> Any:
            return next(left) if isinstance(tensor, Tensor) else tensor

        if not _is_tensordict(value):
            return _copy_apart(value).apply(replace)
        sizes = {t.shape[0] if t.ndim else None for t in new}
        size = [sizes.pop(), *value.batch_size[1:]] if len(sizes) == 1 else []
        same = all(a.shape == b.shape for a, b in zip(found, new, strict=True))
        device = new[0].device if new and value.device is not None else None
        return value.apply(replace, batch_size=value.batch_size if same else size, device=device)

    return found, rebuild


def _copy_apart(value: Any) -> Any:
    """Return a copy whose in-place `apply` does not change the original."""
    out = _copy(value)
    if not hasattr(type(value), "__copy__") and hasattr(out, "__dict__"):
        for name, held in list(vars(out).items()):
            if isinstance(held, (dict, list)):
                vars(out)[name] = copy.copy(held)
    return out


def _copy(value: Any) -> Any:
    """Return a shallow copy, even of an object whose `__getattr__` needs existing attributes."""
    kind: Any = type(value)
    is_plain = kind.__new__ is object.__new__ and hasattr(value, "__dict__")
    if not is_plain or hasattr(kind, "__copy__") or any(_slots(k) for k in kind.__mro__):
        return copy.copy(value)
    out = object.__new__(kind)
    vars(out).update(vars(value))
    return out


def _slots(kind: type) -> Any:
    return vars(kind).get("__slots__")
