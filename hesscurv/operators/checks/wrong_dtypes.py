"""Search for the cast, or the compute dtype, with which a loss runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hesscurv.objective.data.samples import map_tensors, tensors_of
from hesscurv.objective.objective import Objective
from hesscurv.operators.checks.failing_operation import FailingOperation, find_failing_operation

# What kernels say of a dtype that they do not take.
_DTYPE = re.compile(
    r"\b(double|half|byte|bool|bfloat16|float\d*|long|int\d*|dtype|scalar ?types?|data ?types?|"
    r"result type)\b|not implemented for '",
    re.I,
)
_NO_KERNEL = "not implemented for '"
_MOST_CASTS = 3  # tensors that are cast one after the other
_SPELLED = {torch.float32: ".float()", torch.float64: ".double()", torch.int64: ".long()"}


def explain_dtype(objective: Objective, batch: Any, own: torch.dtype) -> ValueError | None:
    """Return an error with a cast or a dtype that lets the loss run; None if that is not it.

    Each is tried before it is named: a few forward passes.

    Args:
        objective: The model, the task and the selected parameters, running; see `Objective.run`.
        batch: A batch that the loss does not run on.
        own: The dtype of the model's own parameters.
    """
    found = _failing(objective, batch)
    if found is None:
        return None
    said = first_sentence(found.error)
    if not _DTYPE.search(said) or (
        isinstance(found.error, NotImplementedError) and _NO_KERNEL not in said
    ):
        return None
    remedies = []
    casts = _find_casts(objective, batch, own, found)
    if casts:
        remedies.append("pass " + ", and ".join(casts))
    # Last, as the casts mend the data and this may only happen to suit them.
    other = torch.float32 if objective.dtype == torch.float64 else torch.float64
    if _runs_in(objective, batch, other):
        remedies.append(f"pass compute_dtype={other}")
    if not remedies:
        return None
    return ValueError(
        f"{found.describe()} does not run in {objective.dtype}: {said!r}; " + ", or ".join(remedies)
    )


def first_sentence(error: Exception) -> str:
    """Return the beginning of an error's text, on one line."""
    text = " ".join(str(error).split())
    return re.split(r"(?<=[a-z)'])\. ", text)[0][:200]


def _failing(objective: Objective, batch: Any) -> FailingOperation | None:
    """Return the operation that the loss cannot run on a batch."""
    return find_failing_operation(
        objective.model, lambda p: objective.loss(p, batch), objective.leaves(), 0
    )


def _find_casts(
    objective: Objective, batch: Any, own: torch.dtype, found: FailingOperation
) -> list[str]:
    """Return the casts of tensors of a batch after which the loss runs; none if none help."""
    named = _names(batch)
    casts: list[str] = []
    done: set[int] = set()
    for _ in range(_MOST_CASTS):
        further = None
        for number, dtype in _candidates(objective, batch):
            if number in done:
                continue
            name, tensor = named[number]
            changed = _cast(batch, number, dtype)
            # Floating tensors are converted to the compute dtype, where that is not the model's.
            is_converted = own != objective.dtype and tensor.is_floating_point()
            given = "a floating tensor" if is_converted else str(tensor.dtype)
            text = f"{name}{_spell(dtype if dtype == torch.int64 else own)} for {name} ({given})"
            now = _failing(objective, changed)
            if now is None:
                return [*casts, text]
            if (now.name, str(now.error)) != (found.name, str(found.error)):
                further = further or (number, text, changed, now)
        if further is None:
            return []
        number, text, batch, found = further
        casts.append(text)
        done.add(number)
    return []


def _candidates(objective: Objective, batch: Any) -> Iterator[tuple[int, torch.dtype]]:
    """Yield the numbers of tensors that may be of a wrong dtype, with another; the last first."""
    for number, t in reversed(list(enumerate(tensors_of(batch)))):
        if t.is_complex() or t.layout is not torch.strided:
            continue
        if not t.is_floating_point():
            yield from ((number, torch.int64),) if t.dtype != torch.int64 else ()
            yield number, objective.dtype
        else:
            if t.dtype != objective.dtype:
                yield number, objective.dtype
            if bool((t == t.round()).all()):  # classes, or tokens
                yield number, torch.int64


def _cast(batch: Any, number: int, dtype: torch.dtype) -> Any:
    count = -1

    def cast(t: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return t.to(dtype) if count == number else t

    return map_tensors(batch, cast)


def _spell(dtype: torch.dtype) -> str:
    return _SPELLED.get(dtype, f".to({dtype})")


def _runs_in(objective: Objective, batch: Any, dtype: torch.dtype) -> bool:
    """Whether the loss runs with all floating tensors in another dtype."""

    def cast(t: Tensor) -> Tensor:
        return t.detach().to(dtype) if t.is_floating_point() else t

    leaves = tuple(cast(p).requires_grad_() for p in objective.parameters())
    constants = {name: cast(t) for name, t in objective.constants.items()}
    batch = map_tensors(batch, cast)

    def run() -> FailingOperation | None:
        def fn(params: tuple[Tensor, ...]) -> Tensor:
            return objective.loss(params, batch, constants)

        return find_failing_operation(objective.model, fn, leaves, 1)

    return objective.run(run, params=leaves, constants=constants) is None


def _names(batch: Any) -> list[tuple[str, Tensor]]:
    """Return a batch's tensors, as `tensors_of` has them, with how they are written."""
    found: dict[int, str] = {}
    _walk(batch, "batch", lambda name, t: found.setdefault(id(t), name), frozenset())
    tensors = tensors_of(batch)
    return [(found.get(id(t), f"tensor {i} of the batch"), t) for i, t in enumerate(tensors)]


def _walk(value: Any, name: str, note: Callable[[str, Tensor], Any], outer: frozenset[int]) -> None:
    if isinstance(value, Tensor):
        note(name, value)
        return
    if id(value) in outer or isinstance(value, (str, bytes, type)):
        return
    children: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        children = [(f"{name}[{key!r}]", v) for key, v in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        children = [(f"{name}.{key}", getattr(value, key)) for key in value._fields]
    elif isinstance(value, (list, tuple)):
        children = [(f"{name}[{i}]", v) for i, v in enumerate(value)]
    else:
        children = [(f"{name}.{key}", v) for key, v in getattr(value, "__dict__", {}).items()]
    for text, child in children:
        _walk(child, text, note, outer | {id(value)})
