"""Argument checks of `PreconditionedOptimizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hesscurv.linalg.precision import require_float64
from hesscurv.objective.data.batches import Batches
from hesscurv.objective.tasks import as_loss
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.kinds import OPERATORS
from hesscurv.optim.ranges import check_choice, check_count, check_generator, check_positive

_OPTIONS = ("memory_budget", "way", "compute_dtype", "precision", "check")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `PreconditionedOptimizer` that would fail at a step, before any work.

    Args:
        given: All of them by name.

    Raises:
        TypeError: If one has another type.
        ValueError: If a value is out of range.
    """
    check_model(given["model"], given["task"])
    check_options(given)
    kind, options = OPERATORS[given["curvature"]], given["operator_options"] or {}
    check_curvature(given["task"], given["batches"], kind, options)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse numbers and choices of `PreconditionedOptimizer` that are out of range.

    Args:
        options: Its arguments by name.

    Raises:
        TypeError: If one has another type.
        ValueError: If a value is out of range.
    """
    check_count("rank", options["rank"])
    check_positive("damping", options["damping"], zero=True, optional=True)
    check_count("refresh_every", options["refresh_every"], optional=True)
    check_positive("max_fraction", options["max_fraction"], below=1.0)
    check_positive("drift_tol", options["drift_tol"], optional=True)
    check_count("check_every", options["check_every"])
    check_choice("mode", options["mode"], (None, "gradient", "update"))
    check_choice("curvature", options["curvature"], tuple(OPERATORS))
    check_count("samples", options["samples"], optional=True)
    check_choice("learning_rate", options["learning_rate"], (None, "auto"))
    check_positive("rate_fraction", options["rate_fraction"])
    check_positive("max_growth", options["max_growth"])
    check_positive("tol", options["tol"])
    check_generator(options["generator"])


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
        TypeError: If the task lacks parts that the operator needs, batches cannot be
            iterated over again, or an option is unknown.
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
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise TypeError(
            f"expected operator_options among {list(_OPTIONS)}, got {unknown}; other "
            "arguments of the operator are PreconditionedOptimizer's own"
        )
    check_choice(
        "way", options.get("way", "auto"), ("auto", "reference", *kind.ways, *kind.extra_ways)
    )
