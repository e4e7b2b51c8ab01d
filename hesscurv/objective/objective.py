"""Objective: a model's mean loss as a function of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hesscurv.distributed.sharded import (
    is_sharded,
    own_shard,
    refuse_flattened,
    reshard,
    whole,
)
from hesscurv.linalg.device_memory import memory_budget
from hesscurv.objective.changes import marks_of_model, marks_of_task
from hesscurv.objective.data.batches import Batches
from hesscurv.objective.loss_changes import LossChanges
from hesscurv.objective.parameters import (
    ParameterLayout,
    ParamSelection,
    broadcasts_buffers,
    common_device,
    layout_of,
    resolve_compute_dtype,
    select_parameters,
    signature_of,
    unwrap,
)
from hesscurv.objective.running.environment import (
    differentiable,
    exclusive,
    has_own_autocast,
    has_weight_norm,
    is_compiled,
    preserved,
)
from hesscurv.objective.running.plain_embeddings import PlainEmbeddings, dense, makes_plain
from hesscurv.objective.tasks import Task, as_loss, weight_of
from hesscurv.objective.value_changes import differ, read_values


class Objective:
    """A model's mean loss over batches, as a pure function of the selected parameters.

    The model's code runs on substitutes: copies of the selected parameters' values in the compute
    dtype, taken by `refresh`, which must be called first, and copies of the buffers. The model's
    own tensors, `.grad` fields and tensor hooks are never involved. Parameters sharded over ranks
    (FSDP2) are gathered by `refresh`, one at a time, into whole copies.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.
        task: A `Task`, a callable ``(model, batch) -> scalar mean loss``, or without batches a
            closure ``(model) -> scalar`` or ``() -> scalar``.
        batches: Re-iterable batches; None for a closure.
        params: The selected parameters, see `select_parameters`.
        training: Mode of the modules: False evaluates as in inference, True as in training, None
            leaves each module's own flag.
        compute_dtype: Dtype of the computation and of the vectors; by default that of the
            parameters, or float32 for half precision.
        budget: Bytes for graphs and vectors, see `memory_budget`; another quarter keeps batches.
        may_be_empty: Whether there may be no batch, if other ranks have some.

    Attributes:
        precision: Precision of products: "highest", that of the compute dtype (default), "tf32" or
            "bf16".
        broadcasts_buffers: Whether all ranks use rank 0's buffers, as in DDP.

    Raises:
        TypeError: If the model, the task, the parameters or the batches have the wrong type.
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
        may_be_empty: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        self.model = unwrap(model)
        self.broadcasts_buffers = broadcasts_buffers(model)
        refuse_flattened(self.model)
        with exclusive(self.model):  # another thread may be running it on substitutes
            reshard(self.model)
            self._selected = select_parameters(self.model, params)
        self._signatures = {name: signature_of(p) for name, p in self._selected.items()}
        self.layout: ParameterLayout = layout_of(self._selected)
        self.device = common_device(self.model, self._selected)
        self.dtype = resolve_compute_dtype(self._selected, compute_dtype)
        own = {p.dtype for p in self._selected.values()}
        self._cast = None if own == {self.dtype} else self.dtype
        self.training = training
        self.precision = "highest"
        self.task = task
        self._loss = as_loss(task, batches is not None)
        self.budget = memory_budget(self.device, budget)
        self.batches = Batches(batches, self.device, self._cast, self.budget // 4, may_be_empty)
        self._wrapper = _Wrapper(self.model)
        # Whether embeddings are replaced by plain functions: by their options, or once detected.
        self._plain = any(map(makes_plain, self.model.modules()))
        self._values: tuple[Tensor, ...] = ()
        self.constants: dict[str, Tensor] = {}
        self._versions: tuple[int, ...] = ()
        self._copies: tuple[Tensor, ...] = ()
        self._marks: tuple[Any, ...] = ()
        self._marks_seen: tuple[Any, ...] = ()
        self.is_closure = batches is None
        self._loss_changes = LossChanges(self.dtype)
        self._task_marks = marks_of_task(task)
        self._compares_values, self._once = True, False

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
        """Return the selected parameters' values, in the compute dtype, as of `refresh`."""
        return self._values

    def refresh(self) -> bool:
        """Detect changes of the model and of a list of batches; return whether there were any.

        Writes that bypass autograd's version counters (`.data`) are detected as well: the selected
        parameters are compared with the copies taken, the others by their norms. State captured by
        a closure is compared by one evaluation of its loss.
        """
        weights, data = self.find_changes()
        if weights:
            self.take_values()
        return self.closure_differs() or weights or data

    def find_changes(self) -> tuple[bool, bool]:
        """Return whether the model changed, and whether a list of batches did, which is reread.

        Sharded parameters are compared by this rank's own shards, without communication.
        """
        with exclusive(self.model), torch.inference_mode(False), torch.no_grad():
            task = marks_of_task(self.task)
            differs = task != self._task_marks or self._loss_differs()
            self._task_marks = task
            data = self.batches.reread_if_written(differs)
            reshard(self.model)
            self._look_up()
            marks = marks_of_model(self.model, self.training)
            same = self._marks[:1] == (marks,)
            if same and not self._compares_values:
                return differs, data
            # Values are compared only if no other mark shows a change.
            written, numbers = self._read_values(compare=same)
            self._compares_values = not self._once
            self._marks_seen = (marks, numbers)
            return self._marks_seen != self._marks or written or differs, data

    @contextmanager
    def values_compared_once(self) -> Iterator[None]:
        """Inside, check for writes that bypass version counters only at the first `refresh`.

        After such a write, the selected parameters keep the values of that refresh. Each check
        would synchronise a GPU.
        """
        before, self._once = self._once, True
        try:
            yield
        finally:
            self._once, self._compares_values = before, True

    def take_values(self) -> None:
        """Copy the model's present values; collective, as sharded ones are gathered."""
        with exclusive(self.model), torch.inference_mode(False), torch.no_grad():
            selected = self._selected.values()
            self._values = tuple(whole(p).to(self.dtype, copy=True) for p in selected)
            self._versions = tuple(value._version for value in self._values)
            self._copies = tuple(
                own_shard(p).clone() if is_sharded(p) else value
                for p, value in zip(selected, self._values, strict=True)
            )
            self.constants = {
                name: self._substitute(whole(t))
                for name, t in [*self._named(), *self.model.named_buffers()]
                if name not in self._selected
            }
            self._marks = self._marks_seen
            self._loss_changes.forget()

    def invalidate(self) -> None:
        """Make the next `refresh` report a changed model."""
        self._marks = ()

    def release(self) -> None:
        """Free the copies of the model's values until the next `refresh`."""
        self._values, self._copies, self.constants = (), (), {}
        self.invalidate()

    def compare_loss(self) -> None:
        """Make the next `refresh` evaluate the first batch's loss and compare it with the last one.

        Detects changes that leave no mark: plain attributes of a model, state captured by a loss.
        """
        self._loss_changes.compare_next()

    def closure_differs(self) -> bool:
        """Whether a closure's loss has changed by more than rounding."""
        return self.is_closure and self._loss_changes.closure_differs(self._evaluate)

    def _loss_differs(self) -> bool:
        known = bool(self._values) and not self.is_closure
        batches = self.batches.kept if known else None
        return self._loss_changes.first_differs(self._evaluate, batches)

    def _evaluate(self, batch: Any) -> float:
        """Return the loss of a batch at the values that were taken."""
        with self.environment():
            return float(self.loss(self._values, batch).detach())

    def is_sharded(self) -> bool:
        """Whether any of the model's parameters is sharded over ranks."""
        return any(is_sharded(p) for p in self.model.parameters())

    def weight(self, batch: Any) -> float:
        """Return the batch's weight in the mean, by default its number of samples."""
        return weight_of(self.task, batch)

    def loss(
        self, params: tuple[Tensor, ...], batch: Any, constants: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Return the scalar mean loss of a batch at given parameters.

        Args:
            params: Values of the selected parameters.
            batch: The batch, on the device.
            constants: Values of all other parameters and buffers; default the model's present ones.
        """
        loss = self._call(self._loss, params, batch, constants)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"expected the loss as a scalar tensor, got a {type(loss).__name__}; return the "
                "tensor itself, without .item() or float()"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"expected a scalar loss, got shape {tuple(loss.shape)}; average over the samples "
                "(reduction='mean')"
            )
        if not loss.is_floating_point():
            raise TypeError(f"expected a real floating loss, got {loss.dtype}; check the task")
        return loss.reshape(())

    def outputs(
        self, params: tuple[Tensor, ...], batch: Any, constants: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Return the model's outputs on a batch at given parameters; arguments as for `loss`."""
        out = self._call(self.task_parts.outputs, params, batch, constants)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"expected task.outputs to return a tensor, got {type(out).__name__}; pick or "
                "concatenate the tensor in a subclass of hesscurv.Task"
            )
        return out

    @contextmanager
    def environment(self, *, compiling: bool = False) -> Iterator[None]:
        """Run the model's code inside: in the chosen mode, differentiable, without side effects."""
        with (
            preserved(self.model, self.device, self.training, compiling),
            differentiable(self.device, self.precision),
            PlainEmbeddings() if self._plain else nullcontext(),
        ):
            yield

    @contextmanager
    def at_precision(self, precision: str) -> Iterator[None]:
        """Compute in another precision inside."""
        before, self.precision = self.precision, precision
        try:
            yield
        finally:
            self.precision = before

    def computes_as_found(self) -> bool:
        """Whether the model, run without `environment`, computes the same without side effects.

        Batch statistics, for instance, are updated in training mode.
        """
        with exclusive(self.model):
            return self._computes_as_found(list(self.model.modules()))

    def _computes_as_found(self, modules: list[nn.Module]) -> bool:
        return (
            self._cast is None
            and not self._plain
            and not self.is_sharded()
            and (self.training is None or all(m.training == self.training for m in modules))
            and all(p.requires_grad == (n in self._selected) for n, p in self._named())
            and not any(m.training and m._buffers for m in modules)
            and not any(m._backward_hooks or m._backward_pre_hooks for m in modules)
            and not any(
                is_compiled(m) or has_weight_norm(m) or has_own_autocast(m) for m in modules
            )
        )

    def leaves(self) -> tuple[Tensor, ...]:
        """Return `parameters` as new leaves with dense gradients."""
        leaves = self._leaves()
        for leaf in leaves:
            leaf.register_hook(self._take_gradient)
        return leaves

    def find_writes(self) -> bool:
        """Copy the values again if a forward pass has written to them; return whether it had.

        From then on embeddings do not write (`PlainEmbeddings`).

        Raises:
            ValueError: If something other than an embedding writes.
        """
        written = [
            name
            for name, value, version in zip(
                self.layout.names, self._values, self._versions, strict=True
            )
            if value._version != version
        ]
        if not written:
            return False
        self.take_values()
        if self._plain:
            raise ValueError(
                f"expected a forward pass that leaves the parameters alone, got one that writes to "
                f"{written[:4]} in place; compute with a changed copy instead"
            )
        self._plain = True
        return True

    def run(
        self,
        fn: Callable[[], Any],
        *,
        compiling: bool = False,
        params: tuple[Tensor, ...] | None = None,
        constants: dict[str, Tensor] | None = None,
    ) -> Any:
        """Run `fn` in `environment`, with other tensors substituted for the model's own.

        Differentiation must run inside as well: it reruns the forward of a checkpointed model.

        Args:
            fn: The function to run.
            compiling: See `environment`.
            params: Substitutes of the selected parameters; default `leaves`.
            constants: Those of all other parameters and buffers; default the model's present ones.
        """
        with self.environment(compiling=compiling):
            params = self._leaves() if params is None else params
            return self._call(lambda *_: fn(), params, None, constants)

    def _leaves(self) -> tuple[Tensor, ...]:
        return tuple(p.detach().requires_grad_() for p in self._values)

    def _take_gradient(self, gradient: Tensor) -> Tensor | None:
        if gradient.layout is torch.strided:
            return None
        self._plain = True  # from the next run on
        return dense(gradient)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def _look_up(self) -> None:
        """Look up the selected parameters, which assignments to the model may have replaced."""
        found = dict(self._named())
        for name, expected in self._signatures.items():
            got = signature_of(found[name]) if name in found else "none"
            if got != expected:
                raise ValueError(
                    f"expected parameter {name!r} as this operator was built for, {expected}, got "
                    f"{got}; build a new operator after moving or pruning the model"
                )
            self._selected[name] = found[name]

    def _read_values(self, *, compare: bool) -> tuple[bool, tuple[float, ...]]:
        """Return whether the selected values differ from their copies, and numbers of the rest."""
        own = map(own_shard, self._selected.values())
        pairs = list(zip(own, self._copies, strict=True)) if compare else []
        selected = {id(p) for p in self._selected.values()}
        found = [*self.model.parameters(), *self.model.buffers()]
        others = [own_shard(t) for t in found if id(t) not in selected]
        others = [t for t in others if t.is_floating_point() and t.numel() and t.itemsize > 1]
        if self.device.type == "cpu" and self._cast is None:
            return differ(pairs), read_values([], others)[1]
        return read_values(pairs, others)

    def _substitute(self, tensor: Tensor) -> Tensor:
        # An inference tensor cannot take part in a graph; a copy of it can.
        tensor = tensor.clone() if tensor.is_inference() else tensor.detach()
        return tensor.to(self._cast) if self._cast and tensor.is_floating_point() else tensor

    def _call(
        self,
        fn: Callable[..., Any],
        params: tuple[Tensor, ...],
        batch: Any,
        constants: dict[str, Tensor] | None = None,
    ) -> Any:
        tensors = dict(zip(self._selected, params, strict=True)) | (constants or self.constants)
        # Copies, so that writes of a forward to a buffer are discarded.
        tensors.update({n: tensors[n].clone() for n, _ in self.model.named_buffers()})
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
