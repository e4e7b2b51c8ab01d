"""Errors for arguments that have moved, which say where they are now."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from hesscurv.interface.options import Options, as_typed, call_text

Function = TypeVar("Function", bound=Callable[..., Any])


def moved(**places: str) -> Callable[[Function], Function]:
    """Let a call with an argument of an earlier version raise a TypeError with its new place.

    Args:
        places: For each name, what to pass instead; "{value}" stands for what was passed.
    """

    def complain(given: Mapping[str, Any]) -> None:
        for name in places.keys() & given.keys():
            place = places[name].replace("{value}", as_typed(given[name]))
            raise TypeError(f"{name}= has moved: pass {place}")

    return _checked_first(complain)


def seed_moved(function: Function) -> Function:
    """Let a call with ``seed=`` raise a TypeError that asks for a generator."""
    return moved(seed="generator=torch.Generator().manual_seed({value})")(function)


def moved_to_options(
    kind: type[Options], within: Mapping[str, Collection[str]] | None = None
) -> Callable[[Function], Function]:
    """Let a call with an argument that its options have now raise a TypeError that says so.

    Those are the fields of `kind` that the function has no parameter for. The error has the line
    to type.

    Args:
        kind: The class of the argument ``options``.
        within: For fields that are dicts, the names within that have moved there.
    """
    inner = {name: holder for holder, names in (within or {}).items() for name in names}

    def decorate(function: Function) -> Function:
        own = _named(function)
        names = {f.name for f in dataclasses.fields(kind)} | inner.keys()  # type: ignore[arg-type]
        called = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

        def complain(given: Mapping[str, Any]) -> None:
            found = {n: value for n, value in given.items() if n in names and n not in own}
            if not found:
                return
            told: dict[str, Any] = {}
            for name, value in found.items():
                if name in inner:
                    told.setdefault(inner[name], {})[name] = value
                else:
                    told[name] = value
            *first, last = (f"{name}=" for name in found)
            listed = f"{', '.join(first)} and {last}" if first else last
            raise TypeError(
                f"{called}() takes {listed} in its options now: "
                f"{called}(..., options={call_text(kind.__name__, told)})"
            )

        return _checked_first(complain)(function)

    return decorate


def forwarded(callee: Callable[..., Any], *own: str) -> Callable[[Function], Function]:
    """Let a call with a keyword that is passed on to another function, which lacks it, raise now.

    Without it the function's ``**arguments`` take any name, and the error comes when they are used.

    Args:
        callee: What takes the keywords.
        own: Those of its parameters that the function itself fills in.
    """

    def decorate(function: Function) -> Function:
        known = (_named(callee) - {*own}) | _named(function)

        def complain(given: Mapping[str, Any]) -> None:
            for name in given.keys() - known:
                raise TypeError(
                    f"{function.__qualname__}() got an unexpected keyword argument {name!r}"
                )

        return _checked_first(complain)(function)

    return decorate


def _named(function: Callable[..., Any]) -> set[str]:
    """Return the parameters that can be passed by keyword."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}


def _checked_first(complain: Callable[[Mapping[str, Any]], None]) -> Callable[[Function], Function]:
    """Look at the keywords of a call before it; signature and name stay the function's own."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            complain(kwargs)
            return function(*args, **kwargs)

        wrapped: Any = call
        found: Function = wrapped
        return found

    return decorate
