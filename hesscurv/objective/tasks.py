"""Tasks: outputs and loss of a model on a batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.interface.descriptions import brief, describe_object
from hesscurv.objective.data.sample_lists import select_listed
from hesscurv.objective.data.samples import (
    TARGET_KEYS,
    describe,
    map_tensors,
    num_samples,
    tensors_of,
)
from hesscurv.objective.running.environment import without_fallback_warnings
from hesscurv.objective.torch_losses import TorchLoss, may_average, reduction_of, torch_loss_of

__all__ = [
    "SupervisedTask",
    "Task",
    "as_loss",
    "describe",
    "map_tensors",
    "num_samples",
    "split_batch",
    "supervised",
    "tensors_of",
]


class Task:
    """A loss in two parts, ``loss(outputs(model, batch), batch)``, mean over the batch's samples.

    Subclass it for models or batches that `supervised` does not support. The Hessian only calls it;
    the GGN needs the two parts, and the empirical Fisher also `sample_losses`. A loss that averages
    anything but samples needs `weight`; without it, operators test the loss.

    Example:
        >>> class Regression(hesscurv.Task):
        ...     def outputs(self, model, batch):
        ...         return model(batch["x"])
        ...     def loss(self, outputs, batch):
        ...         return ((outputs - batch["y"]) ** 2).mean()
        >>> data = [{"x": inputs, "y": torch.zeros(32, 2).double()}]
        >>> hesscurv.GGNOperator(model, Regression(), data).shape
        torch.Size([23, 23])
    """

    def __repr__(self) -> str:
        """Return the type and the public attributes."""
        values = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return describe_object(self, **values)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the model's outputs on a batch, one row per sample: shape (n, ...)."""
        raise TypeError(_unimplemented(self, "outputs"))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the scalar mean loss of the outputs; convex in them for a GGN that is psd."""
        raise TypeError(_unimplemented(self, "loss"))

    def sample_losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return each sample's loss, shape (n,); their mean must be `loss`.

        By default `loss` on each row, vectorised: correct for every mean over samples, and for
        weighted means if `weight` of a single row gives its weight. For a batch that is a list of
        samples, `loss` is called with one-sample lists.
        """
        n = outputs.shape[0]
        if n and select_listed(batch, n, [0]) is not None:
            parts = (select_listed(batch, n, [i]) for i in range(n))
            pairs = zip(outputs, parts, strict=True)
            return torch.stack([self.loss(row.unsqueeze(0), part) for row, part in pairs])

        def has_rows(t: Tensor) -> bool:
            return t.ndim > 0 and t.shape[0] == n

        def one(row: Tensor, *rows: Tensor) -> Tensor:
            left = iter(rows)
            part = map_tensors(batch, lambda t: next(left).unsqueeze(0) if has_rows(t) else t)
            return self.loss(row.unsqueeze(0), part)

        with without_fallback_warnings():
            rows = [outputs, *filter(has_rows, tensors_of(batch))]
            try:
                return torch.func.vmap(one)(*rows)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # data-dependent control flow, or random numbers, under vmap
                return torch.stack([one(*row) for row in zip(*rows, strict=True)])

    def weight(self, batch: Any) -> float:
        """Return the batch's weight in the mean over all data: its number of samples.

        Override it if the loss averages anything but samples, such as unmasked tokens: it is the
        divisor of the mean. Also if the number of samples cannot be determined, or if the loss
        depends on the whole batch (contrastive losses, rankings) and several batches are averaged.
        An override is trusted: the loss is not tested then.

        Raises:
            ValueError: If the number of samples cannot be determined.
        """
        return float(num_samples(batch))

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar mean loss of the model on a batch."""
        return self.loss(self.outputs(model, batch), batch)


class SupervisedTask(Task):
    """The task of `supervised`: inputs go to the model, outputs and targets to a loss.

    Args:
        loss_fn: As for `supervised`.
    """

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        if not callable(loss_fn):
            raise TypeError(
                f"expected a loss such as torch.nn.CrossEntropyLoss(), got {type(loss_fn).__name__}"
            )
        given = getattr(loss_fn, "keywords", {})  # options of a functools.partial
        inner = getattr(loss_fn, "func", loss_fn)
        reduction = reduction_of({"reduction": getattr(inner, "reduction", "mean"), **given})
        if not may_average(loss_fn, reduction):
            raise ValueError(
                f"expected a loss with reduction='mean', got reduction={reduction!r}; what is "
                "measured is the curvature of a mean over all samples"
            )
        self.loss_fn = loss_fn

    @property
    def torch_loss(self) -> TorchLoss | None:
        """The loss's `TorchLoss` if it is an unmodified loss of torch, otherwise None."""
        own = type(self).loss is not SupervisedTask.loss
        return None if own else torch_loss_of(self.loss_fn)

    def __repr__(self) -> str:
        """Return the call that creates the task."""
        return f"supervised({brief(self.loss_fn)})"

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Call the model on the batch's inputs: one tensor, a sequence, or keyword inputs."""
        inputs, _ = split_batch(batch)
        if isinstance(inputs, Mapping):
            out = _call_with_keywords(model, inputs)
        elif isinstance(inputs, (tuple, list)):
            out = model(*inputs)
        else:
            out = model(inputs)
        out = getattr(out, "logits", out)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"expected the model to return a tensor (or an object with .logits), got "
                f"{type(out).__name__}; subclass hesscurv.Task and pick the tensor in `outputs`"
            )
        return out

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of outputs against the batch's targets."""
        targets = split_batch(batch)[1]

        def is_other(t: Any) -> bool:
            return isinstance(t, Tensor) and t.is_floating_point() and t.dtype != outputs.dtype

        # Cast class weights and other tensors of the loss to the dtype of the outputs.
        if isinstance(self.loss_fn, nn.Module):
            state = dict(self.loss_fn.named_parameters()) | dict(self.loss_fn.named_buffers())
            other = {name: t.to(outputs.dtype) for name, t in state.items() if is_other(t)}
            if other:
                return torch.func.functional_call(self.loss_fn, other, (outputs, targets))
        if isinstance(self.loss_fn, functools.partial):
            bound = self.loss_fn.keywords
            other = {name: t.to(outputs.dtype) for name, t in bound.items() if is_other(t)}
            return self.loss_fn(outputs, targets, **other)
        return self.loss_fn(outputs, targets)

    def weight(self, batch: Any) -> float:
        """Return the divisor of the loss's mean over the batch's targets.

        For torch's losses: the sum of the class weights of targets other than `ignore_index`, or
        their number; the number of elements for elementwise losses. For others the number of
        targets, since inputs may have another dimension first.
        """
        targets = split_batch(batch)[1]
        if self.torch_loss is not None and isinstance(targets, Tensor):
            return self.torch_loss.weigh(targets)
        known = any(t.ndim > 0 for t in tensors_of(targets))
        return float(num_samples(targets if known else batch))

    def row_weights(self, batch: Any) -> Tensor | None:
        """Return the weight of each row of targets, shape (n,); None if all are equal."""
        targets = split_batch(batch)[1]
        if self.torch_loss is None or not isinstance(targets, Tensor):
            return None
        return self.torch_loss.weigh_rows(targets)


def supervised(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> SupervisedTask:
    """Make the task of a model with inputs and targets: ``loss_fn(model(inputs), targets)``.

    Args:
        loss_fn: A loss with mean reduction, such as ``torch.nn.CrossEntropyLoss()``, or any
            callable ``(outputs, targets) -> scalar``. Losses of `torch.nn` and
            `torch.nn.functional` (options bound by `functools.partial`) weight each batch by the
            divisor of their mean: class weights, targets other than `ignore_index`, elements. Any
            other loss must be a mean over samples, which operators test.

    Returns:
        A task for batches ``(inputs, targets)``, where the inputs may themselves be a sequence
        (``model(*inputs)``) or a mapping (``model(**inputs)``), and for dict batches, whose targets
        are under "labels", "label", "targets", "target" or "y".

    Raises:
        TypeError: If `loss_fn` cannot be called.
        ValueError: If its `reduction` is not a mean ("sum", "none").

    Example:
        >>> task = hesscurv.supervised(torch.nn.CrossEntropyLoss())
        >>> loss = task(model, (inputs, targets))
        >>> loss.shape
        torch.Size([])
    """
    return SupervisedTask(loss_fn)


def as_loss(task: Any, has_batches: bool) -> Callable[[nn.Module, Any], Any]:
    """Return a task, or a closure without batches, as a function of model and batch.

    Raises:
        TypeError: If it cannot be called, or is a module.
        ValueError: If it needs batches and there are none.
    """
    if not callable(task):
        raise TypeError(
            "expected a task such as hesscurv.supervised(torch.nn.CrossEntropyLoss()) or a "
            f"callable (model, batch) -> scalar loss, got {type(task).__name__}"
        )
    if isinstance(task, nn.Module):
        raise TypeError(
            f"expected a task, got the module {type(task).__name__}; wrap a loss with "
            "hesscurv.supervised(...)"
        )
    if has_batches:
        return task
    if isinstance(task, Task):
        raise ValueError(
            "expected batches for a task with outputs and loss, got None; pass a list of batches, "
            "or a closure (model) -> scalar loss as the task"
        )
    try:
        positional = [
            p
            for p in inspect.signature(task).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        ]
    except (TypeError, ValueError):
        positional = []
    if len(positional) > 1:
        raise ValueError(
            "expected a closure (model) -> scalar loss or () -> scalar loss where batches is None, "
            f"got one that takes {len(positional)} arguments; pass batches"
        )
    if positional:
        return lambda model, batch: task(model)
    return lambda model, batch: task()


def require_parts(task: Any) -> None:
    """Require a task with the parts `outputs` and `loss`.

    Raises:
        TypeError: If it is a subclass of `Task` that lacks one of them.
    """
    for name in ("outputs", "loss"):
        part = getattr(task, name, None)
        if isinstance(task, Task) and getattr(part, "__func__", None) is getattr(Task, name):
            raise TypeError(_unimplemented(task, name))


def weight_of(task: Any, batch: Any) -> float:
    """Return a batch's weight in the mean, by default its number of samples.

    Raises:
        TypeError: If the task's `weight` does not return a number.
    """
    own = getattr(task, "weight", None)
    if not callable(own):
        return Task.weight(task, batch)
    got = own(batch)
    try:
        return float(got)
    except (TypeError, ValueError, RuntimeError) as error:
        what = describe(got) if isinstance(got, Tensor) else repr(got)
        raise TypeError(
            f"expected {type(task).__name__}.weight(batch) to return a number, what the batch "
            f"counts in the mean, got {what}; return a float, such as the number of samples"
        ) from error


def _unimplemented(task: Task, name: str) -> str:
    what = {
        "outputs": "outputs(self, model, batch), which returns the model's outputs",
        "loss": "loss(self, outputs, batch), which returns their scalar mean loss",
    }[name]
    return (
        f"expected a task that implements {what}, got {type(task).__name__}, which does not; "
        "define it: the GGN, the Fisher and pruning need the loss in these two parts. A task that "
        "has __call__(self, model, batch) alone is enough for HessianOperator"
    )


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Split a batch into inputs and targets.

    Raises:
        ValueError: If the batch is neither a pair nor a mapping with a target.
    """
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise ValueError(
            f"expected a dict batch with its targets under one of {TARGET_KEYS}, got keys "
            f"{list(batch)}; subclass hesscurv.Task, or pass a callable (model, batch) -> loss"
        )
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        f"expected batches (inputs, targets) or dicts, got {describe(batch)}; subclass "
        "hesscurv.Task, or pass a callable (model, batch) -> loss"
    )


def _call_with_keywords(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    if takes_any or all(key in accepted for key in inputs):
        return model(**inputs)
    if len(inputs) == 1:  # a single input is passed by position, whatever its key
        return model(*inputs.values())
    raise ValueError(
        f"the model's forward takes {list(accepted)}, but the dict batch holds {list(inputs)}; "
        "rename the keys, or subclass hesscurv.Task"
    )
