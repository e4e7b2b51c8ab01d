"""Archives of ``torch.save`` restricted to plain values, read with a bound on their size."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_READ_BYTES = 2**22
_SCALARS = (bool, int, float, complex, str, bytes)
_AS_THEY_ARE = (type(None), *_SCALARS, torch.dtype, torch.device, torch.Size)


def save_archive(data: dict[str, Any], file: Any) -> None:
    """Write tensors and plain values as ``torch.save`` does, so that `load_archive` reads them.

    Args:
        data: Nested dicts, lists, tuples and sets of tensors and plain values. NumPy scalars
            become Python's.
        file: Has `write`; it is written sequentially.

    Raises:
        TypeError: If it holds anything else, which could not be read without pickle.
        OSError: Any error of `file.write`.
    """
    sink = _Sink(file)
    torch.save(as_plain(data), sink)  # type: ignore[arg-type]
    if sink.error is not None:
        raise sink.error


def load_archive(
    file: BinaryIO,
    size: int,
    *,
    compare_members: bool = True,
    map_location: str | torch.device | None = "cpu",
) -> dict[str, Any]:
    """Read a file of `save_archive`, without pickle and without allocating more than its size.

    Args:
        file: Open at its beginning, seekable.
        size: Its number of bytes, which bounds every size that it declares.
        compare_members: Whether to verify the CRC-32 of each member; torch does not.
        map_location: The device of the tensors; None for those that they were saved from.

    Raises:
        ValueError: If it is damaged, or not an archive of a dict.
        RuntimeError: If the device, or one that it was saved from, does not exist.
    """
    try:
        _check_members(file, size, compare_members)
        file.seek(0)
        data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise errors of many types on damaged files
        first = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"{type(error).__name__}: {first}") from error
    if not isinstance(data, dict):
        raise ValueError(f"it holds a {type(data).__name__} where a dictionary was expected")
    for tensor in _tensors(data):
        held = tensor.layout == torch.strided and tensor.device.type != "meta"
        if not held or tensor.numel() * tensor.element_size() > size:
            raise ValueError(
                f"it names a tensor of shape {tuple(tensor.shape)}, which {size} bytes cannot hold"
            )
    # Only now: any error from here on concerns the device, not the file.
    if map_location is None:
        file.seek(0)
        data = torch.load(file, weights_only=True)
    elif torch.device(map_location).type != "cpu":
        data = _moved(data, torch.device(map_location))
    return data


def as_plain(value: Any, path: str = "data") -> Any:
    """Convert a value to types that ``torch.load(weights_only=True)`` reads.

    Args:
        value: Tensors and plain values, nested; NumPy scalars and subclasses of Python's types
            become Python's.
        path: Its name in the message.

    Raises:
        TypeError: If it holds anything else.
    """
    if type(value) in _AS_THEY_ARE or isinstance(value, Tensor):
        return value
    if isinstance(value, np.generic) and type(value.item()) in _SCALARS:
        return value.item()
    kind: Any
    for kind in _SCALARS:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        pairs = (
            (as_plain(key, f"a key of {path}"), as_plain(inner, f"{path}[{key!r}]"))
            for key, inner in value.items()
        )
        return OrderedDict(pairs) if isinstance(value, OrderedDict) else dict(pairs)
    for sequence in (list, tuple, set):
        if isinstance(value, sequence):
            return sequence(as_plain(inner, f"{path}[{i}]") for i, inner in enumerate(value))
    raise TypeError(
        f"expected tensors, numbers, text, None, and lists and dicts of them, got a "
        f"{type(value).__name__} as {path}, which could not be read without pickle; convert it, by "
        "str(...) for instance"
    )


class _Sink:
    """Writer that keeps the first error: torch's C++ code would replace it by an unrelated one."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


def _check_members(file: BinaryIO, size: int, compare: bool) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > size or any(
            member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size
            for member in members
        ):
            raise ValueError(f"its parts are larger than its {size} bytes")
        if compare:
            for member in members:
                with archive.open(member) as part:  # zipfile verifies the CRC at the end
                    while part.read(_READ_BYTES):
                        pass


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return type(value)((key, _moved(inner, device)) for key, inner in value.items())  # type: ignore[call-arg]
    if type(value) in (list, tuple, set):
        return type(value)(_moved(inner, device) for inner in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from _tensors(inner)
