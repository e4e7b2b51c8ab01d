"""Tensors that live in files: mapped into memory, read and written back by the system."""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors that say that the disk, the user's share of it, or a file's limit is full."""


class DiskFullError(OSError):
    """There is no room on the disk for what was to be written; what was there before is whole."""


def mapped_tensor(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised CPU tensor whose memory is a new file in a folder.

    The file has no name any more when this returns: it goes when the tensor does, also when the
    process is killed. Its room is taken at once, since a write to a mapped page for which the disk
    has none would end the process.

    Args:
        folder: Where the file lies; it must exist.
        shape: Of the tensor.
        dtype: Of the tensor.

    Raises:
        DiskFullError: If the disk has no room for it.
    """
    numel = math.prod(shape)
    size = numel * torch.empty(0, dtype=dtype, device="cpu").element_size()
    if size == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    handle, name = tempfile.mkstemp(prefix=".hesscurv-", suffix=".block", dir=folder)
    try:
        os.unlink(name)
        reserve(handle, size, folder)
        return torch.frombuffer(mmap.mmap(handle, size), dtype=dtype, count=numel).view(shape)
    finally:
        os.close(handle)


def reserve(handle: int, size: int, folder: Path) -> None:
    """Take the room of a file on the disk.

    Args:
        handle: Descriptor of the open file.
        size: Bytes from its beginning.
        folder: Where it lies, for the message.

    Raises:
        DiskFullError: If there is not enough.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle, 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        zeros = bytes(2**24)  # a file system without reservations: its blocks have to be written
        for start in range(0, size, len(zeros)):
            os.pwrite(handle, zeros[: size - start], start)
    except OSError as error:
        raise disk_full(error, folder, size) from error


def disk_full(error: OSError, folder: Path, size: int) -> OSError:
    """Return what to raise for an error of writing: with sizes and remedy, where the disk is full.

    Args:
        error: What the system said.
        folder: Where it happened.
        size: The bytes that were to be written.
    """
    if error.errno not in DISK_FULL or isinstance(error, DiskFullError):
        return error
    return DiskFullError(
        error.errno,
        f"the disk is full: {size / 1e9:.3g} GB were to be written to {folder}; free some room "
        "there and make the same call again, name another folder, or take fewer vectors "
        "(max_basis, k) or storage_dtype=torch.float16",
    )
