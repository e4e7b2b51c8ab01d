"""Sentences on what a pruning has done; each only where the report supports it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from hesscurv.plots.hover import brief
from hesscurv.plots.report_tables import format_percent

_MOST_SENTENCES = 4


class PrunedStage(Protocol):
    """One step of pruning, as `StageReport`."""

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights after the step."""

    @property
    def loss(self) -> float:
        """Calibration loss after the step."""

    @property
    def predicted_change(self) -> float:
        """Change of the loss by the quadratic model."""

    @property
    def true_change(self) -> float:
        """Change of the calibration loss."""

    @property
    def seconds(self) -> float:
        """Time since the start."""


class PrunedLayer(Protocol):
    """Result for one weight, as `LayerReport`."""

    @property
    def name(self) -> str:
        """Dotted name."""

    @property
    def numel(self) -> int:
        """Number of entries."""

    @property
    def kept(self) -> int:
        """Number of kept entries."""

    @property
    def sparsity(self) -> float:
        """Fraction of pruned entries."""

    @property
    def predicted_change(self) -> float:
        """Change of the loss due to this weight, by the quadratic model."""

    @property
    def true_change(self) -> float:
        """The same for the calibration loss."""


class Pruned(Protocol):
    """The result of a pruning, as `PruningReport`."""

    @property
    def method(self) -> str:
        """Ranking of the final mask."""

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights."""

    @property
    def kept(self) -> int:
        """Number of kept entries."""

    @property
    def numel(self) -> int:
        """Number of entries."""

    @property
    def dense_loss(self) -> float:
        """Calibration loss before pruning."""

    @property
    def loss(self) -> float:
        """Calibration loss after pruning."""

    @property
    def magnitude_loss(self) -> float:
        """Calibration loss of magnitude pruning."""

    @property
    def recalibrated_loss(self) -> float | None:
        """Loss with recalibrated batch-norm statistics."""

    @property
    def gradients(self) -> int:
        """Number of per-sample gradients."""

    @property
    def seconds(self) -> float:
        """Total time."""

    @property
    def stages(self) -> Sequence[PrunedStage]:
        """Steps."""

    @property
    def layers(self) -> Sequence[PrunedLayer]:
        """Weights."""


def pruning_findings(report: Pruned, accuracy: Sequence[float] | None = None) -> list[str]:
    """Return the findings, the most important ones first.

    Args:
        report: The result of `prune_model`.
        accuracy: Accuracy before pruning and after each stage; None if not measured.
    """
    if is_replaced(report):  # the accuracies are those of the stages, which were given up
        accuracy = None
    rules = (_loss(report), _accuracy(accuracy), _magnitude(report), _model(report), _where(report))
    return [sentence for sentence in rules if sentence is not None][:_MOST_SENTENCES]


def is_replaced(report: Pruned) -> bool:
    """Return whether plain magnitude pruning had a lower loss than the stages and was taken."""
    return (
        report.method == "magnitude"
        and bool(report.stages)
        and report.stages[-1].loss > report.loss
    )


def predicted_and_true(report: Pruned) -> tuple[float, float] | None:
    """Return the sums of predicted and true changes over all stages; None if unknown."""
    changes = [(stage.predicted_change, stage.true_change) for stage in report.stages]
    if not changes or not all(map(math.isfinite, (v for pair in changes for v in pair))):
        return None
    return sum(p for p, _ in changes), sum(t for _, t in changes)


def _loss(report: Pruned) -> str | None:
    done = f"{format_percent(report.sparsity)} of {report.numel:,} weights are pruned"
    before, after = report.dense_loss, report.loss
    if not math.isfinite(after):
        return f"{done}; the calibration loss is not finite."
    if not math.isfinite(before):
        return f"{done}."
    if math.isclose(before, after, rel_tol=1e-3):
        return f"{done}; the calibration loss stays at {brief(after)}."
    verb = "rises" if after > before else "falls"
    return f"{done}; the calibration loss {verb} from {brief(before)} to {brief(after)}."


def _accuracy(accuracy: Sequence[float] | None) -> str | None:
    if accuracy is None or not all(map(math.isfinite, (accuracy[0], accuracy[-1]))):
        return None
    before, after = (format_percent(value) for value in (accuracy[0], accuracy[-1]))
    return (
        f"Accuracy goes from {before} to {after}."
        if before != after
        else (f"Accuracy stays at {after}.")
    )


def _magnitude(report: Pruned) -> str | None:
    if is_replaced(report):
        return (
            f"The stages ended at a loss of {brief(report.stages[-1].loss)}: plain magnitude "
            "pruning, which has a lower one, was taken instead."
        )
    if report.method == "magnitude":
        return "The mask is that of the largest magnitudes." if report.stages else None
    before, ours, theirs = report.dense_loss, report.loss, report.magnitude_loss
    if not all(map(math.isfinite, (before, ours, theirs))):
        return None
    text = f"Magnitude pruning to the same sparsity ends at a loss of {brief(theirs)}"
    # A ratio of increases says something only if both are increases.
    if theirs > ours > before and theirs - before > 1.05 * (ours - before):
        text += f", {(theirs - before) / (ours - before):.3g} times the increase"
    return f"{text}."


def _model(report: Pruned) -> str | None:
    sums = predicted_and_true(report)
    if sums is None:
        return None
    predicted, true = sums
    text = (
        f"The quadratic models predicted a change of the loss of {predicted:+.3g} over all "
        f"{len(report.stages):,} stages; it was {true:+.3g}"
    )
    if len(report.stages) > 1:
        far = [abs(stage.predicted_change - stage.true_change) for stage in report.stages]
        worst = max(range(len(far)), key=far.__getitem__)
        if far[worst] > 0.1 * abs(true):
            text += f", with the largest difference at stage {worst + 1}"
    return f"{text}." if len(report.stages) > 1 else text.replace("all 1 stages", "one stage") + "."


def _where(report: Pruned) -> str | None:
    layers = [layer for layer in report.layers if layer.numel]
    if len(layers) < 2:
        return None
    most = max(layers, key=lambda layer: layer.sparsity)
    least = min(layers, key=lambda layer: layer.sparsity)
    if most.sparsity - least.sparsity < 0.01:
        return f"All weights are cut alike, by about {format_percent(most.sparsity)}."
    return (
        f"{most.name} is cut most, by {format_percent(most.sparsity)}, {least.name} least, by "
        f"{format_percent(least.sparsity)}."
    )
