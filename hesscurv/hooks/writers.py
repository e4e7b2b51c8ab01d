"""Crash-safe record files: JSON lines and CSV."""

from __future__ import annotations

import csv
import io
import json
import operator
import os
from pathlib import Path
from typing import Any

from hesscurv.hooks.monitoring.record_list import Records
from hesscurv.storage.atomic_files import write_atomically
from hesscurv.storage.destinations import (
    follow_links,
    is_stream,
    open_stream,
    require_regular_file,
)


class JSONLinesWriter:
    """Appends each record to a file, one JSON object per line.

    A line is written by one call and synced to disk before `log` returns. An existing file is
    continued; an incomplete last line, left by a power failure, is removed first. Devices, FIFOs
    and /dev/stdout are supported; a FIFO without a reader makes `log` fail, which a monitor
    survives.

    Args:
        path: The file; its folder must exist.

    Raises:
        FileNotFoundError: If the folder does not exist.

    Example:
        >>> writer = hesscurv.hooks.JSONLinesWriter("curvature.jsonl")
        >>> for record in monitor.records:
        ...     writer.log(record, record["step"])
        >>> [record["step"] for record in hesscurv.hooks.read_records("curvature.jsonl")]
        [1, 2]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _in_a_folder(path)

    def __repr__(self) -> str:
        """Name the file."""
        return f"JSONLinesWriter({str(self.path)!r})"

    def log(self, record: dict[str, Any], step: int) -> None:
        """Append a record.

        Raises:
            OSError: If it cannot be written; the file is as before.
        """
        _append(self.path, json.dumps({"step": step} | record) + "\n")


class CSVWriter:
    """Appends each record to a CSV table; lists and dicts are stored as JSON in their cells.

    A record with new keys rewrites the whole file atomically, with these columns added; all others
    are appended as lines.

    Args:
        path: The file; its folder must exist. An existing one is continued.

    Raises:
        FileNotFoundError: If the folder does not exist.

    Example:
        >>> writer = hesscurv.hooks.CSVWriter("curvature.csv")
        >>> writer.log({"step": 1, "sharpness": 2.5}, 1)
        >>> from pathlib import Path
        >>> print(Path("curvature.csv").read_text().strip())
        step,sharpness
        1,2.5
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _in_a_folder(path)
        self._columns: list[str] = []  # for streams, which cannot be read back

    def __repr__(self) -> str:
        """Name the file."""
        return f"CSVWriter({str(self.path)!r})"

    def log(self, record: dict[str, Any], step: int) -> None:
        """Append a record.

        Raises:
            OSError: If it cannot be written; the file is as before.
            ValueError: If the existing file is not a table.
        """
        record = {"step": step} | record
        cells = {key: _cell(value) for key, value in record.items()}
        once = is_stream(follow_links(self.path))  # cannot be read back or rewritten
        columns, rows = (self._columns, []) if once else self._read()
        new = [key for key in cells if key not in columns]
        if not new:
            _append(self.path, _lines(columns, [cells]))
            return
        columns = [*columns, *new]
        # A row is one line, so empty cells of new columns are appended as commas.
        head = _lines(columns, [dict(zip(columns, columns, strict=True))])
        before = "".join(row.rstrip("\r") + "," * len(new) + "\n" for row in rows)
        text = head + before + _lines(columns, [cells])
        if once:
            _append(self.path, text)
            self._columns = columns
        else:
            write_atomically(self.path, lambda file: file.write(_encode(text)))

    def _read(self) -> tuple[list[str], list[str]]:
        """Return the columns, and the rows as raw lines."""
        if not self.path.exists():
            return [], []
        try:
            whole, _, _ = self.path.read_bytes().decode("utf-8").rpartition("\n")
            header, *rows = whole.split("\n")
            return next(csv.reader([header]), []), rows
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"expected a table of a CurvatureMonitor in {self.path}, got another kind of file; "
                "name another one"
            ) from error


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, sorted by step.

    Of several records for one step, left by a run resumed from an earlier checkpoint, the last one
    counts; an incomplete last line is ignored.

    Args:
        path: A file of `JSONLinesWriter`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not a record.

    Example:
        >>> hesscurv.hooks.JSONLinesWriter("curvature.jsonl").log({"step": 1, "sharpness": 2.5}, 1)
        >>> hesscurv.hooks.read_records("curvature.jsonl")
        [{'step': 1, 'sharpness': 2.5}]
    """
    path = Path(path)
    require_regular_file(path, "a file of JSONLinesWriter")
    lines = path.read_bytes().split(b"\n")[:-1]  # a whole line ends with one
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            found[operator.index(record["step"])] = record
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"expected a record of a CurvatureMonitor in line {number} of {path}, got "
                f"{line[:80]!r}; look for another program that writes to this file"
            ) from error
    return Records(found[step] for step in sorted(found))


def _cell(value: Any) -> Any:
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return " ".join(value.split()) if isinstance(value, str) else value  # a row is a line


def _in_a_folder(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not follow_links(path).parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder, got {str(path.parent)!r}")
    return path


def _lines(columns: list[str], rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    csv.DictWriter(out, columns, restval="", lineterminator="\n").writerows(rows)
    return out.getvalue()


def _encode(text: str) -> bytes:
    # A module's name may contain any text, even lone surrogates that UTF-8 cannot encode.
    return text.encode("utf-8", "backslashreplace")


def _append(path: Path, text: str) -> None:
    """Append whole lines by one write, so that a kill leaves all or nothing."""
    target = follow_links(path)
    if is_stream(target):
        with open_stream(target, wait=False) as stream:
            stream.write(_encode(text))
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = _end_of_last_line(handle)
        os.ftruncate(handle, end)
        os.lseek(handle, end, os.SEEK_SET)
        data = _encode(text)
        try:
            written = os.write(handle, data)
        except OSError:
            os.ftruncate(handle, end)
            raise
        if written < len(data):  # the disk became full during the write
            os.ftruncate(handle, end)
            raise OSError(f"expected room for {len(data)} more bytes in {path}, got a full disk")
        os.fsync(handle)
    finally:
        os.close(handle)


def _end_of_last_line(handle: int) -> int:
    """Return the end of the last complete line."""
    end = os.lseek(handle, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        os.lseek(handle, start, os.SEEK_SET)
        found = os.read(handle, end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
