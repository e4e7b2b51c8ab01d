"""Tables of an HTML report, with their numbers for download."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from hesscurv.interface.descriptions import Described
from hesscurv.plots.hover import brief
from hesscurv.plots.records import number


@dataclass(frozen=True, repr=False)
class Row(Described):
    """A row of a table.

    Args:
        head: Its name, plain text.
        cells: The other cells, plain text.
        bad: Whether it is a failure.
    """

    head: str
    cells: Sequence[str] = field(default_factory=list)
    bad: bool = False


def table_html(columns: Sequence[str], rows: Iterable[Row], *, names: bool = False) -> str:
    """Return a table that scrolls in itself.

    Args:
        columns: Headings, the first one of the rows' heads, plain text.
        rows: The rows.
        names: Whether the heads are names, which stand to the left and may be long.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join(
        f'<tr{" class=bad" if row.bad else ""}><th scope="row">{escape(row.head)}</th>'
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in row.cells)}</tr>"
        for row in rows
    )
    return (
        f'<div class="table{" names" if names else ""}" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def details_html(summary: str, content: str) -> str:
    """Return content that is folded until the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def download_html(columns: Sequence[str], rows: Iterable[Sequence[Any]], file_name: str) -> str:
    """Return a link that saves a table as CSV; the page itself holds the data.

    Args:
        columns: Headings.
        rows: Plain values.
        file_name: Suggested name of the file.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *([_plain(value) for value in row] for row in rows)])
    data = base64.b64encode(text.getvalue().encode("utf-8", "backslashreplace")).decode()
    return (
        f'<p class="download"><a download="{escape(file_name)}" href="data:text/csv;base64,{data}">'
        f"Download {escape(file_name)}</a></p>"
    )


def failures_html(failures: Iterable[tuple[str, str]]) -> str:
    """Return a list of failures with their errors, plain text; empty without any."""
    items = [
        f"<li><strong>{escape(place)}</strong>: {escape(error)}</li>" for place, error in failures
    ]
    return f'<ul class="bad">{"".join(items)}</ul>' if items else ""


def format_number(value: Any) -> str:
    """Format a number to four digits, a dash for anything else or NaN."""
    value = number(value)
    return "–" if math.isnan(value) else brief(value)


def format_percent(fraction: Any, digits: int = 3) -> str:
    """Format a fraction in percent, a dash for anything else or NaN."""
    fraction = number(fraction)
    return "–" if math.isnan(fraction) else f"{float(f'{100 * fraction:.{digits}g}'):g} %"


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    return " ".join(value.split()) if isinstance(value, str) else value  # a row is a line
