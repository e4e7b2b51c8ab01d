"""HTML report of a monitor's records: findings, cards, figures, table, failures and cost."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hesscurv.eigensolvers import Eigenpairs
from hesscurv.plots.monitor_figures import draw_all
from hesscurv.plots.monitor_findings import (
    chance_level,
    monitor_findings,
    stability_share,
    value_of,
)
from hesscurv.plots.records import Record, as_records, failed, number
from hesscurv.plots.report_figures import figures_html
from hesscurv.plots.report_page import Card, assemble_page, check_file_path, encode_page, write_page
from hesscurv.plots.report_tables import (
    Row,
    details_html,
    download_html,
    failures_html,
    format_number,
    format_percent,
    table_html,
)

# Columns of the tables, in order: key and heading.
_COLUMNS = {
    "loss": "loss",
    "sharpness": "sharpness",
    "learning_rate": "learning rate",
    "stable_rate": "stable rate",
    "sharpness_ratio": "sharpness × rate / 2",
    "gradient_share": "gradient in the space",
    "overlap": "overlap",
    "overlap_chance": "by chance",
    "overlap_chance_std": "its deviation",
    "overlap_z_score": "z-score",
    "space_overlap": "with last space",
    "space_overlap_first": "with first space",
    "mask_iou": "with last mask (IoU)",
    "mask_iou_first": "with first mask (IoU)",
    "trace": "trace",
    "trace_standard_error": "its standard error",
    "effective_rank": "effective rank",
    "sparsity": "sparsity",
    "converged": "converged pairs",
    "num_matvecs": "products",
    "seconds": "seconds",
    "fraction": "of training time",
    "event": "event",
}
# Those always in sight; all others are one click away.
_MAIN = ("loss", "sharpness", "overlap", "space_overlap", "sparsity", "event")
_PERCENT = {"gradient_share", "fraction"}


def write_report(
    records: Iterable[Record],
    path: str | os.PathLike[str],
    *,
    title: str = "Curvature while training",
    pairs: Eigenpairs | None = None,
    num_parameters: int | None = None,
) -> Path:
    """Write a self-contained HTML page with findings, figures of all quantities, and tables.

    The sentences on top say what the records support: how far the sharpness is from the stability
    limit, since when the overlap is within chance, since when the eigenspace has settled. The page
    needs no other file, network or script; it follows the reader's colour scheme and fits a phone;
    values show where the pointer rests. `hooks.LiveReport` writes the same page while training.

    Args:
        records: Records of a `CurvatureMonitor`, dicts with a "step", possibly read from a file of
            JSON lines; or the monitor. Failed measurements are listed with their errors.
        path: The file to write; its folder must exist.
        title: The page's heading.
        pairs: The last eigenpairs, whose spectrum shows unconverged pairs; the eigenvalues of the
            last record by default.
        num_parameters: D, for the chance level of the overlap by k; that of `pairs` by default.

    Returns:
        The path. Without matplotlib the page has no figures but says how to get them.

    Raises:
        TypeError: If `records` are not records, or `pairs` not Eigenpairs.
        ValueError: If there is no record.
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder.
        OSError: If the disk is full; a file that was there before is untouched.

    Cost:
        A few tenths of a second and some tens of kilobytes per figure.
    """
    records = as_records(records)
    if pairs is not None and not isinstance(pairs, Eigenpairs):
        raise TypeError(f"expected pairs to be Eigenpairs or None, got {type(pairs).__name__}")
    path = check_file_path(path)
    page = make_report(records, title=title, pairs=pairs, num_parameters=num_parameters)
    write_page(encode_page(page), path)
    return path


def make_report(
    records: list[Record],
    *,
    title: str,
    pairs: Eigenpairs | None = None,
    num_parameters: int | None = None,
    refresh: float | None = None,
) -> str:
    """Return the page of `write_report` as HTML.

    Args:
        records: Records, sorted by step; at least one.
        title: As for `write_report`.
        pairs: Likewise.
        num_parameters: Likewise.
        refresh: Seconds after which an open page loads itself again; None for never.
    """
    if pairs is not None and num_parameters is None:
        num_parameters = pairs.eigenvectors.shape[0]
    first, last = records[0]["step"], records[-1]["step"]
    count = f"{len(records):,} measurement" + ("s" if len(records) != 1 else "")
    steps = f"at step {first:,}" if first == last else f"from step {first:,} to step {last:,}"
    live = "" if refresh is None else " Rewritten while training goes on."
    return assemble_page(
        str(title),
        about=f"{count} {steps}. Written by hesscurv.{live}",
        findings=monitor_findings(records),
        cards=_cards(records),
        sections=[
            ("Figures", figures_html(draw_all(records, pairs, num_parameters))),
            ("Measurements", _tables(records)),
            ("Failed measurements", _failures(records)),
        ],
        refresh=refresh,
    )


def _cards(records: list[Record]) -> list[Card]:
    """Return the cost, and the last value of each quantity beside what it compares with."""
    good = [record for record in records if not failed(record)]
    num_failed = len(records) - len(good)
    matvecs, seconds = _total(records, "num_matvecs"), _total(records, "seconds")
    fraction = _last(records, "fraction")
    cards = [
        Card("measurements" if len(records) > 1 else "measurement", f"{len(records):,}"),
        Card("failed", f"{num_failed:,}", bad=True) if num_failed else None,
        matvecs
        and Card(
            "products with the curvature",
            format_number(matvecs[0]),
            f"{format_number(matvecs[0] / matvecs[1])} per measurement",
        ),
        seconds
        and Card(
            "seconds of measuring",
            format_number(seconds[0]),
            f"{format_percent(value_of(fraction, 'fraction'))} of the training time"
            if fraction
            else f"{format_number(seconds[0] / seconds[1])} per measurement",
        ),
        _card(good, "loss", "last loss"),
        _card(good, "sharpness", "last sharpness", _limit),
        _card(good, "gradient_share", "of the gradient in the top eigenspace"),
        _card(good, "overlap", "last overlap", _chance),
        _card(good, "space_overlap", "last overlap with earlier space"),
        _card(good, "mask_iou", "last IoU with earlier mask"),
        _negative(good),
        _card(good, "trace", "last trace", _standard_error),
        _card(good, "effective_rank", "last effective rank"),
        _card(good, "sparsity", "last sparsity"),
    ]
    return [card for card in cards if card]


def _card(good: list[Record], quantity: str, name: str, reference: Any = None) -> Card | None:
    """Return a card with the last value, beside its reference, or else its first value."""
    last = _last(good, quantity)
    if last is None:
        return None
    beside = reference(last) if reference else ""
    first = next(r for r in good if value_of(r, quantity) == value_of(r, quantity))
    if not beside and first is not last:
        beside = f"{_format(quantity, first[quantity])} at step {first['step']:,}"
    return Card(name, _format(quantity, last[quantity]), beside)


def _limit(record: Record) -> str:
    share = stability_share(record)
    return f"limit {format_number(number(record['sharpness']) / share)}" if share else ""


def _chance(record: Record) -> str:
    level = chance_level(record)
    if level is None:
        return ""
    return f"chance {format_number(level[0])} ± {_short(level[1])}"


def _standard_error(record: Record) -> str:
    error = value_of(record, "trace_standard_error")
    return f"± {_short(error)}" if error == error else ""


def _negative(good: list[Record]) -> Card | None:
    record = next((r for r in reversed(good) if r.get("eigenvalues")), None)
    if record is None:
        return None
    values = [number(value) for value in record["eigenvalues"]]
    converged = record.get("converged")
    beside = "" if converged is None else f"{_cell(record, 'converged')} converged"
    return Card("negative eigenvalues", f"{sum(v < 0 for v in values)} of {len(values)}", beside)


def _total(records: list[Record], quantity: str) -> tuple[float, int] | None:
    """Return the sum over all measurements, failed ones too, and how many hold the quantity."""
    values = [value for r in records if (value := value_of(r, quantity)) == value]
    return (sum(values), len(values)) if values else None


def _last(records: list[Record], quantity: str) -> Record | None:
    held = (r for r in reversed(records) if value_of(r, quantity) == value_of(r, quantity))
    return next(held, None)


def _tables(records: list[Record]) -> str:
    shown = [key for key in _COLUMNS if any(r.get(key) is not None for r in records)]
    main = [key for key in shown if key in _MAIN]

    def table(keys: list[str]) -> str:
        rows = (Row(_step(r), [_cell(r, key) for key in keys], bad=failed(r)) for r in records)
        return table_html(["step", *(_COLUMNS[key] for key in keys)], rows)

    parts = [table(main)]
    if shown != main:
        parts.append(details_html(f"All {len(shown)} columns", table(shown)))
    columns = ["step", "status", *shown]
    rows = ([r["step"], r.get("status", "ok"), *map(r.get, shown)] for r in records)
    return "\n".join([*parts, download_html(columns, rows, "measurements.csv")])


def _failures(records: list[Record]) -> str:
    return failures_html(
        (f"Step {_step(r)}", str(r.get("error", "unknown"))) for r in records if failed(r)
    )


def _step(record: Record) -> str:
    return f"{record['step']:,}" + (" ✕" if failed(record) else "")


def _cell(record: Record, key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if key == "event":
        return str(value)
    if key == "converged" and record.get("eigenvalues"):
        return f"{value:,} of {len(record['eigenvalues']):,}"
    return _format(key, value)


def _format(key: str, value: Any) -> str:
    return format_percent(value) if key in _PERCENT else format_number(value)


def _short(value: float) -> str:
    return f"{value:.2g}"
