"""Say which operation of a closure lacks a derivative, and what minimises the loss without it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hesscurv.operators.checks.failing_operation import (
    FailingOperation,
    find_failing_operation,
    find_unaffected,
)
from hesscurv.operators.checks.missing_derivatives import MissingDerivativeError
from hesscurv.operators.checks.wrong_dtypes import first_sentence

# What torch says of a derivative that it lacks; other errors are the closure's own.
_OF_DERIVATIVES = re.compile(
    r"derivative|differentia|not implemented|autograd formula|no autograd", re.I
)
_MOST_NAMES = 6


def may_lack_derivative(error: Exception) -> bool:
    """Whether an error is of a missing derivative, as far as its text tells."""
    return not isinstance(error, (MissingDerivativeError, torch.OutOfMemoryError)) and bool(
        _OF_DERIVATIVES.search(str(error))
    )


def explain_closure(
    fn: Callable[[], Tensor], params: Sequence[nn.Parameter], order: int
) -> MissingDerivativeError | None:
    """Return an error that names operation, module and remedy; None if nothing is missing.

    Args:
        fn: Runs the closure, and returns what it differentiates, with its graph.
        params: The optimizer's parameters.
        order: How often they are differentiated: 1 for residuals, 2 for a loss.

    Cost: some runs of the closure, and passes back.
    """
    found = find_failing_operation(params, lambda _: fn(), list(params), order)
    if found is None or found.order == 0:
        return None
    remedies = []
    if kept := _kept(fn, params, order, found):
        remedies.append(f"give the optimizer only parameters that come after it, {kept}")
    if found.order == 2:
        remedies.append(
            "return residuals from the closure, where the loss is a sum of squares, and pass "
            "curvature='gauss_newton', which differentiates the model once"
        )
        which = "curvature='ggn' or 'fisher'" if found.kind else "curvature='fisher'"
        remedies.append(f"take hesscurv.optim.PreconditionedOptimizer with {which}")
    if found.is_custom:
        remedies.append("write the function's backward with differentiable operations of torch")
    if not remedies:
        remedies.append("replace the operation by one with a derivative")
    kind = "second derivative" if found.order == 2 else "derivative"
    return MissingDerivativeError(
        f"NewtonCG needs a derivative that torch lacks: no {kind} of {found.describe()}, "
        f"{first_sentence(found.error)!r}; the weights are left as they were; "
        + ", or ".join(remedies)
    )


def _kept(
    fn: Callable[[], Tensor], params: Sequence[nn.Parameter], order: int, found: FailingOperation
) -> str:
    """Return parameters such that nothing fails that depends on them, tried out, as a text."""

    def find(left: list[int]) -> FailingOperation | None:
        chosen = [params[i] for i in left]
        return find_failing_operation(chosen, lambda _: fn(), chosen, order)

    left, last = find_unaffected(find, found, len(params))
    if not left:
        return ""
    chosen = [params[i] for i in left]
    names = [last.names.get(id(p), f"one of shape {tuple(p.shape)}") for p in chosen]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{names[:_MOST_NAMES]}{more}"
