"""Checks of an optimizer's arguments, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hesscurv.linalg.precision import require_float64
from hesscurv.objective.data.batches import Batches
from hesscurv.objective.tasks import as_loss
from hesscurv.operators.curvature_operator import CurvatureOperator

_OPERATOR_OPTIONS = ("memory_budget", "way", "compute_dtype", "precision", "check")


def check_model(model: Any, task: Any) -> None:
    """Refuse what is no model or task.

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


def check_measured(
    task: Any, batches: Any, kind: type[CurvatureOperator], options: Mapping[str, Any]
) -> None:
    """Refuse what curvature cannot be measured with, which else would show at the first refresh.

    Args:
        task: The task.
        batches: Its batches, or None.
        kind: The operator.
        options: More of its arguments.

    Raises:
        TypeError: If the task lacks parts that the operator needs, batches are no iterable that can
            be iterated again, or an option is unknown.
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
    unknown = [name for name in options if name not in _OPERATOR_OPTIONS]
    if unknown:
        raise TypeError(
            f"expected operator_options among {list(_OPERATOR_OPTIONS)}, got {unknown}; other "
            "arguments of the operator are PreconditionedOptimizer's own"
        )
    check_choice(
        "way", options.get("way", "auto"), ("auto", "reference", *kind.ways, *kind.extra_ways)
    )


def check_preconditioning(given: Mapping[str, Any], curvatures: tuple[str, ...]) -> None:
    """Refuse numbers and choices of `PreconditionedOptimizer` that are out of range.

    Args:
        given: Its arguments by name.
        curvatures: The choices of `curvature`.

    Raises:
        TypeError: If one has another type.
        ValueError: If a value is out of range.
    """
    check_count("rank", given["rank"])
    check_positive("damping", given["damping"], zero=True, optional=True)
    check_count("refresh_every", given["refresh_every"], optional=True)
    check_positive("max_fraction", given["max_fraction"], below=1.0)
    check_positive("drift_tol", given["drift_tol"], optional=True)
    check_count("check_every", given["check_every"])
    check_choice("mode", given["mode"], (None, "gradient", "update"))
    check_choice("curvature", given["curvature"], curvatures)
    check_count("samples", given["samples"], optional=True)
    check_choice("learning_rate", given["learning_rate"], (None, "auto"))
    check_positive("rate_fraction", given["rate_fraction"])
    check_positive("max_growth", given["max_growth"])
    check_positive("tol", given["tol"])
    check_count("seed", given["seed"], least=0)


def check_count(name: str, value: Any, *, least: int = 1, optional: bool = False) -> None:
    """Refuse what is no int from `least` on, or None where that is allowed.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is below.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"expected {name} to be an int{' or None' if optional else ''}, got {value!r}"
        )
    if value < least:
        raise ValueError(f"expected {name} >= {least}, got {value}")


def check_positive(
    name: str, value: Any, *, zero: bool = False, below: float = math.inf, optional: bool = False
) -> None:
    """Refuse what is no finite number in (0, below), with `zero` in [0, below).

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0)) and value < below):
        bound = "" if below == math.inf else f" and < {below:g}"
        raise ValueError(f"expected a finite {name} {'>=' if zero else '>'} 0{bound}, got {value}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: If it is none.
    """
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {list(choices)}, got {value!r}")
