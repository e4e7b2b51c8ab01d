"""Memory-mapped tensors in unnamed files."""

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
"""Error numbers of a full disk, an exhausted quota, and a file size limit."""


class DiskFullError(OSError):
    """The disk is full; the previous content of the file is intact."""


def mapped_tensor(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised CPU tensor whose memory is a new file in a folder.

    The file is unlinked at once: it is freed with the tensor, also when the process is killed. Its
    space is reserved up front, since a write to a mapped page without disk space kills the process.

    Args:
        folder: Existing folder of the file.
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.

    Raises:
        DiskFullError: If the disk has too little space.
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
    """Reserve disk space for a file.

    Args:
        handle: Descriptor of the open file.
        size: Bytes from its beginning.
        folder: Its folder, for the message.

    Raises:
        DiskFullError: If the disk has too little space.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle, 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        zeros = bytes(2**24)  # no fallocate on this file system: only written blocks are reserved
        for start in range(0, size, len(zeros)):
            os.pwrite(handle, zeros[: size - start], start)
    except OSError as error:
        raise disk_full(error, folder, size) from error


def disk_full(error: OSError, folder: Path, size: int) -> OSError:
    """Return the error to raise for a failed write: a `DiskFullError` if the disk is full.

    Args:
        error: Error of the system.
        folder: The folder written to.
        size: The bytes that were to be written.
    """
    if error.errno not in DISK_FULL or isinstance(error, DiskFullError):
        return error
    return DiskFullError(
        error.errno,
        f"the disk is full: {size / 1e9:.3g} GB were to be written to {folder}; free some space "
        "there and make the same call again, name another folder, or take fewer vectors "
        "(max_basis, k) or storage_dtype=torch.float16",
    )
