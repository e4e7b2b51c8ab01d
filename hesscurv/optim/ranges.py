"""Ranges of hyperparameters: counts, positive numbers, choices, generators."""

from __future__ import annotations

import math
from typing import Any

import torch


def check_count(name: str, value: Any, *, least: int = 1, optional: bool = False) -> None:
    """Refuse anything but an int from `least` on, or None where that is allowed.

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
    """Refuse anything but a finite number in (0, below), or with `zero` in [0, below).

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
    """Refuse anything but one of the choices.

    Raises:
        ValueError: If it is none.
    """
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {list(choices)}, got {value!r}")


def check_generator(generator: Any) -> None:
    """Refuse anything but a torch.Generator or None.

    Raises:
        TypeError: If it is something else.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"expected generator to be a torch.Generator or None, got {generator!r}; "
            "for a seed use torch.Generator().manual_seed(seed)"
        )
