"""Errors for arguments that have moved, which say where they are now."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def moved(**places: str) -> Callable[[Function], Function]:
    """Let a call with an argument of an earlier version raise a TypeError with its new place.

    Args:
        places: For each name, what to pass instead.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in places.keys() & kwargs.keys():
                raise TypeError(f"{name}= has moved: pass {places[name]}")
            return function(*args, **kwargs)

        wrapped: Any = call
        found: Function = wrapped
        return found

    return decorate
