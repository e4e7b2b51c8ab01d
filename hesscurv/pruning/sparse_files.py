"""Write a pruned model to a file whose size shows the pruning, and read it again.

A masked weight is its surviving values and where they are: one bit for each entry, or the indices
of the survivors where these take less room, below about one in 32.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.pruning.state_dicts import dense_state_dict, masks_of
from hesscurv.storage.checked_files import read_checked, write_checked

_FORMAT = "hesscurv sparse weights"
_VERSION = 1


def save_sparse(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a model's state to one file, pruned weights without their zeros, atomically.

    Weights whose pruning was made permanent by ``prune.remove`` are found by their zeros. The file
    has a checksum and no pickled objects. Values are stored bit by bit, but that a negative
    zero, such as a mask leaves of a negative weight, becomes a positive one.

    Args:
        model: The module, pruned or not; torch.compile and DDP wrappers are looked through.
        path: The file to write; its folder must exist.

    Returns:
        The size of the file in bytes.

    Raises:
        TypeError: If the state dict holds something else than dense tensors.
        FileNotFoundError: If the folder does not exist.
        DiskFullError: If the disk is full; an older file of this name is untouched.

    Cost:
        A copy of the state on the CPU, and its file in memory.
    """
    path = Path(path)
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
    write_checked(
        path,
        {
            "format": _FORMAT,
            "version": _VERSION,
            "entries": entries,
            # One tensor for each dtype: each tensor in a file takes some hundred bytes besides.
            "values": {dtype: torch.cat(parts) for dtype, parts in values.items()},
            "places": torch.cat(places) if places else torch.empty(0, dtype=torch.uint8),
        },
    )
    return path.stat().st_size


def load_sparse(path: str | os.PathLike[str], *, masks: bool = False) -> OrderedDict[str, Tensor]:
    """Read the state dict that `save_sparse` wrote.

    Args:
        path: The file.
        masks: False gives the state dict of a dense model, for `load_state_dict`. True gives that
            of the pruned one, with ``weight_orig`` and ``weight_mask``, for `load_pruned_`.

    Returns:
        A state dict of CPU tensors. What was masked is zero in it, in ``weight_orig`` too.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not one of `save_sparse`'s, or of another version.

    Cost:
        The file in memory, and the dense state.
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
    state: OrderedDict[str, Tensor] = OrderedDict()
    next_value = dict.fromkeys(data["values"], 0)
    next_place = 0
    for entry in data["entries"]:
        name = entry["name"]
        if "same_as" in entry:
            for end in ("", "_orig", "_mask"):
                if entry["same_as"] + end in state:
                    state[name + end] = state[entry["same_as"] + end]
            continue
        numel, start = prod(entry["shape"]), next_value[entry["dtype"]]
        next_value[entry["dtype"]] += entry["count"]
        stored = data["values"][entry["dtype"]][start : start + entry["count"]]
        kept = torch.ones(numel, dtype=torch.bool)
        if entry["where"] != "all":
            num_bytes = _num_bytes(entry["where"], numel, entry["count"])
            place = data["places"][next_place : next_place + num_bytes]
            next_place += num_bytes
            kept = _unpack(entry["where"], place, numel)
        flat = torch.zeros(numel, dtype=stored.dtype)
        flat[kept] = stored
        if masks and entry["masked"]:
            state[f"{name}_orig"] = flat.view(entry["shape"])
            state[f"{name}_mask"] = kept.view(entry["shape"]).to(stored.dtype)
        else:
            state[name] = flat.view(entry["shape"])
    return state


def _pack(kept: Tensor, count: int) -> tuple[str, Tensor]:
    """Where the True entries are, in as few bytes as bits or indices take."""
    index_dtype = _index_dtype(kept.numel())
    if count * index_dtype.itemsize < (kept.numel() + 7) // 8:
        return "indices", kept.nonzero().squeeze(1).to(index_dtype).view(torch.uint8)
    bits = torch.zeros((kept.numel() + 7) // 8 * 8, dtype=torch.uint8)
    bits[: kept.numel()] = kept
    return "bits", (bits.view(-1, 8) << _SHIFTS).sum(1, dtype=torch.uint8)


def _unpack(where: str, place: Tensor, numel: int) -> Tensor:
    if where == "bits":
        return ((place.unsqueeze(1) >> _SHIFTS) & 1).bool().flatten()[:numel]
    kept = torch.zeros(numel, dtype=torch.bool)
    # A copy, since bytes in the middle of a tensor need not be aligned for integers.
    kept[place.clone().view(_index_dtype(numel)).long()] = True
    return kept


_SHIFTS = torch.arange(8, dtype=torch.uint8)


def _num_bytes(where: str, numel: int, count: int) -> int:
    return (numel + 7) // 8 if where == "bits" else count * _index_dtype(numel).itemsize


def _index_dtype(numel: int) -> torch.dtype:
    return next(
        dtype
        for dtype in (torch.int16, torch.int32, torch.int64)
        if numel - 1 <= torch.iinfo(dtype).max
    )


def _saves(tensor: Tensor, count: int, place: Tensor) -> bool:
    """Whether a tensor that is not masked takes less room without its zeros."""
    return count * tensor.itemsize + place.numel() < tensor.numel() * tensor.itemsize
