"""Detection of embedding options that make gradients differ from those of the loss."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hesscurv.interface.user_warning import warn_user
from hesscurv.objective.objective import Objective
from hesscurv.operators.checks.derivative_check import (
    Slope,
    WrongDerivativeError,
    check_derivatives,
)
from hesscurv.operators.checks.failing_operation import describe_place, following

_OPTIONS = ("padding_idx", "scale_grad_by_freq", "max_norm")


def changed_gradients(objective: Objective, batch: Any) -> str:
    """Say which embeddings change their gradients on a batch, how, and what to do; "" if none does.

    Cost: one forward pass.
    """
    if not any(map(_may_change, objective.model.modules())):
        return ""
    calls = _Calls()

    def look() -> None:
        with torch.no_grad(), calls, following(objective.model, calls):
            objective.loss(objective.parameters(), batch)

    try:
        objective.run(look)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it is only to explain what is wrong already
        return ""
    return "; ".join(dict.fromkeys(calls.found))


def cause_of_wrong_gradients(objective: Objective, batch: Any) -> str:
    """Say what makes gradients none of the loss: embeddings, or else a function's backward."""
    return changed_gradients(objective, batch) or (
        "some function's backward is not its derivative (a custom autograd.Function, a gradient "
        "that is changed on the way); replace it"
    )


def check_gradients(objective: Objective, batch: Any, slope: Slope) -> None:
    """Check derivatives as `check_derivatives` does; warnings and errors name embeddings.

    Raises:
        WrongDerivativeError: As `check_derivatives`.
    """
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_derivatives(objective, batch, slope)
    except WrongDerivativeError as error:
        cause = changed_gradients(objective, batch)
        if not cause:
            raise
        raise WrongDerivativeError(f"{error}; or it is this: {cause}") from error
    finally:
        for one in caught:
            if issubclass(one.category, DeprecationWarning):  # of the model's, seen before
                continue
            head, _, rest = str(one.message).partition(": ")
            if "from differences" in head and (cause := changed_gradients(objective, batch)):
                rest = f"{cause}. If that is not all, {rest}"
            warn_user(f"{head}: {rest}" if rest else head, one.category)


class _Calls(TorchFunctionMode):
    """Notes the calls of embeddings, and the module of each."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[tuple[str, str]] = []
        self.found: list[str] = []

    def note(self, value: Any) -> None:
        """Do nothing: only calls count."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.embedding, F.embedding_bag):
            given = inspect.signature(func).bind(*args, **kwargs)
            given.apply_defaults()
            place = describe_place(*(self.modules[-1] if self.modules else ("", "")))
            with torch._C.DisableTorchFunction():
                self.found += _changes(given.arguments, func is F.embedding, place)
        return func(*args, **kwargs)


def _changes(given: dict[str, Any], by_row: bool, place: str) -> Iterator[str]:
    weight, tokens, row = given["weight"].detach(), given["input"], given["padding_idx"]
    # A bag leaves its padding out, so that no gradient is the right one.
    if by_row and row is not None and bool((tokens == row % len(weight)).any()):
        yield (
            f"padding_idx={row} {place} keeps the gradient of a row at zero that the loss depends "
            "on, so that the row counts as a constant, as it does in training; where it is to "
            "count, set padding_idx to None"
        )
    if given["scale_grad_by_freq"]:
        yield (
            f"scale_grad_by_freq=True {place} divides gradients by how often a token occurs, so "
            "that they are none of the loss; set it to False, which leaves the loss as it is"
        )
    if given["max_norm"] is not None and _is_longer(weight[tokens], given):
        yield (
            f"max_norm={given['max_norm']} {place} rescales rows in each forward pass by factors "
            "that count as constants in their gradient; rescale the rows once, and set max_norm "
            "to None"
        )


def _is_longer(rows: Tensor, given: dict[str, Any]) -> bool:
    norms = torch.linalg.vector_norm(rows, given["norm_type"], dim=-1)
    return bool((norms > given["max_norm"]).any())


def _may_change(module: Any) -> bool:
    # Also one of another kind, which calls the functions with attributes of these names.
    values = (getattr(module, name, None) for name in _OPTIONS)
    return any(isinstance(v, (int, float)) and v is not False for v in values)
