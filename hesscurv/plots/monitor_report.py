"""HTML report of a monitor's records: figures, table, failures and cost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from hesscurv.eigensolvers import Eigenpairs
from hesscurv.plots.monitor_figures import draw_all, is_number
from hesscurv.plots.records import Record, as_records, failed, number
from hesscurv.storage.atomic_files import write_atomically

# Columns of the table, in order: key and heading.
_COLUMNS = {
    "loss": "loss",
    "sharpness": "sharpness",
    "learning_rate": "learning rate",
    "stable_rate": "stable rate",
    "sharpness_ratio": "sharpness × rate / 2",
    "gradient_share": "gradient in the space",
    "overlap": "overlap",
    "overlap_chance": "by chance",
    "overlap_z_score": "z-score",
    "space_overlap": "with last space",
    "mask_iou": "with last mask (IoU)",
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
_PERCENT = {"gradient_share", "fraction"}

_CSS = """
:root { --ink: #1f2328; --soft: #59636e; --paper: #fff; --page: #f4f5f7; --line: #d8dce1;
  --bad: #a83c00; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ae; --paper: #1b1e22;
  --page: #121417; --line: #363b42; --bad: #ff9d66; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1.5rem 1rem 3rem; color: var(--ink);
  background: var(--page); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
p { margin: 0 0 1rem; color: var(--soft); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 0; }
.numbers div, figure, .table { background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; }
.numbers div { padding: .6rem .8rem; display: flex; flex-direction: column-reverse; }
.numbers dt { color: var(--soft); font-size: .85rem; }
.numbers dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.figures { display: grid; gap: .75rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; padding: .75rem; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure div { overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; }
.table { overflow: auto; max-height: 46rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; overflow-wrap: normal;
  border-bottom: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--paper); color: var(--soft); z-index: 1;
  font-weight: 500; vertical-align: bottom; white-space: normal; min-width: 5.2rem; }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 600; }
thead th:first-child { left: 0; z-index: 2; min-width: 0; }
tbody tr:last-child > * { border-bottom: 0; }
.bad, .bad th { color: var(--bad); }
td.bad { text-align: left; }
ul { margin: 0; padding-left: 1.2rem; }
li { margin-bottom: .4rem; white-space: pre-wrap; }
"""


def write_report(
    records: Iterable[Record],
    path: str | os.PathLike[str],
    *,
    title: str = "Curvature while training",
    pairs: Eigenpairs | None = None,
    num_parameters: int | None = None,
) -> Path:
    """Write a self-contained HTML page with figures of all quantities, a table, and the cost.

    The page needs no other file, network or script; it follows the reader's colour scheme and fits
    a phone.

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
    path = Path(path)
    records = as_records(records)
    if pairs is not None and not isinstance(pairs, Eigenpairs):
        raise TypeError(f"expected pairs to be Eigenpairs or None, got {type(pairs).__name__}")
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder, got {str(path.parent)!r}")
    if pairs is not None and num_parameters is None:
        num_parameters = pairs.eigenvectors.shape[0]
    page = _page(str(title), records, _figures(records, pairs, num_parameters))
    write_atomically(path, lambda file: file.write(page.encode("utf-8", "xmlcharrefreplace")))
    return path


def _page(title: str, records: list[Record], figures: str) -> str:
    first, last = records[0]["step"], records[-1]["step"]
    count = f"{len(records):,} measurement" + ("s" if len(records) != 1 else "")
    steps = f"at step {first:,}" if first == last else f"from step {first:,} to step {last:,}"
    failures = [record for record in records if failed(record)]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>\n<p>{count} {steps}. Written by hesscurv.</p>",
            _numbers(records),
            f"<h2>Figures</h2>\n{figures}" if figures else "",
            f"<h2>Measurements</h2>\n{_table(records)}",
            f"<h2>Failed measurements</h2>\n{_failures(failures)}" if failures else "",
            "</body>\n</html>\n",
        ]
    )


def _numbers(records: list[Record]) -> str:
    """Return the cost and the last value of each quantity, in large type."""
    good = [record for record in records if not failed(record)]
    num_failed = len(records) - len(good)
    tiles = {
        "measurements" if len(records) > 1 else "measurement": f"{len(records):,}",
        "failed": f"{num_failed:,}" if num_failed else None,
        "products with the curvature": _total(records, "num_matvecs"),
        "seconds of measuring": _total(records, "seconds"),
        "of the training time": _last(records, "fraction"),
        "last loss": _last(good, "loss"),
        "last sharpness": _last(good, "sharpness"),
        "last sharpness × rate / 2": _last(good, "sharpness_ratio"),
        "last overlap": _last(good, "overlap"),
        "last overlap with earlier space": _last(good, "space_overlap"),
        "last sparsity": _last(good, "sparsity"),
    }
    cells = [
        f"<div><dt>{escape(name)}</dt>"
        f"<dd{' class=bad' if name == 'failed' else ''}>{value}</dd></div>"
        for name, value in tiles.items()
        if value is not None
    ]
    return f'<dl class="numbers">{"".join(cells)}</dl>'


def _total(records: list[Record], quantity: str) -> str | None:
    if not is_number(records, quantity) and not is_number(_as_good(records), quantity):
        return None
    values = [number(record.get(quantity)) for record in records]
    return _format(quantity, sum(value for value in values if value == value))


def _as_good(records: list[Record]) -> list[Record]:
    """Return the records as if none had failed: failed measurements count in the cost."""
    return [{**record, "status": "ok"} for record in records]


def _last(records: list[Record], quantity: str) -> str | None:
    held = [r[quantity] for r in records if number(r.get(quantity)) == number(r.get(quantity))]
    return _format(quantity, held[-1]) if held else None


def _figures(records: list[Record], pairs: Eigenpairs | None, num_parameters: int | None) -> str:
    try:
        drawings = list(draw_all(records, pairs, num_parameters))
    except ImportError as error:  # without matplotlib the page still has the numbers
        return f"<p>No figures: {escape(str(error))}</p>"
    # Below 0.7 of its size a figure is illegible: a narrow screen scrolls it instead.
    parts = [
        f'<figure{" class=wide" if d.wide else ""}><div><img src="{d.source}" width="{d.width}" '
        f'height="{d.height}" style="max-width:{1.2 * d.width:.0f}px;'
        f'min-width:{0.7 * d.width:.0f}px" alt="{escape(d.caption)}"></div>'
        f"<figcaption>{escape(d.caption)}</figcaption></figure>"
        for d in drawings
    ]
    return f'<div class="figures">\n{chr(10).join(parts)}\n</div>' if parts else ""


def _table(records: list[Record]) -> str:
    shown = [key for key in _COLUMNS if any(r.get(key) is not None for r in records)]
    head = "".join(f'<th scope="col">{escape(_COLUMNS[key])}</th>' for key in shown)
    rows = []
    for record in records:
        cells = "".join(f"<td>{_cell(record, key)}</td>" for key in shown)
        step = f'<th scope="row">{_step(record)}</th>'
        rows.append(f"<tr{' class=bad' if failed(record) else ''}>{step}{cells}</tr>")
    body = "\n".join(rows)
    return (
        '<div class="table" tabindex="0"><table>\n'
        f'<thead><tr><th scope="col">step</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _failures(records: list[Record]) -> str:
    items = [
        f"<li><strong>Step {_step(record)}</strong>: "
        f"{escape(str(record.get('error', 'unknown')))}</li>"
        for record in records
    ]
    return f'<ul class="bad">{"".join(items)}</ul>'


def _step(record: Record) -> str:
    return f"{record['step']:,}" + (" ✕" if failed(record) else "")


def _cell(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if key == "event":
        return escape(str(value))
    if key == "converged" and record.get("eigenvalues"):
        return f"{value:,} of {len(record['eigenvalues']):,}"
    return _format(key, value)


def _format(key: str, value: Any) -> str:
    value = number(value)
    if value != value:
        return "–"
    if key in _PERCENT:
        return f"{100 * value:.3g} %"
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e12 else f"{value:.4g}"
