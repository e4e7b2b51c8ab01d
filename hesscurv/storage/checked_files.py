"""Small files of tensors and plain values with a magic number and a checksum."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

from hesscurv.storage.atomic_files import write_atomically
from hesscurv.storage.destinations import require_regular_file
from hesscurv.storage.tensor_archives import load_archive, save_archive

_MAGIC = b"hesscurv file 1\n"


def write_checked(path: str | os.PathLike[str], data: dict[str, Any]) -> int:
    """Write tensors and plain values to a file, atomically, with a checksum.

    Args:
        path: The file, as for `write_atomically`; its folder must exist.
        data: Nested dicts and lists of tensors, str, int, float, bool and None.

    Returns:
        The number of bytes.

    Raises:
        TypeError: If `data` holds anything else.
        DiskFullError: If the disk is full; an older file of this name is untouched.
    """
    buffer = io.BytesIO()
    save_archive(data, buffer)
    payload = buffer.getbuffer()

    def write(file: Any) -> None:
        file.write(_MAGIC)
        file.write(hashlib.sha256(payload).digest())
        file.write(payload)

    write_atomically(path, write)
    return len(_MAGIC) + hashlib.sha256().digest_size + len(payload)


def read_checked(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of `write_checked`, without pickle.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder.
        ValueError: If it is damaged, cut short, or another kind of file.
    """
    path = Path(path)
    require_regular_file(path, "a file of this library")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:  # first, so that a large foreign file is not read
            raise ValueError(f"{path} is not a file of this library, or its beginning is damaged")
        digest = file.read(hashlib.sha256().digest_size)
        payload = file.read()
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError(f"{path} is damaged or cut short: its checksum does not fit its content")
    try:
        return load_archive(io.BytesIO(payload), len(payload), compare_members=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read by this version: {error}") from error
