"""Say which operation has no derivative, where it runs, and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscurv.operators.batches import split
from hesscurv.operators.failing_operation import FailingOperation, find_failing_operation
from hesscurv.operators.samples import map_tensors, tensors_of

if TYPE_CHECKING:
    from hesscurv.operators.objective import Objective

# What kernels say of a dtype that they do not take.
_DTYPE = re.compile(
    r"\b(double|half|bfloat16|float64|float32|float16|dtype|(scalar|data|result|output) ?type)\b",
    re.I,
)
_NAMED = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")
_MOST_NAMES = 6
_MOST_TRIES = 32
_FEW_SAMPLES = 4


class MissingDerivativeError(ValueError, NotImplementedError):
    """An operation of the model or the loss lacks a derivative that this curvature needs."""


@dataclass(frozen=True)
class Differentiation:
    """A function that a kind of curvature differentiates, and how often.

    Args:
        fn: A function of the parameters, or of the outputs.
        leaves: Where; tensors that require grad.
        order: 1 or 2.
        of_parameters: Whether the leaves are the selected parameters.
    """

    fn: Callable[[tuple[Tensor, ...]], Tensor]
    leaves: tuple[Tensor, ...]
    order: int
    of_parameters: bool = True


def of_hessian(objective: Objective, batch: Any) -> Iterator[Differentiation]:
    """Yield what the Hessian needs: the loss twice differentiable in the parameters."""
    yield Differentiation(lambda p: objective.loss(p, batch), objective.leaves(), 2)


def of_loss(objective: Objective, batch: Any) -> Iterator[Differentiation]:
    """Yield the loss, differentiable once."""
    yield Differentiation(lambda p: objective.loss(p, batch), objective.leaves(), 1)


def of_ggn(objective: Objective, batch: Any) -> Iterator[Differentiation]:
    """Yield what the GGN needs: outputs once differentiable, and the loss twice in these."""
    yield Differentiation(lambda p: objective.outputs(p, batch), objective.leaves(), 1)
    with torch.no_grad():
        z = objective.outputs(objective.parameters(), batch).detach().requires_grad_()
    task = objective.task_parts
    yield Differentiation(lambda leaves: task.loss(leaves[0], batch), (z,), 2, False)


def explain(
    objective: Objective,
    batch: Any,
    error: Exception,
    needs: Callable[[Any], Iterable[Differentiation]],
    kind: str,
) -> Exception:
    """Return an error that names operation, module and remedy, or the error as it is.

    Only what torch raises is looked at; it is found again on a few samples, which takes some
    passes forward and back.

    Args:
        objective: The model, the task and the selected parameters.
        batch: The batch that it was raised on.
        error: What was raised.
        needs: Returns what is differentiated on a batch.
        kind: The name of the operator.
    """
    if isinstance(error, (MissingDerivativeError, torch.OutOfMemoryError)):
        return error
    if not isinstance(error, (RuntimeError, TypeError)):  # NotImplementedError is the first
        return error
    try:
        return objective.run(lambda: _explain(objective, batch, needs, kind)) or error
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that cannot be followed: the first error says most
        return error


def _explain(
    objective: Objective,
    batch: Any,
    needs: Callable[[Any], Iterable[Differentiation]],
    kind: str,
) -> Exception | None:
    for few in _parts(batch):
        # What a kind differentiates may pass where the loss itself, evaluated first, fails.
        for need in chain(needs(few), of_loss(objective, few)):
            found = find_failing_operation(objective.model, need.fn, need.leaves, need.order)
            if found is None:
                continue
            if found.order or isinstance(found.error, NotImplementedError):
                return _missing(objective, few, need, found, kind)
            wrong = _wrong_dtype(objective, few, found)
            if wrong is not None:
                return wrong
            break  # of another size than the model takes, say
    return None


def _parts(batch: Any) -> list[Any]:
    """Return a few samples, and the whole batch, whose other samples may take another branch."""
    try:
        few = split(batch, _FEW_SAMPLES)[0]
    except Exception:
        return [batch]
    return [few, batch]


def _missing(
    objective: Objective, batch: Any, need: Differentiation, found: FailingOperation, kind: str
) -> MissingDerivativeError:
    remedies = []
    if need.of_parameters:
        kept = _without(objective, need, found)
        if kept:
            remedies.append("leave out the parameters that it depends on, with " + kept)
    remedies += _other_operators(objective, batch, kind)
    if found.is_custom:
        remedies.append("write the function's backward with differentiable operations of torch")
    if not remedies:
        remedies.append("replace the operation by one with a derivative")
    order = {0: "no derivative", 1: "no derivative", 2: "no second derivative"}[found.order]
    return MissingDerivativeError(
        f"{kind} needs a derivative that torch lacks: {order} of {found.describe()}, "
        f"{_first_sentence(found.error)!r}; " + ", or ".join(remedies)
    )


def _without(objective: Objective, need: Differentiation, found: FailingOperation) -> str:
    """Return a selection of parameters such that nothing fails that depends on them, tried out."""
    left = list(range(len(need.leaves)))
    values = [p.detach() for p in need.leaves]
    for _ in range(_MOST_TRIES):
        left = [i for i in left if i not in found.upstream]
        if not left or not found.upstream:
            return ""
        chosen = tuple(values[i].detach().requires_grad_() for i in left)
        fn = _restricted(need.fn, values, left)
        again = find_failing_operation(objective.model, fn, chosen, need.order)
        if again is None:
            return _selection(objective, left)
        found = replace(again, upstream=frozenset(left[i] for i in again.upstream))
    return ""


def _restricted(
    fn: Callable[[tuple[Tensor, ...]], Tensor], values: Sequence[Tensor], left: Sequence[int]
) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """Return a function as one of some of its arguments, where the others are constant."""

    def restricted(leaves: tuple[Tensor, ...]) -> Tensor:
        given = dict(zip(left, leaves, strict=True))
        return fn(tuple(given.get(i, value) for i, value in enumerate(values)))

    return restricted


def _selection(objective: Objective, left: Sequence[int]) -> str:
    """Write a selection of parameters as an argument: by modules, by names, or by what is not."""
    names = objective.layout.names
    kept = [names[i] for i in left]
    every = [name for name, _ in objective.model.named_parameters()]
    tops = list(dict.fromkeys(name.split(".")[0] for name in kept))
    if {name for name in every if name.split(".")[0] in tops} == set(kept):
        kept = tops
    if len(kept) <= _MOST_NAMES:
        return f"params={kept}"
    left_out = tuple(sorted(set(names) - {names[i] for i in left}))
    if len(left_out) <= _MOST_NAMES:
        return f"params=lambda name, _: name not in {left_out}"
    return f"params=[{', '.join(map(repr, kept[:_MOST_NAMES]))}, ...] ({len(kept)} in all)"


def _other_operators(objective: Objective, batch: Any, kind: str) -> list[str]:
    """Return the operators that need less, and have it."""
    if kind == "EmpiricalFisherOperator":
        return []
    task: Any = objective.task
    if not (hasattr(task, "outputs") and hasattr(task, "loss")):
        if objective.is_closure:
            return []
        return [
            "give the loss in two parts, hesscurv.supervised(loss) or a subclass of hesscurv.Task, "
            "to GGNOperator or EmpiricalFisherOperator, which differentiate the model once"
        ]
    outputs, loss = of_ggn(objective, batch)
    model = objective.model
    if find_failing_operation(model, outputs.fn, outputs.leaves, 1) is not None:
        return []
    if kind == "HessianOperator" and (
        find_failing_operation(model, loss.fn, loss.leaves, loss.order) is None
    ):
        return ["take GGNOperator or EmpiricalFisherOperator, which differentiate the model once"]
    return ["take EmpiricalFisherOperator, which needs no second derivative"]


def _wrong_dtype(objective: Objective, batch: Any, found: FailingOperation) -> ValueError | None:
    text = str(found.error)
    if not _DTYPE.search(text):
        return None
    remedy = _cast_that_works(objective, batch) or _dtype_that_works(objective, batch)
    if remedy is None:
        dtypes = sorted({str(t.dtype) for t in tensors_of(batch)})
        remedy = f"give the model and the loss tensors of the dtypes they take; got {dtypes}"
    return ValueError(
        f"{found.describe()} does not run on what it is given, in {objective.dtype}: "
        f"{_first_sentence(found.error)!r}; {remedy}"
    )


def _cast_that_works(objective: Objective, batch: Any) -> str | None:
    """Say which one tensor of a batch to cast: class targets to int64, numbers to floats."""
    for i, tensor in enumerate(tensors_of(batch)):
        for dtype, call in ((torch.int64, ".long()"), (objective.dtype, ".float()")):
            if tensor.dtype == dtype or tensor.is_complex():
                continue
            numbers = iter(range(len(tensors_of(batch))))

            def cast(t: Tensor, i: int = i, dtype: Any = dtype, numbers: Any = numbers) -> Tensor:
                return t.to(dtype) if next(numbers) == i else t

            if _runs(objective, map_tensors(batch, cast), objective.dtype):
                return (
                    f"cast tensor {i} of the batch, of {tensor.dtype} and shape "
                    f"{tuple(tensor.shape)}, with {call}"
                )
    return None


def _dtype_that_works(objective: Objective, batch: Any) -> str | None:
    for dtype in (torch.float32, torch.float64):
        if dtype != objective.dtype and _runs(objective, batch, dtype):
            return f"pass compute_dtype={dtype}"
    return None


def _runs(objective: Objective, batch: Any, dtype: torch.dtype) -> bool:
    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    try:
        params = tuple(map(cast, objective.parameters()))
        constants = {name: cast(t) for name, t in objective.constants.items()}
        loss = objective.loss(params, map_tensors(batch, cast), constants)
        return loss.numel() == 1
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the same, or another riddle
        return False


def explain_closure(error: Exception, kind: str, other: str) -> Exception:
    """Return an error that names the operation which lacks a derivative, or the error as it is.

    Args:
        error: What torch raised.
        kind: What needs the derivative.
        other: What does not need it, for the remedy.
    """
    found = _NAMED.search(str(error))
    if found is None or isinstance(error, torch.OutOfMemoryError):
        return error
    name = found.group(1).removeprefix("_").removesuffix("_backward")
    return MissingDerivativeError(
        f"{kind} needs a derivative that torch lacks: no second derivative of {name}, "
        f"{_first_sentence(error)!r}; replace it by an operation that has one, or {other}"
    )


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.split(r"(?<=[a-z)'])\. ", text)[0][:200]
