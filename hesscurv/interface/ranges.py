"""Ranges of arguments: counts, positive numbers, choices, flags, generators, named options."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch


def check_count(
    name: str, value: Any, *, least: int = 1, optional: bool = False, remedy: str = ""
) -> None:
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
        raise ValueError(f"expected {name} >= {least}, got {value}{remedy and '; ' + remedy}")


def check_positive(
    name: str,
    value: Any,
    *,
    zero: bool = False,
    below: float = math.inf,
    most: float = math.inf,
    optional: bool = False,
) -> None:
    """Refuse anything but a finite number in (0, below) and (0, most], with `zero` from 0 on.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    above = value > 0 or (zero and value == 0)
    if not (math.isfinite(value) and above and value < below and value <= most):
        bound = "" if below == math.inf else f" and < {below:g}"
        bound += "" if most == math.inf else f" and <= {most:g}"
        raise ValueError(f"expected a finite {name} {'>=' if zero else '>'} 0{bound}, got {value}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse anything but one of the choices.

    Raises:
        ValueError: If it is none.
    """
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {list(choices)}, got {value!r}")


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse anything but a bool, or None where that is allowed.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(value, bool) and not (value is None and optional):
        raise TypeError(
            f"expected {name} to be True{', False or None' if optional else ' or False'}, "
            f"got {value!r}"
        )


def check_callable(name: str, value: Any, *, optional: bool = False, remedy: str = "") -> None:
    """Refuse anything but a callable, or None where that is allowed.

    Raises:
        TypeError: If it is something else.
    """
    if not callable(value) and not (value is None and optional):
        raise TypeError(
            f"expected {name} to be callable{' or None' if optional else ''}, got {value!r}"
            f"{remedy and '; ' + remedy}"
        )


def check_names(name: str, given: Any, known: Collection[str], remedy: str) -> None:
    """Refuse anything but a dict whose keys are all known.

    Raises:
        TypeError: If it is no dict, or has another key.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"expected {name} to be a dict, got {given!r}; {remedy}")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise TypeError(f"expected {name} among {list(known)}, got {unknown}; {remedy}")


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
