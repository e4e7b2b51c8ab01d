"""Plots by parameter: bars for one measurement, a heat map over several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hesscurv.eigensolvers import Eigenpairs
from hesscurv.metrics import leverage_by_parameter
from hesscurv.plots import canvas
from hesscurv.plots.hover import Value, brief, show_cells, show_values
from hesscurv.plots.records import Record, as_records, failed, having, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST_NAME, _LONGEST_WHOLE = 34, 80
_ROW = 0.2  # inches for a row with a name
_TALLEST = 15.0


def leverage(source: Any, ax: Any = None) -> Axes:
    """Draw the share of the top eigenspace that each parameter carries.

    The leverage of a weight is the squared length of its axis projected onto the space; the shares
    of all parameters sum to 1. One measurement is drawn as bars, several as a heat map of
    parameters by steps.

    Args:
        source: The records of a `CurvatureMonitor` that hold "leverage_by_parameter", or the
            monitor; or `Eigenpairs` with a layout; or a dict from name to share, or to leverage
            scores, as returned by `hesscurv.leverage_by_parameter`. For eigenpairs and scores a
            line in each bar shows the parameter's share of all entries, its leverage by chance.
        ax: The axes to draw into; those of a new figure, as tall as its rows need, by default.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If `source` is none of them, or `ax` is not an Axes.
        ValueError: If there is no record, or none holds the quantity; or the eigenpairs have no
            layout.

    Example:
        >>> ax = hesscurv.plots.leverage(monitor)
        >>> ax.figure.savefig("leverage.png")
    """
    label = "share of the eigenspace"
    if isinstance(source, Eigenpairs):
        source = leverage_by_parameter(source)
    if isinstance(source, Mapping) and "step" not in source:
        shares, sizes = _sum_by_name(source)
        label += "" if sizes is None else " (line: by chance)"
        ax = _bars(shares, label, ax, marks=sizes)
    else:
        ax = by_parameter(source, "leverage_by_parameter", ax, label=label)
    canvas.title(ax, "Leverage by parameter")
    return ax


def sparsity(source: Any, ax: Any = None) -> Axes:
    """Draw the fraction of each parameter that is zero, or pruned.

    Args:
        source: The records of a `CurvatureMonitor` that hold "sparsity_by_parameter", or the
            monitor; or the report of `hesscurv.pruning.prune_model`; or a dict from name to
            sparsity, or to a bool mask of the entries that are kept. One measurement is drawn as
            bars, several as a heat map of parameters by steps.
        ax: The axes to draw into; those of a new figure, as tall as its rows need, by default.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If `source` is none of them, or `ax` is not an Axes.
        ValueError: If there is no record, or none holds the quantity.

    Example:
        >>> ax = hesscurv.plots.sparsity(monitor)
        >>> ax.figure.savefig("sparsity.png")
    """
    total = None
    if hasattr(source, "layers") and hasattr(source, "sparsity"):
        total = source.sparsity
        source = {layer.name: layer.sparsity for layer in source.layers}
    if isinstance(source, Mapping) and "step" not in source:
        label = "sparsity" if total is None else f"sparsity (line: of all together, {total:.3g})"
        ax = _bars(_sparsities(source), label, ax, limits=(0, 1))
        if total is not None:
            ax.axvline(total, linestyle="--", color=canvas.ORANGE, linewidth=2)
    else:
        ax = by_parameter(source, "sparsity_by_parameter", ax, label="sparsity", limits=(0, 1))
    canvas.title(ax, "Sparsity by parameter")
    return ax


def by_parameter(
    records: Iterable[Record],
    quantity: str,
    ax: Any = None,
    *,
    label: str | None = None,
    limits: tuple[float, float] | None = None,
) -> Axes:
    """Draw any number of each parameter: bars of one record, a heat map of several.

    Args:
        records: Those of a `CurvatureMonitor`: dicts with a "step"; or the monitor.
        quantity: The key of a dict from name to number: "overlap_by_parameter",
            "mask_by_parameter", ... Parameters are drawn from the top in the order in which they
            come first; where a record lacks one, or failed, the cell stays grey.
        ax: The axes to draw into; those of a new figure, as tall as its rows need, by default.
        label: Label of the numbers; the quantity's name by default.
        limits: Limits of the scale; 0 and the largest by default.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If `records` are not records, or `ax` is not an Axes.
        ValueError: If there is no record, or none holds the quantity.

    Example:
        >>> ax = hesscurv.plots.by_parameter(monitor, "leverage_by_parameter")
    """
    found = having(records, quantity)
    given = canvas.plain(quantity.replace("_", " ")) if label is None else canvas.label(label)
    if len(found) == 1:
        ax = _bars({n: number(v) for n, v in found[0][quantity].items()}, given, ax, limits=limits)
        canvas.title(ax, f"{_capital(given)}, step {found[0]['step']:,}")
        return ax
    names = list(dict.fromkeys(name for record in found for name in record[quantity]))
    columns = [r for r in as_records(records) if failed(r) or r.get(quantity)]
    rows = [
        [math.nan if failed(r) else number(r[quantity].get(name)) for r in columns]
        for name in names
    ]
    ax = canvas.axes_or_new(ax, (width_of(names, len(columns)), height_of(len(names))))
    low, high = limits or (min(0.0, _finite(rows, min)), _finite(rows, max))
    scale = canvas.matplotlib_parts().colormaps[canvas.SEQUENTIAL].with_extremes(bad=canvas.MISSING)
    image = ax.imshow(rows, cmap=scale, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label=given, pad=0.02).outline.set_visible(False)
    name_rows(ax, names)
    name_steps(ax, [record["step"] for record in columns])
    show_cells(
        *(ax, rows, lambda i: names[i]),
        lambda i, j: f"{names[i]}, step {columns[j]['step']:,}",
    )
    for column in [i for i, record in enumerate(columns) if failed(record)]:
        place = {"ha": "center", "va": "center", "rotation": 90, "gid": "cell", "clip_on": True}
        if _inches(ax, "width") / len(columns) < 0.14:
            break  # no room: leave it grey
        ax.text(column, (len(names) - 1) / 2, "failed", color="black", fontsize=8, **place)
    canvas.title(ax, _capital(given))
    return ax


def name_steps(ax: Any, steps: list[int]) -> None:
    """Label the columns of a heat map with their steps, as many as fit."""
    texts = canvas.short_steps(steps)
    inches = _inches(ax, "width") / len(steps)
    every = max(1, math.ceil((0.09 * max(map(len, texts)) + 0.1) / inches))
    places = list(range(0, len(steps), every))
    ax.set_xticks(places, [texts[i] for i in places])
    ax.set_xlabel("training step")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=2)


def shorten(names: Iterable[str], longest: int = _LONGEST_NAME) -> list[str]:
    """Return names without their common prefix, abbreviated in the middle if too long.

    Names that would coincide are left whole or, if very long, numbered.
    """
    names = list(names)
    parts = [name.split(".")[:-1] for name in names]
    same = (len(set(column)) == 1 for column in zip(*parts, strict=False))
    common = sum(itertools.takewhile(bool, same)) if len(names) > 1 else 0
    rest = [".".join(name.split(".")[common:]) for name in names]
    keep = longest // 2 - 1
    cut = [
        name if len(name) <= longest else f"{name[:keep]}…{name[-(longest - keep - 1) :]}"
        for name in rest
    ]
    if len(set(cut)) == len(set(names)):
        return cut
    if max(map(len, rest)) <= _LONGEST_WHOLE:
        return rest
    return [
        short if cut.count(short) == 1 else f"{short} ({cut[: i + 1].count(short)})"
        for i, short in enumerate(cut)
    ]


def _bars(
    values: dict[str, float],
    label: str,
    ax: Any,
    *,
    limits: tuple[float, float] | None = None,
    marks: dict[str, float] | None = None,
) -> Any:
    """Draw horizontal bars, the first name on top, with marks across them."""
    if not values:
        raise ValueError("expected a number for at least one parameter, got an empty dict")
    ax = canvas.axes_or_new(ax, (width_of(values, 13), height_of(len(values))))
    places = range(len(values))
    ax.barh(places, list(values.values()), height=0.7, color=canvas.BLUE)
    if marks:
        x = [marks[name] for name in values]
        top, bottom = ([place + d for place in places] for d in (-0.45, 0.45))
        ax.vlines(x, top, bottom, color=canvas.ORANGE, linewidth=2)
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.set_xlim(*(limits or (min(0.0, *values.values(), 0.0), None)))
    ax.set_xlabel(label)
    ax.grid(axis="x", color=canvas.GREY, alpha=0.25, linewidth=0.8)
    name_rows(ax, list(values))
    left, right = ax.get_xlim()
    middle, whole = (left + right) / 2, right - left  # the row, as short bars are hard to meet
    show_values(
        ax,
        (
            Value(middle, i, f"{n}: {brief(v)}", whole, 1.0)
            for i, (n, v) in enumerate(values.items())
        ),
    )
    return ax


def name_rows(ax: Any, names: list[str]) -> None:
    """Label the rows, from the top, with their names, as many as fit."""
    inches = _inches(ax, "height") / len(names)
    every = max(1, math.ceil(0.11 / inches))
    size = min(10.0, max(6.5, 72 * every * inches * 0.72))
    places = range(0, len(names), every)
    short = shorten(map(canvas.name, names))
    ax.set_yticks(list(places), [short[i] for i in places], fontsize=size, **canvas.AS_IT_IS)
    ax.tick_params(axis="y", length=0)


def _inches(ax: Any, side: str) -> float:
    """Return the width or height of the axes before names and colour bar take their part."""
    return float(getattr(ax.get_window_extent(), side) / ax.figure.dpi)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def height_of(rows: int) -> float:
    """Return the height in inches of a figure with rows."""
    return min(_TALLEST, max(2.6, 1.1 + _ROW * rows))


def width_of(names: Iterable[str], columns: int) -> float:
    """Return the width in inches of a figure with rows of some names and columns."""
    longest = max(map(len, shorten(map(canvas.name, names))))
    return min(10.0, max(4.8, 1.5 + 0.07 * longest + 0.18 * columns))


def _finite(rows: list[list[float]], choose: Any) -> float:
    return float(choose((v for row in rows for v in row if math.isfinite(v)), default=1.0))


def _sum_by_name(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float] | None]:
    """Return shares by name and, for scores, each parameter's share of all entries."""
    if not all(isinstance(value, Tensor) and value.ndim for value in values.values()):
        return _numbers(values), None
    sums = {name: float(scores.double().sum()) for name, scores in values.items()}
    total, entries = sum(sums.values()), sum(scores.numel() for scores in values.values())
    return (
        {name: value / total for name, value in sums.items()},
        {name: scores.numel() / entries for name, scores in values.items()},
    )


def _sparsities(values: Mapping[str, Any]) -> dict[str, float]:
    """Return sparsities by name; for masks, the fraction of pruned entries."""
    whole = {
        name: 1.0 - float(value.double().mean())
        if isinstance(value, Tensor) and value.dtype.is_floating_point is False and value.ndim
        else value
        for name, value in values.items()
    }
    return _numbers(whole)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {str(name): number(value) for name, value in values.items()}
    for name, value in numbers.items():
        if math.isnan(value):
            raise TypeError(
                f"expected a dict from name to number, got {type(values[name]).__name__} for "
                f"{name!r}; pass records, or one number for each parameter"
            )
    return numbers
