"""Large tensor files with a checksum over all bytes, readable by ``torch.load``.

The file is an archive of ``torch.save``, a zip file. Its comment, the last bytes, is the checksum
of all preceding bytes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hesscurv.storage.atomic_files import write_atomically
from hesscurv.storage.destinations import require_regular_file
from hesscurv.storage.tensor_archives import load_archive, save_archive

_MARK = b"hesscurv sha256 "
_COMMENT = len(_MARK) + 2 * hashlib.sha256().digest_size
_READ_BYTES = 2**22


def write_archive(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """Write tensors and plain values to a file, atomically, with a checksum.

    Args:
        path: The file, as for `write_atomically`; its folder must exist.
        data: Nested dicts and lists of tensors and plain values. A key "checksum" is added.

    Raises:
        TypeError: If `data` holds anything else.
        FileNotFoundError: If the folder does not exist.
        OSError: If the disk is full or not writable; an older file of this name is untouched.

    Cost: CPU tensors are not copied.
    """

    def write(file: BinaryIO) -> None:
        hashed = _HashedFile(file)
        # The content records that a checksum exists; a file that lost it would pass for an old one.
        save_archive({**data, "checksum": "sha256"}, hashed)
        hashed.finish()

    write_atomically(path, write)


def read_archive(
    path: Path, kind: str, map_location: str | torch.device | None = "cpu"
) -> tuple[dict[str, Any], bool]:
    """Read a file of `write_archive`, or an older archive of ``torch.save``.

    The checksum is verified before any content is parsed.

    Args:
        path: The file.
        kind: The expected kind, for messages: "a file of Eigenpairs.save".
        map_location: As in ``torch.load``.

    Returns:
        The data, and whether a file of `write_archive` has lost its checksum; do not use the data
        then.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder.
        ValueError: If it is damaged, cut short, or another kind of file.
    """
    require_regular_file(path, kind)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        given = _read_comment(file, size)
        if given is not None and _hash(file, size - 2 * hashlib.sha256().digest_size) != given:
            raise ValueError(f"{path} is damaged: its checksum does not fit its content")
        file.seek(0)
        try:
            # Older files have no overall checksum, but each zip member has one.
            data = load_archive(
                file, size, compare_members=given is None, map_location=map_location
            )
        except ValueError as error:
            raise ValueError(f"{path} is damaged, cut short or not {kind} ({error})") from error
    return data, data.pop("checksum", None) is not None and given is None


class _HashedFile:
    """Forward writes, holding back the last two bytes: the length of the zip comment."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._held = file, hashlib.sha256(), b""

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        if len(view) < 2:
            self._held += bytes(view)
            out, self._held = self._held[:-2], self._held[-2:]
            self._put(out)
            return
        self._put(self._held)
        self._put(view[:-2])
        self._held = bytes(view[-2:])

    def finish(self) -> None:
        """End the archive with a comment: the checksum of everything before it."""
        if self._held != b"\0\0":
            raise RuntimeError("expected an archive without a comment; torch.save has changed")
        self._put(_COMMENT.to_bytes(2, "little"))
        self._put(_MARK)
        self._file.write(self._hash.hexdigest().encode())

    def _put(self, data: Any) -> None:
        self._hash.update(data)
        self._file.write(data)


def _read_comment(file: BinaryIO, size: int) -> bytes | None:
    """Return the checksum at the end of a file, None without one."""
    file.seek(max(0, size - _COMMENT))
    comment = file.read(_COMMENT)
    return comment[len(_MARK) :] if comment.startswith(_MARK) else None


def _hash(file: BinaryIO, count: int) -> bytes:
    """Return the checksum of the first `count` bytes, as written in the comment."""
    file.seek(0)
    digest, left = hashlib.sha256(), count
    while left > 0 and (part := file.read(min(left, _READ_BYTES))):
        digest.update(part)
        left -= len(part)
    return digest.hexdigest().encode()
