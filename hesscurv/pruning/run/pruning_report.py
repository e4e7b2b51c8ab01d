"""Report of a pruning run, by stage and by layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesscurv.interface.notebook_html import Points, draw_points, notebook_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Weights shown in the table, which has ten lines with its header.
_MOST_LINES = 7


@dataclass(frozen=True)
class StageReport:
    """One step of pruning.

    Args:
        sparsity: Fraction of pruned weights after the step.
        loss: Mean loss on the calibration set after the step.
        predicted_change: Change of the loss by the quadratic model; NaN without one.
        true_change: Change of the calibration loss.
        mu: Weight of the structured rest, chosen by the calibration loss; None if the kept weights
            were not changed.
        gradients: Per-sample gradients so far.
        seconds: Time since the start.

    Example:
        >>> net = copy.deepcopy(model)
        >>> report = hesscurv.pruning.prune_model(net, task, batches, sparsity=0.5, stages=1)
        >>> report.stages[-1].sparsity
        0.5
    """

    sparsity: float
    loss: float
    predicted_change: float
    true_change: float
    mu: float | None
    gradients: int
    seconds: float


@dataclass(frozen=True)
class LayerReport:
    """Result for one weight.

    Args:
        name: Its dotted name in the dense model.
        numel: Number of entries.
        kept: Number of kept entries.
        sparsity: Fraction of pruned entries.
        predicted_change: Change of the loss due to this weight only, by the last quadratic model.
        true_change: The same for the calibration loss; NaN if not measured.

    Example:
        >>> net = copy.deepcopy(model)
        >>> report = hesscurv.pruning.prune_model(net, task, batches, sparsity=0.5, stages=1)
        >>> [layer.name for layer in report.layers]
        ['0.weight', '2.weight']
    """

    name: str
    numel: int
    kept: int
    sparsity: float
    predicted_change: float
    true_change: float


@dataclass(frozen=True, repr=False)
class PruningReport:
    """The result of `prune_model`; ``print(report)`` shows it as a table of at most ten lines.

    ``report.html("pruning.html")`` writes it as a page with figures.

    Args:
        method: The ranking of the final mask: the requested one, or "magnitude" if plain magnitude
            pruning has a lower calibration loss.
        sparsity: Fraction of the selected weights that is pruned.
        kept: Number of kept entries, of `numel`.
        numel: Number of entries of the selected weights.
        dense_loss: Mean loss on the calibration set before pruning.
        loss: The same after pruning.
        magnitude_loss: The same for magnitude pruning to this sparsity, under the same constraints.
        recalibrated_loss: The loss with recalibrated batch-norm statistics; None if not requested.
        gradients: Number of per-sample gradients.
        planned_bytes: Planned memory of rows and factors.
        seconds: Total time.
        stages: Reports by step.
        layers: Reports by weight.

    Example:
        >>> net = copy.deepcopy(model)
        >>> report = hesscurv.pruning.prune_model(net, task, batches, sparsity=0.5, stages=1)
        >>> report.kept, report.numel, len(report.stages)
        (9, 18, 1)
    """

    method: str
    sparsity: float
    kept: int
    numel: int
    dense_loss: float
    loss: float
    magnitude_loss: float
    recalibrated_loss: float | None
    gradients: int
    planned_bytes: int
    seconds: float
    stages: list[StageReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return asdict(self)

    def with_recalibrated(self, loss: float) -> PruningReport:
        """Return the report with the loss after recalibration of batch-norm statistics."""
        return replace(self, recalibrated_loss=loss)

    def html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "Pruning",
        accuracy: Sequence[float] | None = None,
    ) -> Path:
        """Write the report as a self-contained page: what was cut where, and what it cost.

        Args:
            path: The file, such as "pruning.html"; its folder must exist.
            title: The page's heading.
            accuracy: Accuracy before pruning and after each of the `stages`, numbers in [0, 1],
                such as those that `on_step` measures; None (default) if there are none.

        Returns:
            The path; see `plots.pruning_report.write_pruning_report`.

        Raises:
            TypeError: If `accuracy` holds something other than numbers.
            ValueError: If `accuracy` has another length, or a number outside [0, 1].
            OSError: If the page cannot be written; a file that was there before is untouched.
        """
        from hesscurv.plots.pruning_report import write_pruning_report

        return write_pruning_report(self, path, title=title, accuracy=accuracy)

    def plot(self, axes: Any = None) -> Figure:
        """Draw the calibration loss against sparsity, and the density of each layer.

        Args:
            axes: Two matplotlib axes; created by default.

        Returns:
            The figure.

        Raises:
            ImportError: If matplotlib is missing: ``pip install 'hesscurv[examples]'``.
        """
        try:
            from matplotlib import pyplot as plt
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install 'hesscurv[examples]'") from error
        if axes is None:
            _, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
        left, right = axes
        left.plot(
            [s.sparsity for s in self.stages], [s.loss for s in self.stages], "o-", label="pruned"
        )
        left.axhline(self.dense_loss, color="0.6", linestyle="--", label="dense")
        left.plot([self.sparsity], [self.magnitude_loss], "x", color="C3", label="magnitude")
        left.set(xlabel="sparsity", ylabel="calibration loss", yscale="log")
        left.legend()
        right.bar(range(len(self.layers)), [1 - layer.sparsity for layer in self.layers])
        right.set(xlabel="layer", ylabel="part that is kept", ylim=(0, 1))
        return left.figure

    def __repr__(self) -> str:
        """Return the first line of the table."""
        return (
            f"PruningReport({self._summary()}, loss {self.dense_loss:.4g} -> {self.loss:.4g}, "
            f"{len(self.stages)} steps, {len(self.layers)} weights)"
        )

    def __str__(self) -> str:
        """Return the report as a table of the largest weights."""
        shown = self.layers
        if len(shown) > _MOST_LINES:
            largest = sorted(shown, key=lambda layer: -layer.numel)[: _MOST_LINES - 1]
            shown = [layer for layer in shown if any(layer is one for one in largest)]
        names = [_printable(layer.name) for layer in shown]
        width = max([28, *(len(name) + 1 for name in names)])
        recalibrated = self.recalibrated_loss
        lines = [
            self._summary(),
            f"calibration loss {self.dense_loss:.4g} -> {self.loss:.4g} "
            f"(magnitude pruning: {self.magnitude_loss:.4g}"
            + (
                ")"
                if recalibrated is None
                else f"; batch statistics recalibrated: {recalibrated:.4g})"
            ),
            f"{'weight':<{width}}{'kept':>10}{'of':>12}{'sparsity':>10}{'predicted':>11}{'true':>11}",
        ]
        lines += [
            f"{name:<{width}}{layer.kept:>10,}{layer.numel:>12,}{layer.sparsity:>10.3f}"
            f"{layer.predicted_change:>11.3g}{layer.true_change:>11.3g}"
            for name, layer in zip(names, shown, strict=True)
        ]
        if more := len(self.layers) - len(shown):
            lines.append(f"... and {more} smaller ones; all are in `layers`, and in to_dict()")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show the summary, the loss by sparsity, and the largest weights."""
        facts = {
            "kept": f"{self.kept:,} of {self.numel:,}",
            "sparsity": self.sparsity,
            "loss before": self.dense_loss,
            "loss": self.loss,
            "loss by magnitude": self.magnitude_loss,
            "recalibrated": self.recalibrated_loss,
            "gradients": self.gradients,
            "seconds": self.seconds,
        }
        sparsities = [0.0, *(stage.sparsity for stage in self.stages)]
        losses = [self.dense_loss, *(stage.loss for stage in self.stages)]
        line = Points("loss", sparsities, losses, joined=True)
        return notebook_html(
            f"Pruned by {self.method}",
            {name: value for name, value in facts.items() if value is not None},
            drawing=draw_points([line], x="sparsity", y="calibration loss"),
            columns=("weight", "kept", "of", "sparsity", "predicted", "true"),
            rows=[
                (w.name, w.kept, w.numel, w.sparsity, w.predicted_change, w.true_change)
                for w in sorted(self.layers, key=lambda layer: -layer.numel)
            ],
        )

    def _summary(self) -> str:
        return (
            f"{self.method}: {self.kept:,} of {self.numel:,} weights kept, sparsity "
            f"{self.sparsity:.4f}, {self.gradients:,} gradients, {self.seconds:.0f} s"
        )


def _printable(name: str) -> str:
    """Escape a module's name, which may have any character but a dot, even line breaks."""
    return name if name.isprintable() else repr(name)[1:-1]
