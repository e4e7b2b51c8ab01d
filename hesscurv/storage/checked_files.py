"""Small files of tensors and plain values that are whole, ours and undamaged, or refused."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from hesscurv.storage.atomic_files import write_atomically
from hesscurv.storage.mapped_files import disk_full

_MAGIC = b"hesscurv file 1\n"


def write_checked(path: Path, data: dict[str, Any]) -> None:
    """Write tensors and plain values to a file, atomically, with a checksum.

    Args:
        path: The file; its folder must exist.
        data: Nested dicts and lists of tensors, str, int, float, bool and None.

    Raises:
        DiskFullError: If the disk is full; an older file of this name is untouched.
    """
    buffer = io.BytesIO()
    torch.save(data, buffer)
    payload = buffer.getbuffer()

    def write(file: Any) -> None:
        file.write(_MAGIC)
        file.write(hashlib.sha256(payload).digest())
        file.write(payload)

    try:
        write_atomically(path, write)
    except OSError as error:
        raise disk_full(error, path.parent, len(payload)) from error


def read_checked(path: Path) -> dict[str, Any]:
    """Read what `write_checked` wrote, without pickle.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, cut short, or another kind of file.
    """
    content = path.read_bytes()
    start = len(_MAGIC) + hashlib.sha256().digest_size
    if content[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path} is not a file of this library, or its beginning is damaged")
    payload = memoryview(content)[start:]
    if hashlib.sha256(payload).digest() != content[len(_MAGIC) : start]:
        raise ValueError(f"{path} is damaged or cut short: its checksum does not fit its content")
    try:
        data = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read by this version: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__} where a dictionary was expected")
    return data
