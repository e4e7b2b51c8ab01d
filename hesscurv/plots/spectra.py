"""Eigenvalues of both signs, for one solution and over training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hesscurv.eigensolvers import Eigenpairs
from hesscurv.plots import canvas
from hesscurv.plots.hover import Value, brief, show_values
from hesscurv.plots.records import Record, as_records, having, missing, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIGNS = ((1, canvas.BLUE, "o", "positive"), (-1, canvas.RED, "v", "negative"))
_NOT_CONVERGED = {canvas.BLUE: canvas.SKY, canvas.RED: canvas.ORANGE}


def spectrum(pairs: Eigenpairs | Tensor | Record, ax: Any = None) -> Axes:
    r"""Draw the magnitude of each eigenvalue, by sign, with its residual.

    The residual :math:`\|H v_i - \lambda_i v_i\|` bounds the error of :math:`\lambda_i`: values
    near or below the grey floor, the largest residual at that rank or beyond, are not
    distinguishable from zero. Hollow, lighter marks have not converged.

    Args:
        pairs: `Eigenpairs`; a record with "eigenvalues", and "residuals" if it has them; or
            eigenvalues only, a real tensor (k,). Each is drawn at its rank among those of its
            sign, by decreasing magnitude.
        ax: The axes to draw into; those of a new figure by default.

    Returns:
        The axes, with a logarithmic scale.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If `pairs` is none of the three, or `ax` is not an Axes.
        ValueError: If there is no finite nonzero eigenvalue.

    Example:
        >>> ax = hesscurv.plots.spectrum(pairs)
        >>> ax.figure.savefig("spectrum.png")
    """
    values, residuals, converged = _parts(pairs)
    ranks = _ranks_by_sign(values)
    shown = [abs(v) for v in values if math.isfinite(v) and v != 0]
    if not shown:
        raise ValueError(
            f"expected an eigenvalue that is finite and not zero, got {len(values)} without one; "
            "there is nothing to draw on a logarithmic scale"
        )
    ax = canvas.axes_or_new(ax)
    k = len(values)
    size = 5.0 if k <= 60 else 3.5 if k <= 300 else 2.2
    for sign, color, marker, name in _SIGNS:
        count = sum(sign * values[i] > 0 for i in ranks)
        for full in (True, False):
            points = [
                (rank, abs(values[i]))
                for i, rank in ranks.items()
                if sign * values[i] > 0 and converged[i] == full
            ]
            if points:
                label = f"{name}, {count}" if full else f"{name}, not converged, {len(points)}"
                ax.plot(
                    *zip(*points, strict=True),
                    linestyle="none",
                    marker=marker,
                    color=color if full else _NOT_CONVERGED[color],
                    markersize=size,
                    markerfacecolor=color if full else "none",
                    label=label,
                )
    ax.set_yscale("log")
    low, high = min(shown), max(shown)
    floor = _envelope([(rank, residuals[i]) for i, rank in ranks.items()])
    bottom = _draw_floor(ax, floor, low) if floor else low / 1.6
    ax.set_ylim(min(bottom, low / 1.6), 1.8 * high)
    last = max(ranks.values())
    ax.set_xlim(0, 2) if last == 1 else ax.set_xlim(1 - 0.03 * last, 1.03 * last)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="rank among those of its sign", ylabel="|eigenvalue|")
    show_values(
        ax,
        (
            Value(rank, abs(values[i]), f"{brief(values[i])}{_error(residuals[i])}, rank {rank}")
            for i, rank in ranks.items()
        ),
    )
    canvas.title(ax, f"The {k:,} largest eigenvalues" if k > 1 else "The largest eigenvalue")
    canvas.grid(ax)
    canvas.legend(ax)
    return ax


def eigenvalues(records: Iterable[Record], ax: Any = None) -> Axes:
    """Draw the magnitude of all measured eigenvalues, by sign, against the training step.

    Args:
        records: Those of a `CurvatureMonitor` that hold "eigenvalues"; or the monitor.
        ax: The axes to draw into; those of a new figure by default.

    Returns:
        The axes, with a logarithmic scale; the largest residual of each step in grey.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If `records` are not records, or `ax` is not an Axes.
        ValueError: If there is no record, or none holds an eigenvalue that is not zero.

    Example:
        >>> ax = hesscurv.plots.eigenvalues(monitor)
        >>> ax.figure.savefig("eigenvalues.png")
    """
    found = having(records, "eigenvalues")
    by_sign = []
    for sign, color, marker, name in _SIGNS:
        points = [
            (r["step"], abs(value))
            for r in found
            for value in map(number, r["eigenvalues"])
            if sign * value > 0 and math.isfinite(value)
        ]
        if points:
            by_sign.append((points, color, marker, name))
    if not by_sign:
        raise missing(as_records(records), "eigenvalues")
    ax = canvas.axes_or_new(ax)
    most = max(len(record["eigenvalues"]) for record in found)
    size = 7.0 if most <= 20 else 5.0 if most <= 100 else 3.5
    for points, color, marker, name in by_sign:
        # Mostly the fewer, on top: larger and opaque, unless they would hide the others.
        negative = marker == "v" and most <= 20
        ax.plot(
            *zip(*points, strict=True),
            linestyle="none",
            marker=marker,
            color=color,
            markersize=1.3 * size if negative else size,
            markeredgewidth=0,
            alpha=1.0 if negative else 0.7,
            label=name,
        )
    ax.set_yscale("log")
    heights = [height for points, *_ in by_sign for _, height in points]
    floor = []
    for record in found:
        residuals = [r for r in map(number, record.get("residuals", ())) if r > 0]
        if residuals:
            floor.append((record["step"], max(residuals)))
    bottom = _draw_floor(ax, floor, min(heights)) if floor else min(heights)
    ax.set_ylim(min(bottom, min(heights)) / 1.6, 1.3 * max(heights))
    canvas.mark_events(ax, as_records(records))
    ax.set_ylabel("|eigenvalue|")
    show_values(
        ax,
        (
            Value(r["step"], abs(value), f"{brief(value)}, step {r['step']:,}")
            for r in found
            for value in map(number, r["eigenvalues"])
            if math.isfinite(value) and value != 0
        ),
    )
    canvas.title(ax, "Eigenvalues while training")
    canvas.step_axis(ax, [record["step"] for record in found])
    canvas.grid(ax)
    canvas.legend_above(ax)
    return ax


def _parts(pairs: Any) -> tuple[list[float], list[float], list[bool]]:
    """Return eigenvalues, residuals (NaN if unknown) and convergence flags."""
    if isinstance(pairs, Eigenpairs):
        return pairs.eigenvalues.tolist(), pairs.residuals.tolist(), pairs.converged.tolist()
    if isinstance(pairs, Mapping):
        record = having(pairs, "eigenvalues")[0]
        values = [number(v) for v in record["eigenvalues"]]
        residuals = [number(r) for r in record.get("residuals", ())]
        if len(residuals) != len(values):
            residuals = [math.nan] * len(values)
    elif isinstance(pairs, Tensor) and pairs.ndim == 1 and not pairs.is_complex():
        values, residuals = pairs.double().tolist(), [math.nan] * len(pairs)
    else:
        got = tuple(pairs.shape) if isinstance(pairs, Tensor) else type(pairs).__name__
        raise TypeError(
            f"expected Eigenpairs, a record of a monitor, or eigenvalues (k,), got {got}"
        )
    return values, residuals, [True] * len(values)


def _error(residual: float) -> str:
    return f" ± {residual:.1g}" if math.isfinite(residual) else ""


def _ranks_by_sign(values: list[float]) -> dict[int, int]:
    """Return the rank, from 1, of each eigenvalue by index among those of its sign."""
    ranks = {}
    for sign, *_ in _SIGNS:
        own = [i for i, v in enumerate(values) if sign * v > 0 and math.isfinite(v)]
        own.sort(key=lambda i: -abs(values[i]))
        ranks.update({i: rank for rank, i in enumerate(own, start=1)})
    return ranks


def _envelope(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return, for each rank, the largest residual at that rank or beyond."""
    known = sorted((rank, value) for rank, value in points if value > 0 and math.isfinite(value))
    out: dict[int, float] = {}
    largest = 0.0
    for rank, value in reversed(known):
        out[rank] = largest = max(largest, value)
    return sorted(out.items())


def _draw_floor(
    ax: Any, floor: list[tuple[int, float]], lowest: float, label: str = "largest residual"
) -> float:
    """Draw residuals as a shaded floor; return the lower limit of the axis.

    The axis ends at most three decades below the smallest eigenvalue, to keep the eigenvalues
    apart; a note gives a floor below that.
    """
    x, y = zip(*floor, strict=True)
    bottom = max(min(y) / 2, lowest / 1e3)
    if max(y) <= bottom:
        ax.plot([], [], " ", label=f"residuals up to {max(y):.1g}, below")
        return lowest / 1.6
    ax.fill_between(x, y, bottom / 100, color=canvas.GREY, alpha=0.3, linewidth=0)
    mark = {"marker": "_", "markersize": 8} if len(x) == 1 else {}
    ax.plot(x, y, color=canvas.GREY, linewidth=1.2, label=label, **mark)
    return bottom
