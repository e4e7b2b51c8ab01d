"""Frozen option objects: what belongs together in a long signature, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import torch

from hesscurv.interface.descriptions import describe_object

_LONGEST = 80  # characters of a value in a line to type


class Options:
    """Base of option objects, frozen dataclasses: the `repr` names what differs from the defaults.

    Subclasses check their fields in ``__post_init__``.
    """

    def __repr__(self) -> str:
        """Name the fields that differ from their defaults."""
        return describe_object(self, **_changed(self))


Kind = TypeVar("Kind", bound=Options)


def as_options(kind: type[Kind], given: Any) -> Kind:
    """Return the given options, or the defaults for None.

    Args:
        kind: Their class.
        given: An object of this class, or None.

    Raises:
        TypeError: If it is something else, such as a dict; the message has the line to type.
    """
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    name = kind.__name__
    what = f"the class {given.__name__}" if isinstance(given, type) else a_type(given)
    told = given if isinstance(given, dict) and all(isinstance(key, str) for key in given) else {}
    raise TypeError(
        f"expected options to be a {name}, got {what}; pass options={call_text(name, told)}"
    )


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """Return a call as one would type it, ``...`` for values that cannot be typed in short."""
    return f"{name}({', '.join(f'{key}={as_typed(value)}' for key, value in arguments.items())})"


def as_typed(value: Any) -> str:
    """Return a plain value as one would type it; a function by its name, else ``...``."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        parts = [f"{key!r}: {as_typed(part)}" for key, part in value.items()]
        text = f"{{{', '.join(parts)}}}"
    elif type(value) in (list, tuple):
        marks = "[]" if isinstance(value, list) else "()"
        comma = "," if marks == "()" and len(value) == 1 else ""
        text = f"{marks[0]}{', '.join(map(as_typed, value))}{comma}{marks[1]}"
    elif isinstance(value, Options):
        text = call_text(type(value).__name__, _changed(value))
    elif isinstance(value, float) and not math.isfinite(value):
        text = f"float('{value}')"
    elif value is None or type(value) in (bool, int, float, str, torch.dtype):
        text = repr(value)
    else:
        text = getattr(value, "__name__", "...")
        text = text if text.isidentifier() else "..."
    return text if len(text) <= _LONGEST else "..."


def a_type(value: Any) -> str:
    """Return the type of a value with its article."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def _changed(options: Options) -> dict[str, Any]:
    """Return the fields that differ from their defaults."""
    changed = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        default, value = field.default, getattr(options, field.name)
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        # Tensors and arrays compare by entries: where None is the default, all else differs.
        if value is not default and (default is None or value != default):
            changed[field.name] = value
    return changed
