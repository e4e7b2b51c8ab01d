"""Files that are written whole or not at all."""

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
_NAME_CHARACTERS = 40  # of a temporary file's name: a file may have the longest name there is


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write one file so that at any moment, even after a crash, the old or the new one is whole.

    The content goes to a temporary file in the same folder, reaches the disk, and takes the name.
    A symbolic link stays one, and what it names is written. A file that is there keeps its mode
    and, where the system permits, its owner and group. A file of several names (hard links) keeps
    them all: its content is replaced in place, after its room has been taken. Devices, FIFOs and
    names of open files, such as /dev/stdout, are written through.

    Args:
        path: The file; its folder must exist and be writable.
        write: Is given the open binary file, which it writes from front to back.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder.
        PermissionError: If the file or its folder is not writable.
        DiskFullError: If the disk is full; the old file is untouched, no part is left.
        OSError: If writing fails otherwise, with the same promise.
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
            _rewrite(target, temporary)  # a file that is mounted by itself, as in a container


def create_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file unless there is one; of several processes that try at once, one does.

    Args:
        path: The file; its folder must exist.
        content: What it holds.

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
            os.link(temporary, target)  # fails where there is a file, which replacing would not
        except FileExistsError:
            pass
        except OSError:
            # A file system without hard links: of two at the same instant the later one stays.
            if not target.exists():
                os.replace(temporary, target)


def _status(target: Path) -> os.stat_result | None:
    """Return what is known of the file that is there; None if there is none."""
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
    """Write a file beside `target`, hand it out to be given that name, and remove what is left."""
    folder = target.parent
    if not folder.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"expected an existing folder, got {str(folder)!r}; make it first"
        )
    # Not by tempfile, whose files nobody else may read.
    name = f".{target.name[:_NAME_CHARACTERS]}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary = folder / name
    # One that was to be read by few must not be read by more, not even while it is written.
    mode = 0o666 if old is None else 0o600
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except PermissionError as error:
        raise PermissionError(
            error.errno,
            f"expected a folder in which files can be made, got {str(folder)!r}: the new "
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
    """Give an open file the owner, group and mode of the one that it replaces."""
    mode = stat.S_IMODE(old.st_mode)
    if hasattr(os, "fchown"):
        made = os.fstat(handle)
        if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
            try:
                os.fchown(handle, old.st_uid, old.st_gid)
            except OSError:  # only root may give files away; the group can be one's own
                mode &= 0o777  # another owner's file must not run as this one's
                with contextlib.suppress(OSError):
                    os.fchown(handle, -1, old.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(handle, mode)


def _rewrite(target: Path, temporary: Path) -> None:
    """Copy a whole file over the content of another, which stays the same file.

    The room is taken first, so that a full disk changes nothing. A crash in the midst of it leaves
    the temporary file, which is whole.
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
    """Name the file and the remedy where the disk is full."""
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
            "there before is whole; free some room and make the same call again, or name another "
            "folder",
        ) from error


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk, where the system can say so."""
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
