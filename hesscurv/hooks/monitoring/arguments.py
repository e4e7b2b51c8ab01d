"""Argument checks of `CurvatureMonitor`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from hesscurv.linalg.precision import require_float64
from hesscurv.objective.data.batches import check_source
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.kinds import OPERATORS
from hesscurv.optim.ranges import check_count


def check_model(model: Any, task: Any, curvature: Any, batches: Any) -> None:
    """Check that curvature can be measured.

    Raises:
        TypeError: If the model is not a module, the task is not callable or lacks the parts that
            the curvature needs, or the batches cannot be read.
        ValueError: If the curvature is unknown, the batches are a single one, or the model is on a
            device without float64.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not callable(task):
        raise TypeError(
            f"expected a task (model, batch) -> scalar mean loss, got {type(task).__name__}; for a "
            "loss module use hesscurv.supervised(loss)"
        )
    if curvature not in OPERATORS:
        raise ValueError(f"expected curvature among {list(OPERATORS)}, got {curvature!r}")
    parts = hasattr(task, "outputs") and hasattr(task, "loss")
    if curvature != "hessian" and (batches is None or not parts):
        raise TypeError(
            f"curvature={curvature!r} needs batches and a task with the parts outputs and loss, as "
            "hesscurv.supervised(loss) has; curvature='hessian' takes any callable"
        )
    check_source(batches)
    for device in {p.device for p in model.parameters()}:
        require_float64(device)


def check_numbers(**counts: Any) -> None:
    """Require integers of at least 1, for `history` 0, for `trace_matvecs` 2.

    None is allowed, except for `k` and `trace_matvecs`.

    Raises:
        TypeError: If one is not an int.
        ValueError: If it is too small.
    """
    for name, value in counts.items():
        least = {"history": 0, "trace_matvecs": 2}.get(name, 1)
        check_count(name, value, least=least, optional=name not in ("k", "trace_matvecs"))


def check_share(name: str, value: Any, *, open_above: bool = False) -> None:
    """Require a number in (0, 1], or in (0, 1) if `open_above`.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    if not 0 < value <= 1 or (open_above and value == 1):
        raise ValueError(f"expected 0 < {name} {'<' if open_above else '<='} 1, got {value!r}")


def check_mask_size(value: Any) -> None:
    """Require a number of weights or a fraction of them.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    if isinstance(value, float):
        check_share("mask_size", value)
    else:
        check_numbers(mask_size=value)


def check_tol(tol: Any) -> None:
    """Require a positive finite tolerance.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not finite and positive.
    """
    if isinstance(tol, bool) or not isinstance(tol, (int, float)):
        raise TypeError(f"expected tol to be a number, got {tol!r}")
    if not 0 < tol < math.inf:
        raise ValueError(f"expected a finite tol > 0, got {tol!r}")


def check_callables(**functions: Callable[..., Any]) -> None:
    """Require callables.

    Raises:
        TypeError: If one is not callable.
    """
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(
                f"expected {name} to be callable, got {function!r}; for an interval use "
                f"hesscurv.hooks.every({function!r})"
            )


def check_optimizer(optimizer: Any) -> None:
    """Require an optimizer with parameter groups.

    Raises:
        TypeError: If it has none.
    """
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"expected an optimizer with param_groups, got {type(optimizer).__name__}; leave it "
            "out to record no learning rate"
        )


def check_options(options: dict[str, Any]) -> None:
    """Require options that an operator accepts.

    Raises:
        TypeError: If there is one.
    """
    own = {"self", "model", "task", "batches", "params"}
    known = set(inspect.signature(CurvatureOperator.__init__).parameters) - own
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(
            f"CurvatureMonitor has no argument {unknown}; the operator's are {sorted(known)}"
        )
