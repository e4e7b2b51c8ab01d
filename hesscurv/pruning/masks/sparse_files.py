"""Sparse files: storage of pruned models without their zeros.

A masked weight is stored as its surviving values and their positions: one bit per entry, or the
indices of the survivors if these take less space, below about one in 32.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.linalg.device_memory import free_memory
from hesscurv.pruning.masks.state_dicts import dense_state_dict, masks_of
from hesscurv.storage.checked_files import read_checked, write_checked

_FORMAT = "hesscurv sparse weights"
_VERSION = 1
_MOST_ENTRIES = 2**62


def save_sparse(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a model's state to one file, pruned weights without their zeros, atomically.

    Weights whose pruning was made permanent by ``prune.remove`` are detected by their zeros. The
    file has a checksum and no pickled objects. Values are stored bit by bit, except that a negative
    zero, which masking leaves of a negative weight, becomes positive.

    Args:
        model: The module, pruned or not; torch.compile and DDP wrappers are unwrapped.
        path: The file to write; its folder must exist.

    Returns:
        The size of the file in bytes.

    Raises:
        TypeError: If the state dict holds anything but dense tensors.
        FileNotFoundError: If the folder does not exist.
        DiskFullError: If the disk is full; an older file of this name is untouched.

    Cost:
        A copy of the state on the CPU, and its file in memory.

    Example:
        >>> net = copy.deepcopy(model)
        >>> hesscurv.pruning.apply_masks_(net, {"0.weight": torch.arange(12).reshape(3, 4) > 2})
        >>> nbytes = hesscurv.pruning.save_sparse(net, "sparse.pt")
        >>> state = hesscurv.pruning.load_sparse("sparse.pt")
        >>> torch.equal(state["0.weight"], net[0].weight)
        True
    """
    state, masks = dense_state_dict(model), masks_of(model)
    entries: list[dict[str, Any]] = []
    values: dict[str, list[Tensor]] = {}
    places: list[Tensor] = []
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            got = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"expected dense tensors in the state dict, got {got} for {name!r}; use torch.save"
            )
        # Two names of one tensor are stored once.
        key = (tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            entries.append({"name": name, "same_as": seen[key]})
            continue
        seen[key] = name
        tensor = tensor.detach().cpu()
        mask = masks.get(name)
        kept = (tensor != 0 if mask is None else mask.cpu()).flatten()
        count = int(kept.sum())
        where, place = _pack(kept, count)
        is_sparse = mask is not None or _saves(tensor, count, place)
        flat = tensor.flatten()
        dtype = str(tensor.dtype).removeprefix("torch.")
        values.setdefault(dtype, []).append(flat[kept] if is_sparse else flat)
        if is_sparse:
            places.append(place)
        entries.append(
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": dtype,
                "where": where if is_sparse else "all",
                "count": count if is_sparse else tensor.numel(),
                "masked": mask is not None,
            }
        )
    return write_checked(
        path,
        {
            "format": _FORMAT,
            "version": _VERSION,
            "entries": entries,
            # One tensor per dtype: each tensor in a file has an overhead of some hundred bytes.
            "values": {dtype: torch.cat(parts) for dtype, parts in values.items()},
            "places": torch.cat(places)
            if places
            else torch.empty(0, dtype=torch.uint8, device="cpu"),
        },
    )


def load_sparse(path: str | os.PathLike[str], *, masks: bool = False) -> OrderedDict[str, Tensor]:
    """Read a state dict from a file of `save_sparse`.

    Args:
        path: The file.
        masks: False returns the state dict of a dense model, for `load_state_dict`; True that of
            the pruned one, with ``weight_orig`` and ``weight_mask``, for `load_pruned_`.

    Returns:
        A state dict of CPU tensors. Masked entries are zero, in ``weight_orig`` too.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder.
        ValueError: If the file is damaged, not from `save_sparse`, or of another version, or its
            dense content does not fit in memory.

    Cost:
        The file in memory, and the dense state.

    Example:
        >>> net = copy.deepcopy(model)
        >>> hesscurv.pruning.apply_masks_(net, {"0.weight": torch.arange(12).reshape(3, 4) > 2})
        >>> _ = hesscurv.pruning.save_sparse(net, "sparse.pt")
        >>> list(hesscurv.pruning.load_sparse("sparse.pt", masks=True))[:3]
        ['0.bias', '0.weight_orig', '0.weight_mask']
    """
    path = Path(path)
    data = read_checked(path)
    if data.get("format") != _FORMAT:
        raise ValueError(f"expected a file of save_sparse, got another kind in {path}")
    if data.get("version") != _VERSION:
        raise ValueError(
            f"expected format version {_VERSION}, got {data.get('version')} in {path}; read it "
            "with the hesscurv that wrote it"
        )
    try:
        entries = _entries(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; {_REMEDY}") from error
    _require_memory(path, entries, masks)
    try:
        return _rebuild(entries, data, masks)
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; {_REMEDY}") from error


_REMEDY = "take another copy, or save it again"


@dataclass(frozen=True)
class _Entry:
    """Description of one tensor in a file."""

    name: str
    same_as: str | None = None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    where: str = "all"
    count: int = 0
    masked: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_places(self) -> int:
        """The number of bytes of the positions."""
        return 0 if self.where == "all" else _num_bytes(self.where, self.numel, self.count)


def _entries(data: dict[str, Any]) -> list[_Entry]:
    """Return the entries, validated against each other and the stored data."""
    entries = [_Entry(**entry) for entry in data["entries"]]
    values = {dtype: len(stored) for dtype, stored in data["values"].items()}
    claimed, places = dict.fromkeys(values, 0), 0
    for entry in filter(lambda entry: entry.same_as is None, entries):
        sizes = [*entry.shape, entry.count, _MOST_ENTRIES - entry.numel, entry.numel - entry.count]
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError(f"{entry.name!r} of shape {entry.shape} with {entry.count} values")
        if entry.where not in ("all", "bits", "indices") or (
            entry.where == "all" and entry.count != entry.numel
        ):
            raise ValueError(f"{entry.name!r}, {entry.where}: {entry.count} of {entry.numel}")
        if data["values"][entry.dtype].dtype != getattr(torch, entry.dtype):
            raise ValueError(f"{entry.name!r} is not of {entry.dtype}")
        claimed[entry.dtype] += entry.count
        places += entry.num_places
    if claimed != values or places != len(data["places"]):
        raise ValueError(f"{values} values are stored, and {claimed} named")
    return entries


def _require_memory(path: Path, entries: list[_Entry], masks: bool) -> None:
    """Refuse what cannot be made dense: a few bytes may stand for any number of zeros."""
    needed = sum(
        entry.numel * getattr(torch, entry.dtype).itemsize * (2 if masks and entry.masked else 1)
        for entry in entries
        if entry.same_as is None
    )
    largest = max((entry.numel for entry in entries), default=0)
    free = free_memory(torch.device("cpu"))
    if needed + largest > free:  # unpacked positions take one byte per entry
        raise ValueError(
            f"expected weights that fit into {free / 1e9:.3g} GB of free memory, got "
            f"{needed / 1e9:.3g} GB when dense in {path}; load it on a larger machine if it is "
            "meant to be so large"
        )


def _rebuild(entries: list[_Entry], data: dict[str, Any], masks: bool) -> OrderedDict[str, Tensor]:
    state: OrderedDict[str, Tensor] = OrderedDict()
    next_value = dict.fromkeys(data["values"], 0)
    next_place = 0
    for entry in entries:
        name = entry.name
        if entry.same_as is not None:
            same = [end for end in ("", "_orig", "_mask") if entry.same_as + end in state]
            if not same:
                raise ValueError(f"{name!r} is the same as {entry.same_as!r}, which is not there")
            state |= {name + end: state[entry.same_as + end] for end in same}
            continue
        start = next_value[entry.dtype]
        next_value[entry.dtype] += entry.count
        stored = data["values"][entry.dtype][start : start + entry.count]
        kept = torch.ones(entry.numel, dtype=torch.bool, device="cpu")
        if entry.where != "all":
            place = data["places"][next_place : next_place + entry.num_places]
            next_place += entry.num_places
            kept = _unpack(entry.where, place, entry.numel)
        if int(kept.sum()) != entry.count:
            raise ValueError(f"{name!r} has {entry.count} values for {int(kept.sum())} places")
        flat = torch.zeros(entry.numel, dtype=stored.dtype, device="cpu")
        flat[kept] = stored
        if masks and entry.masked:
            state[f"{name}_orig"] = flat.view(entry.shape)
            state[f"{name}_mask"] = kept.view(entry.shape).to(stored.dtype)
        else:
            state[name] = flat.view(entry.shape)
    return state


def _pack(kept: Tensor, count: int) -> tuple[str, Tensor]:
    """Encode the True entries as bits or indices, whichever takes fewer bytes."""
    index_dtype = _index_dtype(kept.numel())
    if count * index_dtype.itemsize < (kept.numel() + 7) // 8:
        return "indices", kept.nonzero().squeeze(1).to(index_dtype).view(torch.uint8)
    bits = torch.zeros((kept.numel() + 7) // 8 * 8, dtype=torch.uint8, device="cpu")
    bits[: kept.numel()] = kept
    return "bits", (bits.view(-1, 8) << _SHIFTS).sum(1, dtype=torch.uint8)


def _unpack(where: str, place: Tensor, numel: int) -> Tensor:
    if where == "bits":
        return ((place.unsqueeze(1) >> _SHIFTS) & 1).bool().flatten()[:numel]
    kept = torch.zeros(numel, dtype=torch.bool, device="cpu")
    # A copy, since a view at an arbitrary byte offset may be misaligned for integers.
    kept[place.clone().view(_index_dtype(numel)).long()] = True
    return kept


_SHIFTS = torch.arange(8, dtype=torch.uint8, device="cpu")


def _num_bytes(where: str, numel: int, count: int) -> int:
    return (numel + 7) // 8 if where == "bits" else count * _index_dtype(numel).itemsize


def _index_dtype(numel: int) -> torch.dtype:
    return next(
        dtype
        for dtype in (torch.int16, torch.int32, torch.int64)
        if numel - 1 <= torch.iinfo(dtype).max
    )


def _saves(tensor: Tensor, count: int, place: Tensor) -> bool:
    """Whether an unmasked tensor takes less space without its zeros."""
    return count * tensor.itemsize + place.numel() < tensor.numel() * tensor.itemsize
