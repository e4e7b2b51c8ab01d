"""Curves over the training step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hesscurv.plots import canvas
from hesscurv.plots.records import Record, as_records, failed, number, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Axis labels of quantities whose key is not descriptive.
_NAMES = {
    "sharpness": "sharpness, largest eigenvalue",
    "sharpness_ratio": "sharpness × learning rate / 2",
    "gradient_share": "share of the gradient in the top space",
    "overlap_z_score": "standard deviations above chance",
    "space_overlap": "overlap of the space with its last",
    "mask_iou": "IoU of the mask with its last",
    "fraction": "fraction of the training time",
    "num_matvecs": "products with the Hessian",
}


def name_of(quantity: str) -> str:
    """Return the axis label of a quantity."""
    return _NAMES.get(quantity, quantity.replace("_", " "))


def by_step(records: Iterable[Record], quantity: str, ax: Any = None, *, label: str = "") -> Axes:
    """Draw a scalar quantity of the records against the training step.

    A trace is drawn with a band of two standard errors. The line breaks, with a mark, at failed
    measurements; steps at which the quantity was not due are skipped.

    Args:
        records: Those of a `CurvatureMonitor`: dicts with a "step"; or the monitor.
        quantity: The key of a number: "loss", "sharpness", "trace", "mask_iou", ...
        ax: The axes to draw into; those of a new figure by default.
        label: The curve's name in a legend; none by default.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If `records` are not records, or `ax` is not an Axes.
        ValueError: If there is no record, or none holds the quantity.

    Example:
        >>> ax = hesscurv.plots.by_step(monitor, "loss")
        >>> ax.get_xlabel()
        'training step'
    """
    found = series(records, quantity)
    ax = canvas.axes_or_new(ax)
    curve(ax, found.steps, found.values, canvas.BLUE, label)
    error = f"{quantity}_standard_error"
    errors = {r["step"]: number(r[error]) for r in as_records(records) if error in r}
    if errors:
        spread = [2 * errors.get(step, math.nan) for step in found.steps]
        pairs = list(zip(found.values, spread, strict=True))
        low, high = [v - s for v, s in pairs], [v + s for v, s in pairs]
        ax.fill_between(
            *(found.steps, low, high),
            *(None, 0, None),
            color=canvas.BLUE,
            alpha=0.2,
            linewidth=0,
            label="± 2 standard errors",
        )
    canvas.mark_events(ax, as_records(records))
    name = canvas.plain(name_of(quantity))
    ax.set_ylabel(name)
    canvas.title(ax, f"{name[:1].upper()}{name[1:]} while training")
    canvas.step_axis(ax, found.steps)
    canvas.grid(ax)
    canvas.legend(ax)
    return ax


def sharpness(records: Iterable[Record], ax: Any = None) -> Axes:
    r"""Draw the sharpness against the training step, together with 2 / learning rate.

    Full-batch gradient descent drives the sharpness :math:`\lambda_{max}` up to the edge of
    stability :math:`2 / \eta`, where it hovers. Momentum moves the edge: if the records hold a
    different `stable_rate`, that of the optimizer is drawn too.

    Args:
        records: Those of a `CurvatureMonitor` that hold "sharpness", and, for the edge,
            "learning_rate" and "stable_rate"; or the monitor.
        ax: The axes to draw into; those of a new figure by default.

    Returns:
        The axes, with a logarithmic scale if the values span more than a factor of 30.

    Raises:
        ImportError: If matplotlib is missing: ``pip install 'hesscurv[plots]'``.
        TypeError: If `records` are not records, or `ax` is not an Axes.
        ValueError: If there is no record, or none holds the sharpness.

    References:
        Cohen et al., Gradient descent on neural networks typically occurs at the edge of
        stability, ICLR 2021.

    Example:
        >>> ax = hesscurv.plots.sharpness(monitor)
        >>> ax.figure.savefig("sharpness.png")
    """
    found = series(records, "sharpness")
    ax = canvas.axes_or_new(ax)
    steps, edges, own = [], [], []
    for record in as_records(records):
        rate = math.nan if failed(record) else number(record.get("learning_rate"))
        if rate > 0:
            steps.append(record["step"])
            edges.append(2 / rate)
            critical = number(record.get("stable_rate")) * number(record.get("sharpness")) / rate
            own.append(critical)
    curve(ax, found.steps, found.values, canvas.BLUE, "sharpness, largest eigenvalue")
    # A rate holds until the next recorded one. A single point is drawn as a dash.
    look = {"linewidth": canvas.WIDTH, "drawstyle": "steps-post"}
    look |= {"marker": "_", "markersize": 12} if len(steps) == 1 else {}
    if edges:
        ax.plot(steps, edges, "--", color=canvas.RED, label="2 / learning rate", **look)
    if any(abs(mine - edge) > 1e-6 * edge for mine, edge in zip(own, edges, strict=True)):
        ax.plot(steps, own, ":", color=canvas.PURPLE, label="the optimizer's edge", **look)
    canvas.mark_events(ax, as_records(records))
    heights = [v for v in (*found.values, *edges, *own) if math.isfinite(v)]
    low, high = min(heights), max(heights)
    if low > 0 and high > 30 * low:
        ax.set_yscale("log")
        ax.set_ylim(low / 1.5, 1.2 * high)
    elif low > 0:
        ax.set_ylim(0, 1.02 * high)
    ax.set_ylabel("curvature")
    canvas.title(ax, "Sharpness and the edge of stability")
    canvas.step_axis(ax, found.steps)
    canvas.grid(ax)
    canvas.legend_above(ax)
    return ax


def curve(ax: Any, steps: list[int], values: list[float], color: str, label: str) -> None:
    """Draw a line with a marker at each measurement, larger if there are few."""
    size = 5 if len(steps) <= 40 else 2.5 if len(steps) <= 150 else 0
    shown = sum(map(math.isfinite, values))
    options = {"label": canvas.label(label)} if label else {}
    ax.plot(
        *(steps, values, "o-" if size or shown == 1 else "-"),
        color=color,
        linewidth=canvas.WIDTH,
        markersize=size or 5,
        **options,
    )
