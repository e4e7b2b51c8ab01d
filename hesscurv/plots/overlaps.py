"""Overlap of mask and eigenspace, by k and by training step, with its chance level."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hesscurv.eigensolvers import Eigenpairs
from hesscurv.metrics import chance_overlap
from hesscurv.metrics import overlap_by_k as compute_overlap_by_k
from hesscurv.plots import canvas
from hesscurv.plots.curves import curve
from hesscurv.plots.records import Record, as_records, failed, having, number, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_IN_LEGEND = 6
_CHANCE = "chance ± 3 std, k / D"


def overlap_by_k(
    scores: Tensor | Iterable[Record],
    pairs: Eigenpairs | Tensor | None = None,
    ax: Any = None,
    *,
    num_parameters: int | None = None,
    label: str = "overlap",
) -> Axes:
    """Draw the overlap of the top-k mask with the top-k eigenspace against k.

    The chance level k / D is dashed, with a band of three standard deviations.

    Args:
        scores: Shape (D,): the k largest are the mask of size k, as in `hesscurv.overlap_by_k`;
            pass the absolute values of the weights for the paper's curve. Or the records of a
            `CurvatureMonitor` that hold "overlap_by_k", one curve each.
        pairs: With scores: `Eigenpairs`, or a basis (D, K) with orthonormal columns.
        ax: The axes to draw into; those of a new figure by default. Call again with the same for
            another curve.
        num_parameters: With records: D, for the chance level, which is omitted without it.
        label: With scores: the curve's name in the legend.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If the arguments are neither scores with a space nor records, or `ax` is not an
            Axes.
        ValueError: As `hesscurv.overlap_by_k`; or if no record holds the quantity, or D is less
            than the largest k.

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701.

    Example:
        >>> weights = H.layout.flatten(dict(model.named_parameters())).abs()
        >>> ax = hesscurv.plots.overlap_by_k(weights, pairs)
        >>> ax.figure.savefig("overlap_by_k.png")
    """
    curves: list[tuple[str, dict[int, float]]]
    if isinstance(scores, Tensor):
        if pairs is None:
            raise TypeError(
                "expected `pairs` beside scores, got none; pass Eigenpairs, or the records of a "
                "monitor alone"
            )
        values = compute_overlap_by_k(scores, pairs).tolist()
        curves = [(label, dict(enumerate(values, start=1)))]
        num_parameters = len(scores)
    else:
        if pairs is not None:
            raise TypeError(
                f"expected scores (D,) as a tensor beside `pairs`, got {type(scores).__name__}"
            )
        found = having(scores, "overlap_by_k")
        curves = [(f"step {canvas.short(r['step'])}", _by_k(r["overlap_by_k"])) for r in found]
    largest = max(max(points) for _, points in curves)
    if num_parameters is not None and num_parameters < largest:
        raise ValueError(
            f"expected num_parameters >= {largest}, the largest k, got {num_parameters}; pass the "
            "number of parameters D that the eigenvectors have"
        )
    ax = canvas.axes_or_new(ax)
    again = len(ax.get_lines())
    if num_parameters is not None and _CHANCE not in ax.get_legend_handles_labels()[1]:
        _draw_chance(ax, range(1, largest + 1), num_parameters)
    colors = _colors(len(curves), again)
    step = max(1, math.ceil((len(curves) - 1) / (_MOST_IN_LEGEND - 1)))
    named = {*range(0, len(curves), step), len(curves) - 1}
    for i, ((name, points), color) in enumerate(zip(curves, colors, strict=True)):
        look = {"marker": "o", "markersize": 4} if len(points) <= 30 else {}
        if i in named:
            look["label"] = canvas.label(name)
        ax.plot(points.keys(), points.values(), color=color, linewidth=canvas.WIDTH, **look)
    ax.set(xlabel="k", ylabel="overlap", xlim=(0, None), ylim=(0, None))
    ax.autoscale_view()
    canvas.title(ax, "Top-k mask and top-k eigenspace")
    canvas.grid(ax)
    canvas.legend(ax)
    return ax


def overlap_by_step(records: Iterable[Record], ax: Any = None, *, label: str = "overlap") -> Axes:
    """Draw the overlap of magnitude mask and eigenspace against the training step.

    The chance level is dashed, with a band of three standard deviations.

    Args:
        records: Those of a `CurvatureMonitor` that hold "overlap", and, for the band,
            "overlap_chance" and "overlap_chance_std"; or the monitor.
        ax: The axes to draw into; those of a new figure by default.
        label: The curve's name in the legend.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If `records` are not records, or `ax` is not an Axes.
        ValueError: If there is no record, or none holds the overlap.

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701.

    Example:
        >>> ax = hesscurv.plots.overlap_by_step(monitor)
        >>> ax.figure.savefig("overlap_by_step.png")
    """
    found = series(records, "overlap")
    ax = canvas.axes_or_new(ax)
    chance = [
        (r["step"], number(r["overlap_chance"]), number(r.get("overlap_chance_std", 0.0)))
        for r in as_records(records)
        if not failed(r) and "overlap_chance" in r
    ]
    if chance:
        steps, mean, std = (list(column) for column in zip(*chance, strict=True))
        if len(chance) == 1:  # a single point would be invisible
            steps, mean, std = [steps[0] - 0.5, steps[0] + 0.5], mean * 2, std * 2
        canvas.band(ax, steps, mean, std, "chance ± 3 std")
    curve(ax, found.steps, found.values, canvas.BLUE, label)
    ax.set(ylabel="overlap", ylim=(0, None))
    canvas.mark_events(ax, as_records(records))
    canvas.title(ax, "Largest weights and top eigenspace")
    canvas.step_axis(ax, found.steps)
    canvas.grid(ax)
    canvas.legend_above(ax)
    return ax


def _by_k(values: Any) -> dict[int, float]:
    """Return a record's curve by rank; keys read from JSON are strings."""
    return dict(sorted((int(k), number(value)) for k, value in values.items()))


def _draw_chance(ax: Any, ks: range, dim: int) -> None:
    levels = [chance_overlap(k, dim) for k in ks]
    canvas.band(ax, ks, [c.mean for c in levels], [c.std for c in levels], _CHANCE)


def _colors(count: int, again: int) -> list[Any]:
    """Return colours by time for several curves, or the next unused one for a single curve."""
    if count == 1:
        one_by_one = (canvas.BLUE, canvas.RED, canvas.GREEN, canvas.PURPLE, canvas.ORANGE)
        return [one_by_one[max(0, again - 1) % len(one_by_one)]]
    scale = canvas.matplotlib_parts().colormaps[canvas.SEQUENTIAL]
    # The ends of the scale are invisible on a dark or a white ground.
    return [scale(0.2 + 0.7 * i / (count - 1)) for i in range(count)]
