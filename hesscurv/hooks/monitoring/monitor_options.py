"""Options of `CurvatureMonitor`: effort, mask, comparisons, clock, arguments of the operator."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hesscurv.interface.options import Options
from hesscurv.interface.ranges import check_callable, check_count, check_names, check_positive
from hesscurv.operators.curvature_operator import CurvatureOperator

_OWN = {"self", "model", "task", "batches", "params", "training"}
OPERATOR_OPTIONS = tuple(
    name for name in inspect.signature(CurvatureOperator.__init__).parameters if name not in _OWN
)
"""The operator's arguments that are not the monitor's own."""


@dataclass(frozen=True, repr=False)
class MonitorOptions(Options):
    """Options of `CurvatureMonitor`.

    Args:
        max_matvecs: Maximal number of matvecs of a refresh; default None: 3 k. The first solve may
            take four times as many. Pairs that have not converged by then are recorded as they are.
        mask_size: Entries of the mask of largest weights, or as a float their fraction, in (0, 1];
            default None: k entries.
        trace_matvecs: Matvecs for the trace, at least 2; default 16.
        history: Number of recent spaces and masks to compare with, in addition to the first and the
            last; default None: 16 with the quantities "full", otherwise 0.
        clock: Returns seconds; default `time.perf_counter`.
        operator_options: More arguments of the operator, a dict: compute_dtype, way, memory_budget,
            check, process_group, precision; default none.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> hesscurv.hooks.MonitorOptions(history=4)
        MonitorOptions(history=4)
    """

    max_matvecs: int | None = None
    mask_size: int | float | None = None
    trace_matvecs: int = 16
    history: int | None = None
    clock: Callable[[], float] = time.perf_counter
    operator_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check the options."""
        check_count("max_matvecs", self.max_matvecs, optional=True)
        if isinstance(self.mask_size, float):
            check_positive("mask_size", self.mask_size, most=1.0)
        else:
            check_count("mask_size", self.mask_size, optional=True)
        check_count("trace_matvecs", self.trace_matvecs, least=2)
        check_count("history", self.history, least=0, optional=True)
        check_callable("clock", self.clock)
        check_names(
            "operator_options",
            self.operator_options,
            OPERATOR_OPTIONS,
            "other arguments of the operator are CurvatureMonitor's own",
        )
        # A copy, which the caller's later changes do not reach.
        object.__setattr__(self, "operator_options", dict(self.operator_options))
