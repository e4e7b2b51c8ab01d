"""Records in files that a kill leaves whole: JSON lines, and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from hesscurv.storage.atomic_files import write_atomically


class JSONLinesWriter:
    """Appends each record to a file, one JSON object a line.

    A line is written by one call and reaches the disk before `log` returns. A file that is there
    is gone on with; half a line at its end, of a machine that has lost power, is removed before.

    Args:
        path: The file; its folder must exist.

    Raises:
        FileNotFoundError: If the folder does not exist.

    Example:
        >>> CurvatureMonitor(..., loggers=[JSONLinesWriter("curvature.jsonl")])
        >>> read_records("curvature.jsonl")
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _in_a_folder(path)

    def log(self, record: dict[str, Any], step: int) -> None:
        """Append a record.

        Raises:
            OSError: If it cannot be written; the file is as before.
        """
        _append(self.path, json.dumps({"step": step} | record) + "\n")


class CSVWriter:
    """Appends each record to a table; lists and dicts are JSON texts in their cells.

    A record with keys that the table has no column for makes the whole file be written anew, with
    these columns added, atomically; all others are appended as lines.

    Args:
        path: The file; its folder must exist. One that is there is gone on with.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _in_a_folder(path)

    def log(self, record: dict[str, Any], step: int) -> None:
        """Append a record.

        Raises:
            OSError: If it cannot be written; the file is as before.
        """
        record = {"step": step} | record
        cells = {key: _cell(value) for key, value in record.items()}
        columns, rows = self._read()
        new = [key for key in cells if key not in columns]
        if not new:
            _append(self.path, _lines(columns, [cells]))
            return
        columns += new
        text = _lines(columns, [dict(zip(columns, columns, strict=True)), *rows, cells])
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        if not self.path.exists():
            return [], []
        whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        table = csv.DictReader(io.StringIO(whole))
        return list(table.fieldnames or []), list(table)


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, in the order of their steps.

    Of several for one step, as a run leaves them that was resumed from an earlier checkpoint, the
    last one counts; half a line at the end counts as not written.

    Args:
        path: A file of `JSONLinesWriter`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no record.
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]  # a whole line ends with one
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            found[record["step"]] = record
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"expected a record of a CurvatureMonitor in line {number} of {path}, got "
                f"{line[:80]!r}; look for another program that writes to this file"
            ) from error
    return [found[step] for step in sorted(found)]


def _cell(value: Any) -> Any:
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return " ".join(value.split()) if isinstance(value, str) else value  # a row is a line


def _in_a_folder(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder, got {str(path.parent)!r}")
    return path


def _lines(columns: list[str], rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    csv.DictWriter(out, columns, restval="", lineterminator="\n").writerows(rows)
    return out.getvalue()


def _append(path: Path, text: str) -> None:
    """Append whole lines by one write, so that a kill leaves all of it or nothing."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = _end_of_last_line(handle)
        os.ftruncate(handle, end)
        os.lseek(handle, end, os.SEEK_SET)
        data = text.encode()
        try:
            written = os.write(handle, data)
        except OSError:
            os.ftruncate(handle, end)
            raise
        if written < len(data):  # a disk may be full in the midst of it
            os.ftruncate(handle, end)
            raise OSError(f"expected room for {len(data)} more bytes in {path}, got a full disk")
        os.fsync(handle)
    finally:
        os.close(handle)


def _end_of_last_line(handle: int) -> int:
    """Return where the last whole line ends."""
    end = os.lseek(handle, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        os.lseek(handle, start, os.SEEK_SET)
        found = os.read(handle, end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
