"""Small JSON files with a checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hesscurv.storage.atomic_files import write_atomically
from hesscurv.storage.destinations import require_regular_file

_MOST_BYTES = 2**24


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write plain values as JSON, atomically, with a checksum among them.

    Args:
        path: The file, as for `write_atomically`; its folder must exist.
        data: JSON-serializable values; a key "checksum" is added.

    Raises:
        OSError: If it cannot be written; an older file of this name is untouched.
    """
    content = json.dumps({**data, "checksum": _checksum(data)}).encode()
    write_atomically(path, lambda file: file.write(content))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of `write_json`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or another kind of file.
    """
    require_regular_file(path, "a file of this library")
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES)
    try:
        data = json.loads(content)
        checksum = data.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not a file of this library") from error
    if checksum != _checksum(data):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    return dict(data)


def _checksum(data: dict[str, Any]) -> str:
    # One round trip first: JSON turns numeric keys into strings and tuples into lists.
    plain = json.loads(json.dumps(data))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
