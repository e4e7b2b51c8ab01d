"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
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
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder, got {str(path.parent)!r}")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
