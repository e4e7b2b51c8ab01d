"""Similarity matrices of eigenspaces and masks over training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hesscurv.plots import canvas
from hesscurv.plots.by_parameter import name_steps
from hesscurv.plots.hover import show_cells
from hesscurv.plots.records import Record, as_records, failed, missing, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_WITH_NUMBERS = 8


def space_overlaps(records: Iterable[Record], ax: Any = None) -> Axes:
    """Draw the overlap of the eigenspaces of every two measurements as a matrix.

    A space that stops changing shows as a bright block from there on. Pairs that were not measured
    are grey.

    Args:
        records: Those of a `CurvatureMonitor` that hold "space_overlaps", the overlaps with earlier
            spaces, or "space_overlap", the one with the last; or the monitor.
        ax: The axes to draw into; those of a new figure by default.

    Returns:
        The axes: steps from left to right, and from top to bottom.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If `records` are not records, or `ax` is not an Axes.
        ValueError: If there is no record, or none compares a space with an earlier one.

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701.

    Example:
        >>> ax = hesscurv.plots.space_overlaps(monitor)
        >>> ax.figure.savefig("space_overlaps.png")
    """
    ax = _matrix(records, "space_overlap", "overlap", ax)
    canvas.title(ax, "Overlap of eigenspaces")
    return ax


def mask_ious(records: Iterable[Record], ax: Any = None) -> Axes:
    """Draw the intersection over union of the masks of every two measurements as a matrix.

    Args:
        records: Those of a `CurvatureMonitor` that hold "mask_ious", or "mask_iou", that with the
            last mask; or the monitor.
        ax: The axes to draw into; those of a new figure by default.

    Returns:
        The axes: steps from left to right, and from top to bottom.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If `records` are not records, or `ax` is not an Axes.
        ValueError: If there is no record, or none compares a mask with an earlier one.

    Example:
        >>> ax = hesscurv.plots.mask_ious(monitor)
        >>> ax.figure.savefig("mask_ious.png")
    """
    ax = _matrix(records, "mask_iou", "intersection over union", ax)
    canvas.title(ax, "IoU of magnitude masks")
    return ax


def _matrix(records: Iterable[Record], key: str, label: str, ax: Any) -> Any:
    """Draw a symmetric matrix over all compared steps, with ones on its diagonal."""
    cells, steps = _cells(as_records(records), key)
    ax = canvas.axes_or_new(ax, (5.6, 4.6))
    rows = [
        [1.0 if a == b else cells.get((max(a, b), min(a, b)), math.nan) for b in steps]
        for a in steps
    ]
    scale = canvas.matplotlib_parts().colormaps[canvas.SEQUENTIAL].with_extremes(bad=canvas.MISSING)
    image = ax.imshow(rows, cmap=scale, vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.02).outline.set_visible(False)
    if len(steps) <= _MOST_WITH_NUMBERS:
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    color = "black" if value > 0.55 else "white"
                    center = {"ha": "center", "va": "center", "gid": "cell"}
                    ax.text(j, i, f"{value:.2f}", color=color, fontsize=canvas.SMALL, **center)
    show_cells(
        *(ax, rows, lambda i: f"step {steps[i]:,} with others"),
        lambda i, j: f"steps {steps[i]:,} and {steps[j]:,}",
    )
    name_steps(ax, steps)
    ax.set_yticks(ax.get_xticks(), [text.get_text() for text in ax.get_xticklabels()])
    ax.set_ylabel("training step")
    return ax


def _cells(records: list[Record], key: str) -> tuple[dict[tuple[int, int], float], list[int]]:
    """Return the values by (later step, earlier step), and all steps among them."""
    cells: dict[tuple[int, int], float] = {}
    before = None  # the last measurement, with which the next one may be compared
    for record in records:
        if failed(record):
            continue
        step = record["step"]
        # The first record holds no comparison, but it does have a space.
        if record.get(key) is not None and before is not None:
            cells[step, before] = number(record[key])
        for earlier, value in record.get(f"{key}s") or ():
            cells[step, int(earlier)] = number(value)
        before = step
    cells = {pair: value for pair, value in cells.items() if math.isfinite(value)}
    if not cells:
        raise missing(records, f"{key}s")
    return cells, sorted({step for pair in cells for step in pair})
