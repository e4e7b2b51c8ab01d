"""HTML of results in notebooks: a title, facts, a small drawing and a table, without scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

_MOST_ROWS = 10
# Legible on white and on black.
_COLORS = ("#3b82c4", "#d9772b")
_WIDTH, _HEIGHT, _MARGIN = 360, 110, 6


class Points(NamedTuple):
    """Points of a drawing, joined by a line or not.

    Args:
        label: Their name.
        x: Positions.
        y: Values; those that are not finite are left out.
        joined: Whether a line joins them.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    joined: bool = False


def notebook_html(
    title: str,
    facts: Mapping[str, Any],
    *,
    drawing: str = "",
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[Any]] = (),
) -> str:
    """Return a self-contained fragment of HTML in the notebook's own colors.

    Args:
        title: The heading.
        facts: Values by name, one line in all.
        drawing: HTML of `draw_points`.
        columns: Headings of the table.
        rows: Its rows, of which the first ten are shown.
    """
    parts = [f"<strong>{escape(title)}</strong>"]
    if facts:
        told = (f"{escape(str(name))}&nbsp;{format_cell(value)}" for name, value in facts.items())
        parts.append(f'<div style="opacity:.8">{" · ".join(told)}</div>')
    parts.append(drawing)
    if rows:
        parts.append(_table(columns, rows))
    return f'<div style="max-width:100%;overflow-x:auto;color:inherit">{"".join(parts)}</div>'


def format_cell(value: Any) -> str:
    """Return a value as escaped text: numbers in four digits, a dash for what is missing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}".replace("-", "−")
    return "–" if value is None else escape(str(value))


def draw_points(
    series: Iterable[Points], *, x: str, y: str, logarithmic: bool = False, description: str = ""
) -> str:
    """Draw points or lines as a small SVG, with the range of both axes in its caption.

    Args:
        series: What is drawn, in one color each.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        logarithmic: Whether the vertical axis is; values that are not positive are left out.
        description: Text for screen readers; default the names of the axes.

    Returns:
        HTML; empty if there are not two points.
    """
    kept = [(one, _finite(one, logarithmic)) for one in series]
    places = [point for _, points in kept for point in points]
    if len(places) < 2:
        return ""
    lows, highs = ([edge(p[i] for p in places) for i in (0, 1)] for edge in (min, max))
    spans = [high - low or 1.0 for low, high in zip(lows, highs, strict=True)]

    def placed(point: tuple[float, float]) -> tuple[float, float]:
        across, up = ((point[i] - lows[i]) / spans[i] for i in (0, 1))
        return (
            round(_MARGIN + across * (_WIDTH - 2 * _MARGIN), 1),
            round(_HEIGHT - _MARGIN - up * (_HEIGHT - 2 * _MARGIN), 1),
        )

    shapes, names = [], []
    for color, (one, points) in zip(_COLORS, kept, strict=False):
        if not points:
            continue
        if one.joined:
            path = " ".join(f"{a},{b}" for a, b in map(placed, points))
            shapes.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
        else:
            dots = (f'<circle cx="{a}" cy="{b}" r="2"/>' for a, b in map(placed, points))
            shapes.append(f'<g fill="{color}">{"".join(dots)}</g>')
        names.append(f'<span style="color:{color}">{escape(one.label)}</span>')
    bottom, top = (10.0**v if logarithmic else v for v in (lows[1], highs[1]))
    caption = (
        f"{', '.join(names)}: {escape(y)} {format_cell(bottom)} to {format_cell(top)}"
        f"{' (logarithmic)' if logarithmic else ''}, {escape(x)} {format_cell(float(lows[0]))} to "
        f"{format_cell(float(highs[0]))}"
    )
    label = escape(description or f"{y} over {x}", quote=True)
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'style="display:block;width:{_WIDTH}px;max-width:100%;border-left:1px solid;'
        f'border-bottom:1px solid">{"".join(shapes)}</svg><small>{caption}</small>'
    )


def _finite(one: Points, logarithmic: bool) -> list[tuple[float, float]]:
    found = []
    for x, y in zip(one.x, one.y, strict=True):
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not logarithmic):
            found.append((float(x), math.log10(y) if logarithmic else float(y)))
    return found


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{format_cell(value)}</td>' for value in row)}</tr>"
        for row in rows[:_MOST_ROWS]
    )
    more = len(rows) - _MOST_ROWS
    note = f"<small>and {more:,} more</small>" if more > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"
