"""The function whose curvature is measured: a model's mean loss, as a function of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hesscurv.operators.batches import Batches
from hesscurv.operators.environment import differentiable, preserved
from hesscurv.operators.memory import memory_budget
from hesscurv.operators.parameters import (
    ParameterLayout,
    ParamSelection,
    layout_of,
    select_parameters,
    unwrap,
)
from hesscurv.operators.tasks import Task

_HALF = (torch.float16, torch.bfloat16)


class Objective:
    """A model's mean loss over batches, as a pure function of the selected parameters.

    The model's code runs on substitutes: the parameters' values as fresh leaves, in the compute
    dtype, and copies of the buffers. The model's own tensors, `.grad` fields and hooks on them are
    never involved.

    Args:
        model: The module; torch.compile and DDP wrappers are looked through.
        task: A `Task`, a callable ``(model, batch) -> scalar mean loss``, or without batches a
            closure ``(model) -> scalar`` or ``() -> scalar``.
        batches: Re-iterable batches; None for a closure.
        params: Which parameters, see `select_parameters`.
        training: Mode of the modules: False evaluates as in inference, True as in training, None
            leaves each module's own flag.
        compute_dtype: Dtype of the computation and of the vectors; by default the parameters' own,
            but float32 for float16 and bfloat16 weights.
        budget: Bytes for graphs and vectors, see `memory_budget`; a quarter more keeps batches.

    Raises:
        TypeError: If the model, the task, the parameters or the batches are of a wrong type.
        ValueError: If nothing is selected, batches are missing or empty, or devices are mixed.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Callable[..., Tensor],
        batches: Iterable[Any] | None,
        params: ParamSelection,
        *,
        training: bool | None,
        compute_dtype: torch.dtype | None,
        budget: int | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        self.model = unwrap(model)
        self._selected = select_parameters(self.model, params)
        self.layout: ParameterLayout = layout_of(self._selected)
        self.device = _common_device(self._selected)
        self.dtype = _compute_dtype(self._selected, compute_dtype)
        own = {p.dtype for p in self._selected.values()}
        self._cast = None if own == {self.dtype} else self.dtype
        self.training = training
        self.task = task
        self._loss = _as_loss(task, batches is not None)
        self.budget = memory_budget(self.device, budget)
        self.batches = Batches(batches, self.device, self._cast, self.budget // 4)
        self._wrapper = _Wrapper(self.model)
        self._modules = list(self.model.modules())

    @property
    def task_parts(self) -> Task:
        """The task, which must have the parts `outputs` and `loss`.

        Raises:
            TypeError: If it is a plain callable.
        """
        task: Any = self.task
        if not (hasattr(task, "outputs") and hasattr(task, "loss")):
            raise TypeError(
                "the GGN and the Fisher need the loss in two parts, outputs(model, batch) and "
                f"loss(outputs, batch); got a {type(task).__name__}. Use hesscurv.supervised(loss) "
                "or a subclass of hesscurv.Task; the Hessian takes any callable"
            )
        return task

    def parameters(self) -> tuple[Tensor, ...]:
        """Return the selected parameters' present values, detached, in the compute dtype."""
        return tuple(p.detach().to(self.dtype) for p in self._selected.values())

    def weight(self, batch: Any) -> float:
        """Return the batch's weight in the mean, its number of samples unless the task says."""
        own = getattr(self.task, "weight", None)
        return float(own(batch)) if callable(own) else Task.weight(self.task, batch)  # type: ignore[arg-type]

    def loss(self, params: tuple[Tensor, ...], batch: Any) -> Tensor:
        """Return the scalar mean loss of a batch at given parameters."""
        loss = self._call(self._loss, params, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss)}"
            raise ValueError(
                f"expected a scalar loss, got {got}; average over the samples (reduction='mean')"
            )
        return loss.reshape(())

    def outputs(self, params: tuple[Tensor, ...], batch: Any) -> Tensor:
        """Return the model's outputs on a batch at given parameters."""
        out = self._call(self.task_parts.outputs, params, batch)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"expected task.outputs to return a tensor, got {type(out).__name__}; pick or "
                "concatenate the tensor in a subclass of hesscurv.Task"
            )
        return out

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Run the model's code inside: in the chosen mode, differentiable, leaving no trace."""
        with preserved(self.model, self.device, self.training), differentiable(self.device):
            yield

    def computes_as_found(self) -> bool:
        """Whether the model, run as it stands, would compute what products are made of."""
        return self._cast is None and (
            self.training is None or all(m.training == self.training for m in self._modules)
        )

    def substituted(self, fn: Callable[[], Any]) -> Any:
        """Run `fn` while the model's own parameters are substituted in the compute dtype."""
        return fn() if self._cast is None else self._call(lambda model, _: fn(), None, None)

    def state(self) -> tuple[Any, ...]:
        """Return what tells whether the model changed, but for writes that bypass autograd."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        versions = tuple((t.data_ptr(), t._version) for t in tensors if not t.is_inference())
        return versions, self.batches.versions()

    def norms(self) -> Tensor:
        """Return the parameters' norms, which change where `.data` is written to as well."""
        with torch.no_grad():
            values = [p.detach() for p in self.model.parameters() if p.is_floating_point()]
            return torch.stack([n.double() for n in torch._foreach_norm(values)])

    def _call(self, fn: Callable[..., Any], params: tuple[Tensor, ...] | None, batch: Any) -> Any:
        def substitute(t: Tensor) -> Tensor:
            return t.detach().to(self._cast if t.is_floating_point() else None)

        tensors = {n: substitute(p) for n, p in self.model.named_parameters()}
        # Copies, so that what a forward writes to a buffer is lost with them.
        tensors.update({n: substitute(b).clone() for n, b in self.model.named_buffers()})
        if params is not None:
            tensors.update(zip(self._selected, params, strict=True))
        return functional_call(
            self._wrapper, {f"model.{n}": t for n, t in tensors.items()}, (fn, batch)
        )


class _Wrapper(nn.Module):
    """Lets functional_call substitute parameters beneath any function of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, fn: Callable[..., Any], batch: Any) -> Any:
        return fn(self.model, batch)


def _as_loss(task: Any, has_batches: bool) -> Callable[[nn.Module, Any], Any]:
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


def _common_device(params: dict[str, nn.Parameter]) -> torch.device:
    devices = {p.device for p in params.values()}
    if len(devices) > 1:
        raise ValueError(
            f"expected the selected parameters on one device, got {sorted(map(str, devices))}; "
            "move the model to one, or select parameters of one device"
        )
    device = devices.pop()
    if device.type == "meta":
        raise ValueError("expected a model with values, got parameters on the meta device")
    return device


def _compute_dtype(params: dict[str, nn.Parameter], wanted: torch.dtype | None) -> torch.dtype:
    if wanted is not None:
        if not wanted.is_floating_point:
            raise TypeError(f"expected a floating compute_dtype, got {wanted}")
        return wanted
    dtypes = {torch.float32 if p.dtype in _HALF else p.dtype for p in params.values()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
