"""What a pruning did: by stage and by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

# Of the weights in a table, which with its head has ten lines.
_MOST_LINES = 7


@dataclass(frozen=True)
class StageReport:
    """One step of pruning.

    Args:
        sparsity: Fraction of the weights that is pruned after it.
        loss: Mean loss of the calibration set after it.
        predicted_change: Of the loss, by the step's quadratic model; NaN where there is none.
        true_change: Of the calibration loss.
        mu: The weight of the structured rest that the calibration loss chose; None where the
            weights that are left were not changed.
        gradients: Per-sample gradients taken so far.
        seconds: Since the start.
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
    """What happened to one weight.

    Args:
        name: Its dotted name in the dense model.
        numel: Its entries.
        kept: Those that are left.
        sparsity: The fraction that is not.
        predicted_change: Of the loss, had this weight alone changed, by the last quadratic model.
        true_change: The same, of the calibration loss; NaN where it was not measured.
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

    Args:
        method: The ranking that gave the mask: the one asked for, or "magnitude" where plain
            magnitude pruning has less calibration loss.
        sparsity: Fraction of all weights in question that is pruned.
        kept: The entries that are left, of `numel`.
        numel: All of them.
        dense_loss: Mean loss of the calibration set before.
        loss: After.
        magnitude_loss: Of plain magnitude pruning to the same sparsity, by the same rules.
        recalibrated_loss: After the batch statistics were measured anew; None where not asked for.
        gradients: Per-sample gradients taken.
        planned_bytes: The memory that rows and factors were planned to take.
        seconds: In all.
        stages: By step.
        layers: By weight.
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
        """Return the report with the loss after the batch statistics were measured anew."""
        return replace(self, recalibrated_loss=loss)

    def plot(self, axes: Any = None) -> Any:
        """Draw the calibration loss against sparsity, beside the density of each layer.

        Args:
            axes: Two matplotlib axes; made where not given.

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
        """Return the first line of the table, for a prompt."""
        return (
            f"PruningReport({self._summary()}, loss {self.dense_loss:.4g} -> {self.loss:.4g}, "
            f"{len(self.stages)} steps, {len(self.layers)} weights)"
        )

    def __str__(self) -> str:
        """Return the report as a table; of many weights the largest are shown."""
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
                else f"; batch statistics measured anew: {recalibrated:.4g})"
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

    def _summary(self) -> str:
        return (
            f"{self.method}: {self.kept:,} of {self.numel:,} weights kept, sparsity "
            f"{self.sparsity:.4f}, {self.gradients:,} gradients, {self.seconds:.0f} s"
        )


def _printable(name: str) -> str:
    """A module's name may have any character but a dot, line breaks too."""
    return name if name.isprintable() else repr(name)[1:-1]
