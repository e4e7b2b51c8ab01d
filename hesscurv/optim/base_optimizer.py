"""Requirements on a wrapped optimizer, and the places where its steps can be preconditioned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, SGD

from hesscurv.optim.newton.newton_cg import NewtonCG

# What a step, a schedule and a checkpoint need; `state` and `defaults` may be missing.
_NEEDED = ("step", "zero_grad", "state_dict", "load_state_dict", "add_param_group")
_INNER = ("optimizer", "base_optimizer", "base")  # where wrappers keep what they wrap
# What a sharpness-aware step is made of; the last of those that a base has takes the step itself.
PARTS_OF_A_STEP = ("first_step", "second_step", "third_step")


def check_base(base: Any) -> None:
    """Refuse what is no optimizer, or one whose steps have no one gradient.

    Optimizers that do not inherit from torch's are taken if they have its methods, as that of
    `schedulefree.ScheduleFreeWrapper`.

    Raises:
        TypeError: If it is a class, or lacks methods of an optimizer.
        ValueError: If it evaluates its closure by itself, along directions of its own.
    """
    if isinstance(base, type):
        raise TypeError(
            f"expected an optimizer, got the class {base.__name__}; pass an instance: "
            f"{base.__name__}(model.parameters(), ...)"
        )
    groups = getattr(base, "param_groups", None)
    lacking = [name for name in _NEEDED if not callable(getattr(base, name, None))]
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and "params" in group for group in groups
    ):
        lacking = ["param_groups", *lacking]
    if lacking or not groups:
        raise TypeError(
            f"expected base to be a torch.optim.Optimizer, got {type(base).__name__}"
            + (f" without {', '.join(lacking)}" if lacking else " without parameter groups")
        )
    for inner in inner_optimizers(base):
        if isinstance(inner, (LBFGS, NewtonCG)):
            name = type(inner).__name__
            raise ValueError(
                f"expected a base that takes one gradient a step, got {name}, which evaluates its "
                "closure many times along directions of its own; use hesscurv.optim.NewtonCG alone"
            )


def inner_optimizers(base: Any) -> Iterator[Any]:
    """Yield an optimizer, the one that it wraps, and so on."""
    seen: list[Any] = []
    while base is not None and not any(base is other for other in seen):
        seen.append(base)
        yield base
        found = (vars(base).get(name) for name in _INNER if hasattr(base, "__dict__"))
        base = next((x for x in found if hasattr(x, "param_groups")), None)


def is_like_sgd(base: Any) -> bool:
    """Whether the innermost optimizer is `torch.optim.SGD`, and its wrappers keep its rate."""
    *_, innermost = inner_optimizers(base)
    return isinstance(innermost, SGD) and not is_schedule_free(base)


def is_schedule_free(base: Any) -> bool:
    """Whether an optimizer moves the weights between those of training and of evaluation."""
    return any(
        all(callable(getattr(inner, name, None)) for name in ("train", "eval"))
        # Accelerate's has both, and hands them to what it wraps.
        and not type(inner).__module__.startswith("accelerate")
        for inner in inner_optimizers(base)
    )


def keeps_weights(base: Any) -> bool:
    """Whether an optimizer keeps weights of its own beside the model's, and moves both.

    Averages of the weights (ASGD), slow ones (Lookahead), those that gradients are taken from
    (schedule-free): where only the model's were changed after a step, the two would fall apart.
    """
    if is_schedule_free(base):
        return True
    for inner in inner_optimizers(base):
        names = [kind.__name__.lower() for kind in type(inner).__mro__]
        if isinstance(inner, ASGD) or any("lookahead" in name for name in names):
            return True
    return False


def perturbs(base: Any) -> bool:
    """Whether a step takes its gradient elsewhere than at the weights, as sharpness-aware ones."""
    pairs = (("first_step", "second_step"), ("perturb_weights", "un_perturb"))
    return any(
        all(callable(getattr(inner, name, None)) for name in pair)
        for inner in inner_optimizers(base)
        for pair in pairs
    )


def resolve_mode(base: Any, mode: str | None) -> str:
    """Return what is preconditioned, "gradient" or "update".

    Raises:
        ValueError: If the one asked for would be wrong with this base.
    """
    name = type(base).__name__
    if perturbs(base):
        if mode == "gradient":
            raise ValueError(
                f"expected mode='update' with {name}, got 'gradient': its gradient is taken within "
                "its step, elsewhere than at the weights; leave mode out"
            )
        return "update"
    if keeps_weights(base):
        if mode == "update":
            raise ValueError(
                f"expected mode='gradient' with {name}, got 'update': it keeps weights of its own, "
                "which a change of the model's alone would not reach; leave mode out, or wrap the "
                "optimizer inside it, as in Lookahead(PreconditionedOptimizer(inner, ...))"
            )
        return "gradient"
    return mode or ("gradient" if is_like_sgd(base) else "update")


def check_automatic_rate(base: Any, mode: str) -> None:
    """Refuse bases whose stable learning rate is not that of gradient descent.

    Raises:
        ValueError: If the base is adaptive, or has no learning rate.
    """
    *_, innermost = inner_optimizers(base)
    adaptive = type(innermost).__module__.startswith("torch.optim") and not is_like_sgd(base)
    if mode != "gradient" or adaptive or is_schedule_free(base):
        raise ValueError(
            f"expected a base like SGD for learning_rate='auto', got {type(base).__name__} in mode "
            f"{mode!r}: the stable rate of an adaptive one depends on its own state; leave "
            "learning_rate out"
        )
    if not any("lr" in group for group in base.param_groups):
        raise ValueError(
            "expected a base with 'lr' in its groups for learning_rate='auto', got "
            f"{sorted(base.param_groups[0])}; leave learning_rate out"
        )


def copies_of_weights(base: Any, moving: Iterable[tuple[Tensor, Tensor]]) -> list[str]:
    """Return the entries of a base's state that have the very values of a parameter.

    Args:
        base: The optimizer, after a step of its own.
        moving: Parameters that it has moved, with their values before the step.
    """
    found: set[str] = set()
    for p, old in moving:
        if p.numel() < 2 or bool((p == p.reshape(-1)[0]).all()):
            continue  # a buffer of zeros is as likely as a copy
        for inner in inner_optimizers(base):
            for name, value in getattr(inner, "state", {}).get(p, {}).items():
                same = isinstance(value, Tensor) and (value.shape, value.dtype) == (
                    p.shape,
                    p.dtype,
                )
                if same and (torch.equal(value, p) or torch.equal(value, old.to(p.dtype))):
                    found.add(str(name))
    return sorted(found)


def say_copies(base: Any, names: Sequence[str]) -> str:
    """Return what to say of a base that keeps copies of weights in these entries of its state."""
    return (
        f"{type(base).__name__} keeps copies of the weights in its state ({', '.join(names)}), "
        "which mode='update' leaves as they are: where it moves the weights towards them, use "
        "options=PreconditionerOptions(mode='gradient'), or wrap the optimizer inside it"
    )


def last_part(base: Any) -> str:
    """Return the name of the last part of a sharpness-aware base's step."""
    return [name for name in PARTS_OF_A_STEP if callable(getattr(base, name, None))][-1]


class OnceEvaluated:
    """A closure whose first evaluation has been made: the first call returns its loss.

    A base that wants a closure gets the loss without another pass; one that calls it again (a line
    search) has it evaluated in earnest, if that is allowed.

    Args:
        closure: The closure.
        loss: What it returned.
        again: Whether it may be evaluated once more. Not where the gradient is replaced by the
            preconditioned one during the step.
    """

    def __init__(self, closure: Callable[[], Any], loss: Any, again: bool) -> None:
        self._closure, self._loss, self._again = closure, loss, again
        self._calls = 0

    def __call__(self) -> Any:
        """Return the loss.

        Raises:
            ValueError: If it is asked for twice where that is not allowed.
        """
        self._calls += 1
        if self._calls == 1:
            return self._loss
        if not self._again:
            raise ValueError(
                "expected a base that evaluates its closure once a step in mode='gradient', got "
                "one that does so again: its later gradients would not be preconditioned; use "
                "options=PreconditionerOptions(mode='update'), or hesscurv.optim.NewtonCG"
            )
        with torch.enable_grad():
            return self._closure()


def evaluate(
    closure: Callable[[], Any] | None, base: Any, mode: str
) -> tuple[Any, Callable[[], Any] | None]:
    """Evaluate a closure before a base's step.

    Returns:
        Its loss, and what to give to the base's `step`. A sharpness-aware base is given the closure
        itself, not evaluated yet.
    """
    if closure is None or perturbs(base):
        return None, closure
    with torch.enable_grad():
        loss = closure()
    again = mode == "update"
    return loss, OnceEvaluated(closure, loss, again) if _takes_closure(base) else None


def _takes_closure(base: Any) -> bool:
    """Whether `step` has an argument for a closure."""
    try:
        parameters = inspect.signature(base.step).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.kind is not p.KEYWORD_ONLY for p in parameters)


def describe(base: Any) -> str:
    """Return an optimizer's name, with those that it wraps, and its learning rates."""
    name = ""
    for inner in reversed(list(inner_optimizers(base))):
        name = f"{type(inner).__name__}({name})" if name else type(inner).__name__
    rates = [g["lr"] for g in base.param_groups if "lr" in g]
    shown = sorted({float(r) for r in rates if not isinstance(r, Tensor) or r.numel() == 1})
    out = f"{name}, {len(base.param_groups)} group{'s' * (len(base.param_groups) != 1)}"
    if not shown:
        return out
    between = f"{shown[0]:.4g}" + (f" to {shown[-1]:.4g}" if len(shown) > 1 else "")
    return f"{out}, lr {between}"
