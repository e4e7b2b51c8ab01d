"""Values that a page shows where the pointer rests on a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

# Beyond this number of marks a page loads slowly; they would lie closer than a pointer can tell.
_MOST_MARKS = 2000
_RADIUS = 7.0  # CSS pixels
_ATTRIBUTE = "hesscurv_values"


class Value(NamedTuple):
    """The text of a point, or of a cell or bar around it.

    Args:
        x: Center, in data coordinates.
        y: Likewise.
        text: Plain text.
        width: Width of the cell in data coordinates; 0 for a point.
        height: Likewise.
    """

    x: float
    y: float
    text: str
    width: float = 0.0
    height: float = 0.0


def show_values(ax: Any, values: Iterable[Value]) -> None:
    """Attach texts to axes; those of their lines, which are shown otherwise, are not."""
    setattr(ax, _ATTRIBUTE, [*getattr(ax, _ATTRIBUTE, ()), *values])


def show_cells(
    ax: Any,
    rows: Sequence[Sequence[float]],
    name_row: Callable[[int], str],
    name_cell: Callable[[int, int], str],
) -> None:
    """Attach the values of a heat map, by cell; with too many cells the range of each row.

    Args:
        ax: Axes whose cells have size 1 and whole-numbered centers.
        rows: The values; those that are not finite have no text.
        name_row: Names a row, given its index.
        name_cell: Names a cell, given those of its row and column.
    """
    found = [[(j, value) for j, value in enumerate(row) if math.isfinite(value)] for row in rows]
    if sum(map(len, found)) <= _MOST_MARKS:
        cells = ((i, j, value) for i, row in enumerate(found) for j, value in row)
        show_values(
            ax, (Value(j, i, f"{name_cell(i, j)}: {brief(v)}", 1.0, 1.0) for i, j, v in cells)
        )
        return
    for i, row in enumerate(found):
        if row:
            values = [value for _, value in row]
            text = f"{name_row(i)}: {brief(min(values))} to {brief(max(values))}"
            width = len(rows[i])
            show_values(ax, [Value((width - 1) / 2, i, text, width, 1.0)])


def draw_marks(figure: Any, width: int, height: int) -> str:
    """Return a transparent SVG with the values of a figure as titles, to lie over its picture.

    Args:
        figure: A figure that has been drawn, so that its layout is final.
        width: Width of the picture in CSS pixels.
        height: Likewise.
    """
    marks = [mark for ax in figure.axes for mark in _marks(ax, width, height)]
    marks = marks[:: math.ceil(len(marks) / _MOST_MARKS)] if marks else []
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(marks)}</svg>'


def _marks(ax: Any, width: int, height: int) -> Iterator[str]:
    values = getattr(ax, _ATTRIBUTE, None)
    if values is None:
        values = list(_of_lines(ax))
    total_width, total_height = ax.figure.bbox.width, ax.figure.bbox.height

    def place(x: float, y: float) -> tuple[float, float]:
        right, up = ax.transData.transform((x, y))
        return width * right / total_width, height * (1 - up / total_height)

    # A point on the edge of the axes is visible, one beyond it is clipped.
    corners = [place(*corner) for corner in zip(ax.get_xlim(), ax.get_ylim(), strict=True)]
    (left, right), (top, bottom) = (sorted(side) for side in zip(*corners, strict=True))
    for value in values:
        x, y = place(value.x, value.y)
        if not (left - 1 <= x <= right + 1 and top - 1 <= y <= bottom + 1):  # also if NaN
            continue
        title = f"<title>{escape(value.text)}</title>"
        if not (value.width or value.height):
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS:g}">{title}</circle>'
            continue
        x0, y0 = place(value.x - value.width / 2, value.y - value.height / 2)
        x1, y1 = place(value.x + value.width / 2, value.y + value.height / 2)
        yield (
            f'<rect x="{min(x0, x1):.1f}" y="{min(y0, y1):.1f}" width="{abs(x1 - x0):.1f}" '
            f'height="{abs(y1 - y0):.1f}">{title}</rect>'
        )


def _of_lines(ax: Any) -> Iterator[Value]:
    """Yield the values of all lines drawn in data coordinates."""
    for line in ax.get_lines():
        if line.get_transform() is not ax.transData:  # a mark that spans the axes
            continue
        label = str(line.get_label())
        name = ax.get_ylabel() if label.startswith("_") else label
        for x, y in zip(*line.get_data(), strict=True):
            if math.isfinite(x) and math.isfinite(y):
                yield Value(x, y, f"{name.strip()}: {brief(y)}, {ax.get_xlabel()} {brief(x)}")


def brief(number: float) -> str:
    """Format a number to four digits, a whole one without a decimal point."""
    whole = number == round(number) if math.isfinite(number) else False
    return f"{number:,.0f}" if whole and abs(number) < 1e12 else f"{number:.4g}"
