"""Loss of a LightningModule's training step, without its side effects."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hesscurv.interface.descriptions import Described
from hesscurv.objective.data.samples import num_samples

_INTERNALS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


class TrainingStepTask(Described):
    """The loss returned by ``module.training_step(batch, 0)``, for the Hessian.

    Side effects of the step are undone: ``self.log``, the trainer's loggers, attributes of modules
    and the tensors, lists, dicts and sets in them (collected outputs, states of metrics). Others,
    such as files or global variables, are not.

    A module with manual optimization is refused, since its step trains. The weight of a batch is
    its number of samples, and operators test whether the loss is a mean over them.

    Raises:
        TypeError: When called, for a module without such a step, or whose loss is not a tensor.

    Example:
        >>> class Module(torch.nn.Linear):
        ...     def training_step(self, batch, batch_idx):
        ...         return ((self(batch) - 1.0) ** 2).mean()
        >>> task = hesscurv.integrations.TrainingStepTask()
        >>> hesscurv.HessianOperator(Module(4, 1).double(), task, [inputs]).shape
        torch.Size([5, 5])
    """

    tests_mean = True  # its weights are tested by operators

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """Return the training step's loss on a batch."""
        check_training_step(module)
        step: Any = module.training_step
        with _leaving_no_trace(module):
            output = step(batch, 0) if _takes_an_index(step) else step(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"expected training_step to return a loss or a dict with one, got a "
                f"{type(output).__name__}; pass a task, such as hesscurv.supervised(loss)"
            )
        return loss

    def weight(self, batch: Any) -> float:
        """Return the number of samples."""
        return float(num_samples(batch))


def check_training_step(module: Any) -> None:
    """Require a module whose training step is a function of a batch.

    Raises:
        TypeError: With the reason.
    """
    remedy = "pass a task, such as hesscurv.supervised(loss) or (module, batch) -> loss"
    if not callable(getattr(module, "training_step", None)):
        raise TypeError(
            f"expected a LightningModule with a training_step, got a {type(module).__name__}; "
            f"{remedy}"
        )
    if not getattr(module, "automatic_optimization", True):
        raise TypeError(
            f"expected automatic optimization, got {type(module).__name__} with "
            "automatic_optimization=False, whose training_step takes steps of its optimizers; "
            f"{remedy}"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise TypeError(
            f"expected a training_step of a batch, got {type(module).__name__}'s of a "
            f"dataloader_iter; {remedy}"
        )


def _takes_an_index(step: Any) -> bool:
    """Whether a step takes a batch and its index, by Lightning's criterion."""
    parameters = inspect.signature(step).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


@contextmanager
def _leaving_no_trace(module: nn.Module) -> Iterator[None]:
    """Discard everything that a step logs, and restore attributes."""
    modules = list(module.modules())
    before = [dict(vars(m)) for m in modules]
    trainer = vars(module).get("_trainer")
    loggers = [] if trainer is None else trainer.loggers
    try:
        for m in modules:
            for name, value in vars(m).items():
                if name in _INTERNALS:
                    continue
                if isinstance(value, Tensor):  # a copy, so that in-place updates spare the original
                    vars(m)[name] = value.clone()
                elif type(value) in (list, dict, set):
                    vars(m)[name] = value.copy()
        for name in ("log", "log_dict"):
            vars(module)[name] = _nothing
        if trainer is not None:
            trainer.loggers = [_Nothing() for _ in loggers]
        yield
    finally:
        if trainer is not None:
            trainer.loggers = loggers
        for m, attributes in zip(modules, before, strict=True):
            for name in vars(m).keys() - attributes.keys():
                del vars(m)[name]
            vars(m).update(attributes)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Nothing:
    """Stands in for a logger and its experiment: accepts every call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return _Nothing()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Nothing()
