"""Explanation of missing derivatives: operation, module, remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hesscurv.objective.data.batches import split
from hesscurv.objective.tasks import require_parts
from hesscurv.operators.checks.failing_operation import (
    FailingOperation,
    find_failing_operation,
    find_unaffected,
)
from hesscurv.operators.checks.wrong_dtypes import explain_dtype, first_sentence

if TYPE_CHECKING:
    from hesscurv.objective.objective import Objective

_MOST_NAMES = 6
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
    # Looked up here: inside, substitutes in the compute dtype stand in for the parameters.
    floating = (p.dtype for p in objective.model.parameters() if p.is_floating_point())
    own = next(floating, objective.dtype)
    try:
        return objective.run(lambda: _explain(objective, batch, own, needs, kind)) or error
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that cannot be followed: the first error says most
        return error


def _explain(
    objective: Objective,
    batch: Any,
    own: torch.dtype,
    needs: Callable[[Any], Iterable[Differentiation]],
    kind: str,
) -> Exception | None:
    for few in _parts(batch):
        wrong = explain_dtype(objective, few, own)
        if wrong is not None:
            return wrong
        for need in needs(few):
            found = find_failing_operation(objective.model, need.fn, need.leaves, need.order)
            if found is None:
                continue
            if found.order or isinstance(found.error, NotImplementedError):
                return _missing(objective, few, need, found, kind)
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
        f"{first_sentence(found.error)!r}; " + ", or ".join(remedies)
    )


def _without(objective: Objective, need: Differentiation, found: FailingOperation) -> str:
    """Return a selection of parameters such that nothing fails that depends on them, tried out."""
    values = [p.detach() for p in need.leaves]

    def find(left: list[int]) -> FailingOperation | None:
        chosen = tuple(values[i].detach().requires_grad_() for i in left)
        fn = _restricted(need.fn, values, left)
        return find_failing_operation(objective.model, fn, chosen, need.order)

    left, _ = find_unaffected(find, found, len(values))
    return _selection(objective, left) if left else ""


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
    model = objective.model
    in_parts = hasattr(task, "outputs") and hasattr(task, "loss")
    try:
        if in_parts:
            require_parts(task)
            once, twice = _of_fisher(objective, batch), _second_of(of_ggn(objective, batch))
        elif objective.is_closure:
            return []
        else:
            leaves = objective.leaves()
            once = Differentiation(lambda p: objective.loss(p, batch), leaves, 1)
            twice = _in_outputs(objective, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # outputs that are no tensor, say
        return []
    if find_failing_operation(model, once.fn, once.leaves, 1) is not None:
        return []
    has_ggn = kind == "HessianOperator" and (
        find_failing_operation(model, twice.fn, twice.leaves, twice.order) is None
    )
    how = "take "
    if not in_parts:
        how = (
            "give the loss in two parts, hesscurv.supervised(loss) or a subclass of "
            "hesscurv.Task, to "
        )
    if has_ggn:
        return [how + "GGNOperator or EmpiricalFisherOperator, which differentiate the model once"]
    return [how + "EmpiricalFisherOperator, which needs no second derivative"]


def _of_fisher(objective: Objective, batch: Any) -> Differentiation:
    """Return what the Fisher needs: the samples' losses, once differentiable."""
    task = objective.task_parts

    def losses(params: tuple[Tensor, ...]) -> Tensor:
        return task.sample_losses(objective.outputs(params, batch), batch)

    return Differentiation(losses, objective.leaves(), 1)


def _second_of(needs: Iterable[Differentiation]) -> Differentiation:
    _, second = needs
    return second


def _in_outputs(objective: Objective, batch: Any) -> Differentiation:
    """Return a plain callable's loss as a function of what the model returns when it is called.

    Raises:
        ValueError: If it returns no tensor, or is not called as a whole.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, out: Any) -> None:
        z = getattr(out, "logits", out)
        if not isinstance(z, Tensor):
            raise ValueError(f"expected a model that returns a tensor, got {type(z).__name__}")
        found.append(z.detach().requires_grad_())

    with _after_the_model(objective.model, keep), torch.no_grad():
        objective.loss(objective.parameters(), batch)
    if not found:
        raise ValueError("expected a loss that calls the model")

    def loss(leaves: tuple[Tensor, ...]) -> Tensor:
        left = iter(leaves)

        def replace_outputs(module: nn.Module, inputs: Any, out: Any) -> Any:
            if isinstance(out, Tensor):
                return next(left)
            out.logits = next(left)
            return out

        with _after_the_model(objective.model, replace_outputs):
            return objective.loss(objective.parameters(), batch)

    return Differentiation(loss, tuple(found), 2, False)


@contextmanager
def _after_the_model(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
