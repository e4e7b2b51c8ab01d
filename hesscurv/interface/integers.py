"""Counts as plain integers, whatever kind of integer they come as."""

from __future__ import annotations

import operator
from typing import Any


def as_int(name: str, value: Any) -> int:
    """Return an integer, NumPy's or a tensor's of one entry say, as a plain int.

    Args:
        name: The argument's name, for the message.
        value: What was passed.

    Raises:
        TypeError: If it is no integer. Truth values are none.
    """
    # NumPy's truth values, and torch's, are not instances of bool.
    if not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"expected {name} to be an int, got {type(value).__name__}: {value!r}")
