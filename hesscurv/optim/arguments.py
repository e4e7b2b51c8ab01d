"""Checks of an optimizer's arguments, before any work."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer


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


def check_count(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse what is no int from 1 on, or None where that is allowed.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is below 1.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"expected {name} to be an int{' or None' if optional else ''}, got {value!r}"
        )
    if value < 1:
        raise ValueError(f"expected {name} >= 1, got {value}")


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
