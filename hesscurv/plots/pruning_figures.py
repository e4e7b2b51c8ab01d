"""Figures of a pruning report, and their captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hesscurv.plots import canvas
from hesscurv.plots.by_parameter import height_of, name_rows, width_of
from hesscurv.plots.hover import Value, brief, show_values
from hesscurv.plots.pruning_findings import Pruned, is_replaced
from hesscurv.plots.report_figures import Drawing, encode_figure
from hesscurv.plots.report_tables import format_percent

_SIZE = (4.6, 3.3)  # inches, legible on a phone
_BARS = 13  # columns of text as wide as the bars
# A logarithmic scale if the values span more than this factor.
_DECADES = 30


def draw_pruning(report: Pruned, accuracy: Sequence[float] | None) -> Iterator[Drawing]:
    """Draw what a pruning report holds, one figure at a time.

    Args:
        report: The result of `prune_model`.
        accuracy: Accuracy before pruning and after each stage; None if not measured.

    Raises:
        ImportError: If matplotlib is missing.
    """
    for draw, caption in _choose(report, accuracy):
        yield encode_figure(draw().figure, caption)


def _choose(
    report: Pruned, accuracy: Sequence[float] | None
) -> Iterator[tuple[Callable[[], Any], str]]:
    if report.layers:
        yield (
            lambda: kept_by_layer(report),
            "The part of each weight that is kept, and the part that is cut; the dashed line is "
            "the part that is kept of all weights together.",
        )
    if any(math.isfinite(stage.loss) for stage in report.stages):
        yield (
            lambda: loss_by_sparsity(report),
            "Mean loss on the calibration set after each stage, beside that of the dense model and "
            "that of magnitude pruning.",
        )
    if accuracy is not None:
        sparsities = _sparsities(report)
        yield (
            lambda: accuracy_by_sparsity(sparsities, accuracy),
            "Accuracy after each stage, beside that of the dense model.",
        )
    if any(math.isfinite(stage.predicted_change) for stage in report.stages):
        yield (
            lambda: changes_by_stage(report),
            "Change of the calibration loss in each stage, and what the quadratic model predicted.",
        )
    if any(math.isfinite(layer.true_change) for layer in report.layers):
        yield (
            lambda: changes_by_layer(report),
            "Change of the calibration loss if only this weight is pruned, and what the last "
            "quadratic model predicts.",
        )


def loss_by_sparsity(report: Pruned, ax: Any = None) -> Any:
    """Draw the calibration loss against the sparsity after each stage."""
    ax = canvas.axes_or_new(ax, _SIZE)
    x = [stage.sparsity for stage in report.stages]
    losses = [stage.loss for stage in report.stages]
    _curve(ax, x, losses, "pruned")
    heights = [value for value in losses if math.isfinite(value)]
    if math.isfinite(report.dense_loss):
        ax.axhline(report.dense_loss, linestyle="--", color=canvas.GREY, label="dense")
        heights.append(report.dense_loss)
    taken = is_replaced(report)
    if math.isfinite(report.magnitude_loss) and (taken or report.method != "magnitude"):
        look = {"marker": "v", "markersize": 8, "linestyle": "none", "color": canvas.RED}
        label = "magnitude, taken" if taken else "magnitude"
        ax.plot([report.sparsity], [report.magnitude_loss], label=label, **look)
        heights.append(report.magnitude_loss)
    if min(heights) > 0 and max(heights) > _DECADES * min(heights):
        ax.set_yscale("log")
    ax.set_ylabel("calibration loss")
    canvas.title(ax, "Loss by sparsity")
    return _finish(ax, "sparsity")


def accuracy_by_sparsity(
    sparsities: Sequence[float], accuracy: Sequence[float], ax: Any = None
) -> Any:
    """Draw the accuracy against the sparsity, with that of the dense model first."""
    ax = canvas.axes_or_new(ax, _SIZE)
    _curve(ax, sparsities, accuracy, "pruned")
    if math.isfinite(accuracy[0]):
        ax.axhline(accuracy[0], linestyle="--", color=canvas.GREY, label="dense")
    ax.set_ylabel("accuracy")
    canvas.title(ax, "Accuracy by sparsity")
    return _finish(ax, "sparsity")


def changes_by_stage(report: Pruned, ax: Any = None) -> Any:
    """Draw predicted and true change of the loss by stage."""
    ax = canvas.axes_or_new(ax, _SIZE)
    numbers = list(range(1, len(report.stages) + 1))
    _curve(ax, numbers, [stage.true_change for stage in report.stages], "true")
    predicted = [stage.predicted_change for stage in report.stages]
    look = {"marker": "v", "linestyle": "--", "color": canvas.RED, "linewidth": canvas.WIDTH}
    ax.plot(numbers, predicted, label="predicted", **look)
    ax.axhline(0, color=canvas.GREY, linewidth=0.8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_ylabel("change of the calibration loss")
    canvas.title(ax, "Predicted and true change by stage")
    return _finish(ax, "stage")


def kept_by_layer(report: Pruned, ax: Any = None) -> Any:
    """Draw the kept and the cut part of each weight, in the model's order from the top."""
    layers = report.layers
    ax = canvas.axes_or_new(ax, _size_of(report))
    places = range(len(layers))
    kept = [layer.kept / layer.numel if layer.numel else 0.0 for layer in layers]
    ax.barh(places, kept, height=0.75, color=canvas.BLUE, label="kept")
    rest = [1 - part for part in kept]
    look = {"facecolor": "none", "hatch": "////", "edgecolor": canvas.ORANGE, "linewidth": 0}
    ax.barh(places, rest, left=kept, height=0.75, label="cut", **look)
    ax.axvline(1 - report.sparsity, linestyle="--", color=canvas.PURPLE, label="kept of all")
    ax.set(xlim=(0, 1), ylim=(len(layers) - 0.5, -0.5), xlabel="part of the weight")
    name_rows(ax, [layer.name for layer in layers])
    show_values(
        ax,
        (
            Value(
                0.5,
                i,
                f"{layer.name}: {layer.kept:,} of {layer.numel:,} kept, "
                f"{format_percent(layer.sparsity)} cut",
                1.0,
                1.0,
            )
            for i, layer in enumerate(layers)
        ),
    )
    _legend_above(ax)
    canvas.title(ax, "Kept and cut by weight")
    return ax


def changes_by_layer(report: Pruned, ax: Any = None) -> Any:
    """Draw predicted and true change of the loss due to each weight."""
    layers = report.layers
    ax = canvas.axes_or_new(ax, _size_of(report))
    places = range(len(layers))
    true = [layer.true_change for layer in layers]
    predicted = [layer.predicted_change for layer in layers]
    ax.barh(places, true, height=0.75, color=canvas.BLUE, label="true")
    if any(map(math.isfinite, predicted)):
        ax.plot(predicted, places, "v", color=canvas.RED, label="predicted")
    ax.axvline(0, color=canvas.GREY, linewidth=0.8)
    ax.set(ylim=(len(layers) - 0.5, -0.5), xlabel="change of the calibration loss")
    name_rows(ax, [layer.name for layer in layers])
    left, right = ax.get_xlim()
    show_values(
        ax,
        (
            Value(
                (left + right) / 2,
                i,
                f"{layer.name}: true {brief(layer.true_change)}, predicted "
                f"{brief(layer.predicted_change)}",
                right - left,
                1.0,
            )
            for i, layer in enumerate(layers)
        ),
    )
    _legend_above(ax)
    canvas.title(ax, "Predicted and true change by weight")
    return ax


def _size_of(report: Pruned) -> tuple[float, float]:
    return width_of([layer.name for layer in report.layers], _BARS), height_of(len(report.layers))


def _legend_above(ax: Any) -> None:
    """Draw the legend outside of the axes, as bars leave no room in them."""
    handles, labels = ax.get_legend_handles_labels()
    look = {"frameon": False, "fontsize": canvas.SMALL, "handlelength": 1.6}
    ax.figure.legend(handles, labels, loc="outside upper right", ncols=3, **look)


def _sparsities(report: Pruned) -> list[float]:
    """Return the sparsity before the first and after each stage."""
    return [0.0, *(stage.sparsity for stage in report.stages)]


def _curve(ax: Any, x: Sequence[float], y: Sequence[float], label: str) -> None:
    ax.plot(x, y, "o-", color=canvas.BLUE, linewidth=canvas.WIDTH, label=label)


def _finish(ax: Any, xlabel: str) -> Any:
    ax.set_xlabel(xlabel)
    canvas.grid(ax)
    canvas.legend(ax)
    return ax
