"""Resolution of paths: symbolic links, regular files, devices, FIFOs and open files."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

_LONGEST_NAME = 200  # bytes, of the 255 that a file name may have
_MOST_LINKS = 40  # as Linux
# Names of open files: links in /proc whose targets may have no name, or a removed one.
_OPEN_FILES = re.compile(r"/proc/(self|\d+)(/task/\d+)?/fd|/dev/fd")


def follow_links(path: str | os.PathLike[str]) -> Path:
    """Resolve symbolic links, whether or not the target exists.

    Names of open files, such as /dev/stdout and /proc/self/fd/3, are returned unresolved.

    Args:
        path: Any path.

    Raises:
        OSError: If links form a cycle, or a name is too long.
    """
    target = Path(path)
    for _ in range(_MOST_LINKS):
        if _is_open_file(target) or not target.is_symlink():
            return target
        target = Path(os.path.realpath(target.parent)) / os.readlink(target)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def is_stream(target: Path) -> bool:
    """Whether a path is a stream rather than a regular file: a device, a FIFO, an open file.

    Args:
        target: A path from `follow_links`.
    """
    if _is_open_file(target):
        return True
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_stream(target: Path, *, wait: bool = True) -> BinaryIO:
    """Open a stream for writing; an open file continues at its current position.

    Args:
        target: A path for which `is_stream` is true.
        wait: Whether to wait for a reader of a FIFO.

    Raises:
        OSError: If it cannot be opened, or the FIFO has no reader and `wait` is False.
    """
    if _is_open_file(target) and target.name.isdigit() and _is_own(target):
        return os.fdopen(os.dup(int(target.name)), "wb")
    handle = os.open(target, os.O_WRONLY | (0 if wait else getattr(os, "O_NONBLOCK", 0)))
    os.set_blocking(handle, True)
    return os.fdopen(handle, "wb")


def require_regular_file(path: Path, kind: str) -> None:
    """Raise unless a path is a regular file, whose size bounds the data that it can hold.

    Args:
        path: The path; links are followed.
        kind: The expected kind, for the message.

    Raises:
        FileNotFoundError: If it does not exist.
        IsADirectoryError: If it is a folder.
        ValueError: If it is a device, a FIFO or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            errno.ENOENT, f"expected {kind}, found none at {path}; check the name"
        ) from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, f"expected {kind}, got the folder {path}")
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"expected {kind}, got a device, FIFO or socket in {path}; copy what it gives to a file"
        )


def as_file_name(name: str) -> str:
    """Return a name made safe for a file: no separators, no reserved characters.

    Args:
        name: Any text. Letters, digits and most punctuation are kept.
    """
    text = re.sub(r'[/\\:*?"<>|\x00-\x1f\x7f]', "-", name)
    text = text.encode("utf-8", "replace")[:_LONGEST_NAME].decode("utf-8", "ignore")
    return text.strip(". ") or "-"


def _is_open_file(path: Path) -> bool:
    return _OPEN_FILES.fullmatch(os.path.realpath(path.parent)) is not None


def _is_own(path: Path) -> bool:
    parent = os.path.realpath(path.parent)
    return parent == "/dev/fd" or parent == os.path.realpath("/proc/self/fd")
