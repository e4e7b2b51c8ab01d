"""Options of `prune_model`: schedule, compensation, curvature, calibration, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from hesscurv.interface.options import Options
from hesscurv.interface.ranges import check_callable, check_count, check_flag
from hesscurv.objective.data.batches import check_source
from hesscurv.pruning.curvature.quadratic_model import Measuring
from hesscurv.pruning.run.pruning_report import StageReport
from hesscurv.pruning.run.sparsity_schedules import Schedule, check_schedule


@dataclass(frozen=True, repr=False)
class PruningOptions(Options):
    """Options of `prune_model`.

    Args:
        schedule: "cubic" (default), "linear", "geometric", a function, or the sparsities at the end
            of all ``stages * steps_per_stage`` steps; see `sparsity_schedules.sparsities`. With
            several target sparsities it applies to the highest, and the others scale with it.
        compensate: Whether the kept weights move; default None: only for ``method="obs"``.
        measuring: Options of the curvature; default None: `Measuring()`, with rows="fisher" if
            there are more outputs than "ggn" supports. A rank and a largest block at their defaults
            are lowered to fit in the free memory.
        calibration: Re-iterable batches of the calibration set; default None: those that curvature
            is measured on. Compared by identity.
        max_calibration: Maximal number of calibration samples; default 2000.
        layer_losses: Whether to report the true change of the loss due to each layer, at the cost
            of one pass over the calibration set each; default True.
        recalibrate_batch_norm: Whether to recalibrate batch-norm statistics at the end, on the
            curvature's batches; the resulting loss is reported separately. Default False.
        on_step: Called after each step with its `StageReport` and the weights by dense name;
            default None.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> hesscurv.pruning.PruningOptions(max_calibration=500, schedule="linear")
        PruningOptions(schedule='linear', max_calibration=500)
    """

    schedule: Schedule = "cubic"
    compensate: bool | None = None
    measuring: Measuring | None = None
    calibration: Iterable[Any] | None = field(default=None, hash=False)
    max_calibration: int = 2000
    layer_losses: bool = True
    recalibrate_batch_norm: bool = False
    on_step: Callable[[StageReport, dict[str, Tensor]], None] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        object.__setattr__(self, "schedule", check_schedule(self.schedule))
        check_flag("compensate", self.compensate, optional=True)
        if self.measuring is not None and not isinstance(self.measuring, Measuring):
            raise TypeError(
                f"expected measuring to be a Measuring or None, got {self.measuring!r}; pass "
                "measuring=Measuring(...)"
            )
        check_source(self.calibration)
        check_count("max_calibration", self.max_calibration)
        check_flag("layer_losses", self.layer_losses)
        check_flag("recalibrate_batch_norm", self.recalibrate_batch_norm)
        check_callable("on_step", self.on_step, optional=True)

    def __eq__(self, other: object) -> bool:
        """Compare by fields; batches, whose tensors have no single truth value, by identity."""
        if not isinstance(other, PruningOptions):
            return NotImplemented
        names = [f.name for f in fields(self) if f.name != "calibration"]
        return self.calibration is other.calibration and all(
            getattr(self, name) == getattr(other, name) for name in names
        )
