"""Exclude functions from torch.compile."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Decorate a function so that torch.compile runs it, and everything it calls, as plain Python.

    Products need derivatives of any order and temporarily change global state (random state,
    compilation stance), neither of which can be traced: a compiled training step has a graph break
    at the function. With ``fullgraph=True`` torch raises an error that names it.

    Unlike `torch.compiler.disable` it does not import the compiler, which takes seconds: nothing is
    compiled until something else has imported it.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return cast(Function, call)
