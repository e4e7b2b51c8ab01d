"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write one file so that at any moment, even after a crash, the old or the new one is whole.

    The content goes to a temporary file in the same folder, reaches the disk, and takes the name.

    Args:
        path: The file; its folder must exist.
        write: Is given the open binary file.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the disk is full or not writable; the old file is untouched, no part is left.
    """
    with _temporary_file(Path(path), write) as temporary:
        os.replace(temporary, path)


def create_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file unless there is one; of several processes that try at once, one does.

    Args:
        path: The file; its folder must exist.
        content: What it holds.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the disk is full or not writable.
    """
    path = Path(path)
    with _temporary_file(path, lambda file: file.write(content)) as temporary:
        try:
            os.link(temporary, path)  # fails where there is a file, which replacing would not
        except FileExistsError:
            pass
        except OSError:
            # A file system without hard links: of two at the same instant the later one stays.
            if not path.exists():
                os.replace(temporary, path)


@contextmanager
def _temporary_file(path: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """Write a file beside `path`, hand it out to be given that name, and remove what is left."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder, got {str(path.parent)!r}")
    # Not by tempfile, whose files nobody else may read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
