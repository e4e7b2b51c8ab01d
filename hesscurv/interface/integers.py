"""Conversion of integer arguments to plain ints."""

from __future__ import annotations

import operator
from typing import Any


def as_int(name: str, value: Any) -> int:
    """Convert an integer, such as NumPy's or a one-entry tensor, to a plain int.

    Args:
        name: The argument's name, for the message.
        value: The argument.

    Raises:
        TypeError: If it is not an integer; booleans are refused.
    """
    # Booleans of NumPy and torch are not instances of bool, but operator.index accepts them.
    if not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"expected {name} to be an int, got {type(value).__name__}: {value!r}")
