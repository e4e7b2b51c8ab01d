"""Options of `PreconditionedOptimizer`, and checks of what its curvature is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hesscurv.interface.options import Options
from hesscurv.interface.ranges import (
    check_choice,
    check_count,
    check_generator,
    check_names,
    check_positive,
)
from hesscurv.linalg.precision import require_float64
from hesscurv.objective.data.batches import Batches
from hesscurv.objective.tasks import as_loss
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.kinds import OPERATORS

_OPERATOR_OPTIONS = ("memory_budget", "way", "compute_dtype", "precision", "check")


@dataclass(frozen=True, repr=False)
class PreconditionerOptions(Options):
    """Options of `PreconditionedOptimizer`.

    Args:
        drift_tol: If given, the eigenspace is also refreshed once
            ``||H v - U Lambda U^T v|| > drift_tol ||U Lambda U^T v||`` for a random v of it;
            default None: never.
        check_every: Steps between such checks, of one product each; default 20.
        mode: What is preconditioned, "gradient" or "update"; default None: "gradient" for
            `torch.optim.SGD`, "update" for all other bases. Always "gradient" for bases that keep
            weights of their own (ASGD, Lookahead, schedule-free), which an update of the model's
            alone would not reach; always "update" for sharpness-aware ones (SAM).
        rate_fraction: With ``learning_rate="auto"``, the rate as a share of the largest stable one;
            default 0.5. With momentum take less, or no automatic rate: the rate that is stable on a
            quadratic is far from safe on a net then.
        max_growth: With ``learning_rate="auto"``, the largest multiple of the group's own rate;
            default 100.
        tol: Of the eigenpairs, residual relative to eigenvalue; default 0.1: the directions need
            not be exact, and each digit costs products.
        process_group: The ranks that share the curvature, see `HessianOperator`; default None: all.
        operator_options: More arguments of the operator, a dict: `memory_budget`, `way`,
            `compute_dtype`, `precision`, `check`; default none.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> hesscurv.optim.PreconditionerOptions(tol=0.01, operator_options={"way": "retained"})
        PreconditionerOptions(tol=0.01, operator_options={'way': 'retained'})
    """

    drift_tol: float | None = None
    check_every: int = 20
    mode: str | None = None
    rate_fraction: float = 0.5
    max_growth: float = 100.0
    tol: float = 0.1
    process_group: Any = None
    operator_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check the options."""
        check_positive("drift_tol", self.drift_tol, optional=True)
        check_count("check_every", self.check_every)
        check_choice("mode", self.mode, (None, "gradient", "update"))
        check_positive("rate_fraction", self.rate_fraction)
        check_positive("max_growth", self.max_growth)
        check_positive("tol", self.tol)
        check_names(
            "operator_options",
            self.operator_options,
            _OPERATOR_OPTIONS,
            "other arguments of the operator are PreconditionedOptimizer's own",
        )
        # A copy, which the caller's later changes do not reach.
        object.__setattr__(self, "operator_options", dict(self.operator_options))


def check_arguments(given: Mapping[str, Any], options: PreconditionerOptions) -> None:
    """Refuse arguments of `PreconditionedOptimizer` that would fail at a step, before any work.

    Args:
        given: All of them by name.
        options: Its options.

    Raises:
        TypeError: If one has another type.
        ValueError: If a value is out of range.
    """
    check_model(given["model"], given["task"])
    check_count("rank", given["rank"])
    check_positive("damping", given["damping"], zero=True, optional=True)
    check_count("refresh_every", given["refresh_every"], optional=True)
    check_positive("max_fraction", given["max_fraction"], below=1.0)
    check_choice("curvature", given["curvature"], tuple(OPERATORS))
    check_count("samples", given["samples"], optional=True)
    check_choice("learning_rate", given["learning_rate"], (None, "auto"))
    check_generator(given["generator"])
    kind = OPERATORS[given["curvature"]]
    check_curvature(given["task"], given["batches"], kind, options.operator_options)


def check_model(model: Any, task: Any) -> None:
    """Refuse anything but a model and a task.

    Raises:
        TypeError: If one is of a wrong type.
        ValueError: If the model is on a device without float64.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if not callable(task):
        raise TypeError(
            f"expected task to be hesscurv.supervised(loss) or a callable (model, batch) -> loss, "
            f"got {type(task).__name__}"
        )
    for device in {p.device for p in model.parameters()}:
        require_float64(device)


def check_curvature(
    task: Any, batches: Any, kind: type[CurvatureOperator], options: Mapping[str, Any]
) -> None:
    """Refuse a task, batches and options that no curvature operator can be built from.

    Args:
        task: The task.
        batches: Its batches, or None.
        kind: The operator.
        options: More of its arguments.

    Raises:
        TypeError: If the task lacks parts that the operator needs, or batches cannot be iterated
            over again.
        ValueError: If a task needs batches and there are none, they look like a single one, or
            there is no such way of computing.
    """
    as_loss(task, batches is not None)
    Batches(batches, torch.device("cpu"), None, 0)
    if kind.curvature.needs_parts and not (hasattr(task, "outputs") and hasattr(task, "loss")):
        raise TypeError(
            f"expected a task with outputs and loss for the {kind.__name__}, got a "
            f"{type(task).__name__}; use hesscurv.supervised(loss) or a subclass of hesscurv.Task, "
            "or curvature='hessian', which takes any callable"
        )
    check_choice(
        "way", options.get("way", "auto"), ("auto", "reference", *kind.ways, *kind.extra_ways)
    )
