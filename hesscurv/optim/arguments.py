"""Checks of an optimizer's arguments, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer

from hesscurv.operators.batches import Batches
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.tasks import as_loss

_OPERATOR_OPTIONS = ("memory_budget", "way", "compute_dtype", "check")


def check_base(base: Any, model: Any, task: Any) -> None:
    """Refuse what is no optimizer, model or task.

    Raises:
        TypeError: If one is of a wrong type.
        ValueError: If the base evaluates its closure by itself.
    """
    if isinstance(base, type) and issubclass(base, Optimizer):
        raise TypeError(
            f"expected an optimizer, got the class {base.__name__}; pass an instance: "
            f"{base.__name__}(model.parameters(), ...)"
        )
    if not isinstance(base, Optimizer):
        raise TypeError(f"expected base to be a torch.optim.Optimizer, got {type(base).__name__}")
    if isinstance(base, LBFGS):
        raise ValueError(
            "expected a base that takes one gradient a step, got LBFGS, which evaluates its "
            "closure many times along directions of its own; use hesscurv.optim.NewtonCG"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if not callable(task):
        raise TypeError(
            f"expected task to be hesscurv.supervised(loss) or a callable (model, batch) -> loss, "
            f"got {type(task).__name__}"
        )


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
    if kind.needs_parts and not (hasattr(task, "outputs") and hasattr(task, "loss")):
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
    check_choice("way", options.get("way", "auto"), ("auto", *kind.ways, *kind.extra_ways))


def check_automatic_rate(base: Optimizer, mode: str) -> None:
    """Refuse bases whose stable learning rate is not that of gradient descent.

    Raises:
        ValueError: If the base is adaptive, or has no learning rate.
    """
    adaptive = type(base).__module__.startswith("torch.optim") and not isinstance(base, SGD)
    if mode != "gradient" or adaptive:
        raise ValueError(
            f"expected a base like SGD for learning_rate='auto', got {type(base).__name__} in mode "
            f"{mode!r}: the stable rate of an adaptive one depends on its own state; leave "
            "learning_rate out"
        )
    if not any("lr" in group for group in base.param_groups):
        raise ValueError(
            "expected a base with 'lr' in its groups for learning_rate='auto', got "
            f"{sorted(base.param_groups[0])}; leave learning_rate out"
        )


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
