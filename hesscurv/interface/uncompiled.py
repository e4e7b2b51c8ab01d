"""Run a function as plain Python where the caller is compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Decorate a function so that torch.compile leaves it, and all that it calls, to Python.

    Products need derivatives of any order and change global state for their time (random state,
    compilation stance), neither of which can be traced: within a compiled training step there is a
    graph break at the function. With ``fullgraph=True`` torch raises an error that names it.

    Unlike `torch.compiler.disable` itself it does not import the compiler, which takes seconds:
    without it nothing is compiled.
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
