"""Extraction of a quantity from the records of a monitor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Record = Mapping[str, Any]


class Series(NamedTuple):
    """A quantity by step: NaN if the measurement failed or was not finite."""

    steps: list[int]
    values: list[float]
    failed: list[int]


def as_records(records: Any) -> list[Record]:
    """Return records as a list sorted by step.

    Args:
        records: A list of records, one record, or a monitor, which has ``.records``.

    Raises:
        TypeError: If it is anything else.
        ValueError: If there are none.
    """
    records = getattr(records, "records", records)
    if isinstance(records, Mapping):
        records = [records]
    if isinstance(records, (str, bytes)) or not isinstance(records, Iterable):
        raise TypeError(
            "expected the records of a CurvatureMonitor, a list of dicts, got "
            f"{type(records).__name__}"
        )
    records = list(records)
    for record in records:
        if not isinstance(record, Mapping) or "step" not in record:
            got = f"one without: {sorted(record)}" if isinstance(record, Mapping) else repr(record)
            raise TypeError(f'expected records, dicts that have a "step", got {got[:200]}')
    if not records:
        raise ValueError(
            "expected at least one record, got none; call monitor.step(step) at a step at which "
            "its schedule measures"
        )
    return sorted(records, key=lambda record: record["step"])


def failed(record: Record) -> bool:
    """Return whether the measurement failed."""
    return record.get("status", "ok") != "ok"


def having(records: Any, quantity: str) -> list[Record]:
    """Return the records that hold a quantity, sorted by step.

    Raises:
        TypeError: As `as_records`.
        ValueError: If there are none.
    """
    records = as_records(records)
    found = [r for r in records if not failed(r) and r.get(quantity) not in (None, [], {})]
    if not found:
        raise missing(records, quantity)
    return found


def missing(records: list[Record], quantity: str) -> ValueError:
    """Return the error for a quantity that no record holds."""
    held = sorted({key for record in records for key in record} - {"step", "status", "error"})
    num_failed = sum(map(failed, records))
    return ValueError(
        f"expected records that hold {quantity!r}, got {len(records)} without it"
        + (f", of which {num_failed} failed" if num_failed else "")
        + f"; they hold {', '.join(held) or 'nothing'}: have the monitor measure it too"
    )


def number(value: Any) -> float:
    """Return a value as a float; NaN for anything else, such as the null of a JSON file."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def series(records: Any, quantity: str) -> Series:
    """Return a quantity by step, with NaN where a measurement failed.

    Records without the quantity are skipped: it was not due at that step.

    Raises:
        TypeError: As `as_records`.
        ValueError: If no record holds a finite value of it.
    """
    records = as_records(records)
    steps, values, failures = [], [], []
    for record in records:
        if failed(record):
            failures.append(record["step"])
        elif quantity not in record:
            continue
        value = math.nan if failed(record) else number(record[quantity])
        steps.append(record["step"])
        values.append(value if math.isfinite(value) else math.nan)
    if all(math.isnan(value) for value in values):
        raise missing(records, quantity)
    return Series(steps, values, failures)
