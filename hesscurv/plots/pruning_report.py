"""HTML report of a pruning: findings, cards, figures and tables by weight and by stage."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from hesscurv.plots.pruning_figures import draw_pruning
from hesscurv.plots.pruning_findings import (
    Pruned,
    is_replaced,
    predicted_and_true,
    pruning_findings,
)
from hesscurv.plots.records import number
from hesscurv.plots.report_figures import figures_html
from hesscurv.plots.report_page import (
    Card,
    assemble_page,
    check_file_path,
    encode_page,
    write_page,
)
from hesscurv.plots.report_tables import (
    Row,
    details_html,
    download_html,
    format_number,
    format_percent,
    table_html,
)

_LAYER_COLUMNS = ("weight", "kept", "of", "sparsity", "predicted change", "true change")
_STAGE_COLUMNS = ("stage", "sparsity", "loss", "predicted change", "true change", "seconds")


def write_pruning_report(
    report: Pruned,
    path: str | os.PathLike[str],
    *,
    title: str = "Pruning",
    accuracy: Sequence[float] | None = None,
) -> Path:
    """Write a self-contained HTML page on a pruning: what was cut where, and what it cost.

    The page is of the same make as that of `CurvatureMonitor.report`: no other file, network or
    script; the reader's colour scheme; fits a phone; values show where the pointer rests.

    Args:
        report: The `PruningReport` that `prune_model` returns.
        path: The file to write; its folder must exist.
        title: The page's heading.
        accuracy: Accuracy before pruning and after each of `stages`, numbers in [0, 1], such as
            those that `on_step` measures; None (default) if there are none.

    Returns:
        The path. Without matplotlib the page has no figures but says how to get them.

    Raises:
        TypeError: If `report` is no report, or `accuracy` holds something other than numbers.
        ValueError: If `accuracy` has another length, or a number outside [0, 1].
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder.
        OSError: If the disk is full; a file that was there before is untouched.

    Cost:
        A few tenths of a second and some tens of kilobytes per figure.
    """
    if not all(hasattr(report, part) for part in ("stages", "layers", "dense_loss")):
        raise TypeError(
            f"expected the report of hesscurv.pruning.prune_model, got {type(report).__name__}"
        )
    if accuracy is not None:
        accuracy = _checked(accuracy, len(report.stages))
    path = check_file_path(path)
    page = assemble_page(
        str(title),
        about=_about(report),
        findings=pruning_findings(report, accuracy),
        cards=_cards(report, accuracy),
        sections=[
            ("Figures", figures_html(draw_pruning(report, accuracy))),
            ("Weights", _layers(report)),
            ("Stages", _stages(report, accuracy)),
        ],
    )
    write_page(encode_page(page), path)
    return path


def _checked(accuracy: Sequence[float], stages: int) -> list[float]:
    values = [number(value) for value in accuracy]
    for given, value in zip(accuracy, values, strict=True):
        if math.isnan(value):
            raise TypeError(f"expected accuracy to be numbers in [0, 1], got {given!r}")
        if not 0 <= value <= 1:
            raise ValueError(f"expected accuracy in [0, 1], got {value!r}; divide percents by 100")
    if len(values) != stages + 1:
        raise ValueError(
            f"expected {stages + 1} numbers of accuracy, before pruning and after each of the "
            f"{stages} stages, got {len(values)}"
        )
    return values


def _about(report: Pruned) -> str:
    weights, stages = len(report.layers), len(report.stages)
    return (
        f"{weights:,} weight{'s' if weights != 1 else ''} pruned by {report.method} in {stages:,} "
        f"stage{'s' if stages != 1 else ''}. Written by hesscurv."
    )


def _cards(report: Pruned, accuracy: Sequence[float] | None) -> list[Card]:
    """Return the numbers, each beside the one that it compares with."""
    dense = f"dense {format_number(report.dense_loss)}"
    changes = predicted_and_true(report)
    cards = [
        Card("sparsity", format_percent(report.sparsity, 4), _kept(report)),
        Card("calibration loss", format_number(report.loss), dense),
        accuracy is not None
        and not is_replaced(report)
        and Card("accuracy", format_percent(accuracy[-1]), f"dense {format_percent(accuracy[0])}"),
        report.method != "magnitude"
        and Card(
            "loss of magnitude pruning",
            format_number(report.magnitude_loss),
            f"here {format_number(report.loss)}",
        ),
        report.recalibrated_loss is not None
        and Card(
            "loss with recalibrated batch norms",
            format_number(report.recalibrated_loss),
            f"before {format_number(report.loss)}",
        ),
        changes
        and Card("predicted change of the loss", f"{changes[0]:+.3g}", f"true {changes[1]:+.3g}"),
        Card("gradients", f"{report.gradients:,}", _per_stage(report.gradients, report)),
        Card("seconds", format_number(report.seconds), _per_stage(report.seconds, report)),
    ]
    return [card for card in cards if card]


def _kept(report: Pruned) -> str:
    return f"{report.kept:,} of {report.numel:,} kept"


def _per_stage(value: float, report: Pruned) -> str:
    count = len(report.stages)
    return f"{format_number(value / count)} per stage" if count > 1 else ""


def _layers(report: Pruned) -> str:
    if not report.layers:
        return ""
    rows = [
        Row(
            layer.name,
            [
                f"{layer.kept:,}",
                f"{layer.numel:,}",
                format_percent(layer.sparsity),
                format_number(layer.predicted_change),
                format_number(layer.true_change),
            ],
        )
        for layer in report.layers
    ]
    values = (
        [x.name, x.kept, x.numel, x.sparsity, x.predicted_change, x.true_change]
        for x in report.layers
    )
    table = table_html(_LAYER_COLUMNS, rows, names=True)
    return f"{table}\n{download_html(_LAYER_COLUMNS, values, 'weights.csv')}"


def _stages(report: Pruned, accuracy: Sequence[float] | None) -> str:
    if not report.stages:
        return ""
    columns = [*_STAGE_COLUMNS, *(["accuracy"] if accuracy else [])]
    values = [
        [i, x.sparsity, x.loss, x.predicted_change, x.true_change, x.seconds]
        + ([accuracy[i]] if accuracy else [])
        for i, x in enumerate(report.stages, start=1)
    ]
    rows = [Row(str(stage), [format_number(value) for value in rest]) for stage, *rest in values]
    table = details_html(f"All {len(rows)} stages", table_html(columns, rows))
    return f"{table}\n{download_html(columns, values, 'stages.csv')}"
