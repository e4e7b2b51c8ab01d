"""Atomic writes: a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hesscurv.storage.destinations import follow_links, is_stream, open_stream
from hesscurv.storage.mapped_files import DISK_FULL, DiskFullError

_COPY_BYTES = 2**22
_NAME_CHARACTERS = 40  # kept in the temporary name: the target's may have the maximal length


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at any moment, even after a crash, the old or the new one is whole.

    The content goes to a temporary file in the same folder, is synced to disk and renamed.
    A symbolic link stays one; its target is written. An existing file keeps its mode and, where
    the system permits, its owner and group. A file with hard links keeps them all: its content is
    replaced in place, once the space is reserved. Devices, FIFOs and names of open files, such as
    /dev/stdout, are written through.

    Args:
        path: The file; its folder must exist and be writable.
        write: Called with the open binary file, which it writes sequentially.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder.
        PermissionError: If the file or its folder is not writable.
        DiskFullError: If the disk is full; the old file is untouched, no partial file remains.
        OSError: If writing fails otherwise, with the same guarantee.
    """
    target = follow_links(path)
    if is_stream(target):
        with _explained(target), open_stream(target) as stream:
            write(stream)
        return
    old = _status(target)
    if old is not None and not os.access(target, os.W_OK):
        raise PermissionError(
            errno.EACCES, f"expected a file that may be written to, got {target}; change its mode"
        )
    with _explained(target), _temporary_file(target, write, old) as temporary:
        if old is not None and old.st_nlink > 1:
            _rewrite(target, temporary)
            return
        try:
            os.replace(temporary, target)
        except OSError as error:
            if error.errno != errno.EBUSY or old is None:
                raise
            _rewrite(target, temporary)  # a bind-mounted file, as in containers: no rename


def create_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Create a file unless it exists; of several concurrent processes, one succeeds.

    Args:
        path: The file; its folder must exist.
        content: Its bytes.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the disk is full or not writable.
    """
    target = follow_links(path)
    with (
        _explained(target),
        _temporary_file(target, lambda file: file.write(content), None) as temporary,
    ):
        try:
            os.link(temporary, target)  # unlike a rename, fails if the target exists
        except FileExistsError:
            pass
        except OSError:
            # A file system without hard links: of two simultaneous writers, the last one wins.
            if not target.exists():
                os.replace(temporary, target)


def _status(target: Path) -> os.stat_result | None:
    """Return the status of the file, None if it does not exist."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(
            errno.EISDIR, f"expected a file to write, got the folder {str(target)!r}"
        )
    return status


@contextmanager
def _temporary_file(
    target: Path, write: Callable[[BinaryIO], object], old: os.stat_result | None
) -> Iterator[Path]:
    """Write a temporary file next to `target`, yield it for renaming, and clean up."""
    folder = target.parent
    if not folder.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"expected an existing folder, got {str(folder)!r}; create it first"
        )
    # Not by tempfile, which creates files that only the owner may read.
    name = f".{target.name[:_NAME_CHARACTERS]}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary = folder / name
    # A file with restricted access must not become readable, not even while it is written.
    mode = 0o666 if old is None else 0o600
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except PermissionError as error:
        raise PermissionError(
            error.errno,
            f"expected a folder in which files can be created, got {str(folder)!r}: the new "
            f"{target.name!r} is written beside the old one, which stays whole until it is done; "
            "name another folder",
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            if old is not None:
                _adopt(file.fileno(), old)
            os.fsync(file.fileno())
        yield temporary
        sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _adopt(handle: int, old: os.stat_result) -> None:
    """Give an open file the owner, group and mode of the file that it replaces."""
    mode = stat.S_IMODE(old.st_mode)
    if hasattr(os, "fchown"):
        made = os.fstat(handle)
        if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
            try:
                os.fchown(handle, old.st_uid, old.st_gid)
            except OSError:  # only root may give files away; the group can be one's own
                mode &= 0o777  # no setuid bit for a different owner
                with contextlib.suppress(OSError):
                    os.fchown(handle, -1, old.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(handle, mode)


def _rewrite(target: Path, temporary: Path) -> None:
    """Copy a file over the content of another, which keeps its inode.

    Space is reserved first, so a full disk changes nothing. A crash during the copy leaves the
    temporary file, which is whole.
    """
    size = temporary.stat().st_size
    with temporary.open("rb") as source, target.open("r+b") as file:
        before = os.fstat(file.fileno()).st_size
        if size > before and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), before, size - before)
            except OSError as error:
                os.ftruncate(file.fileno(), before)
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        shutil.copyfileobj(source, file, _COPY_BYTES)
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Raise `DiskFullError` with the file and a remedy if the disk is full."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DiskFullError(
            error.errno,
            f"{os.strerror(error.errno)}: the disk is full, {target} was not written and what was "
            "there before is whole; free some space and make the same call again, or name another "
            "folder",
        ) from error


def sync_folder(folder: Path) -> None:
    """Sync the entries of a folder to disk, where the system supports it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # some systems do not open folders
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
