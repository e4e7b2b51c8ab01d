"""A closure, as torch.optim.LBFGS takes it, as a loss that can be differentiated twice.

Such a closure clears the gradients, computes the loss, calls ``loss.backward()`` and returns the
loss. backward would free the graph; here it is intercepted, and the graph is kept for products with
the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from hesscurv.linalg.device_memory import memory_budget
from hesscurv.objective.running.environment import compilation_suspended, differentiable
from hesscurv.operators.ways.linearization import NonFiniteLossError
from hesscurv.optim.flat_parameters import FlatParameters
from hesscurv.optim.newton.closure_derivatives import explain_closure, may_lack_derivative
from hesscurv.optim.newton.intercepted_backward import (
    Collector,
    Interception,
    Reader,
    Recorder,
    ResidualGraph,
    require_loss,
    require_residuals,
)
from hesscurv.optim.newton.residual_jacobian import RowPlaces, SampleWeights
from hesscurv.optim.snapshot import RandomState

Closure = Callable[[], Any]
Loss = TypeVar("Loss")  # what a closure returns


@dataclass
class LossGraph:
    """The loss at one point, with the graph of its gradient.

    Args:
        value: The loss.
        params: The parameters that the loss depends on.
        slopes: Its gradient, one tensor for each of these, with the graph that it came from.
        returned: What the closure returned, without a graph.
        residuals: Where the loss is a sum of squares.
    """

    value: float
    params: list[nn.Parameter]
    slopes: list[Tensor]
    returned: Any
    residuals: ResidualGraph | None = None

    @property
    def layout(self) -> FlatParameters:
        """Where the parameters lie in vectors (D,), and the dtype of these."""
        return FlatParameters(self.params)

    def gradient(self) -> Tensor:
        """Return the gradient as a vector (D,), without the graph."""
        return self.layout.flatten(slope.detach() for slope in self.slopes)


class ClosureLoss:
    r"""The loss that a closure computes, as a function of the parameters it reads.

    What counts is what the closure calls backward on: ``loss.backward()``, with several calls their
    sum, as they add up in ``.grad``, and with ``backward(gradient=w)`` the sum of w times the
    tensor. What the closure returns is handed on, and counts only if it never calls backward.

    The random numbers are the same in all evaluations (those of torch, on the CPU and the
    parameters' device), so that dropout and random batches do not change in between; after any of
    them the generators stand as after one.

    Args:
        closure: Takes nothing, computes the loss with the parameters' present values.
        params: The optimizer's parameters, on one device.
        residuals: Whether the closure returns residuals, a tensor or several, of any shapes; the
            loss is then the sum of all their squares.

    Attributes:
        num_evaluations: How often the closure has run.
    """

    def __init__(
        self, closure: Closure, params: Sequence[nn.Parameter], *, residuals: bool = False
    ) -> None:
        if not callable(closure):
            raise TypeError(
                f"expected a closure that computes the loss, got {type(closure).__name__}; see "
                "torch.optim.LBFGS.step for how to write one"
            )
        self._closure, self._params = closure, [p for p in params if p.requires_grad]
        if not self._params:
            raise ValueError(
                "expected parameters that require grad, got none; call requires_grad_(True) on "
                "those to train"
            )
        self._residuals, self._device = residuals, params[0].device
        self._random = RandomState(self._device)
        self._gradients: list[Tensor | None] = []
        self.num_evaluations = 0

    def differentiate(self, *, rows: bool = False, places: RowPlaces | None = None) -> LossGraph:
        """Run the closure once and keep the graph of its gradient, for products with the Hessian.

        Args:
            rows: Whether to look for the rows of the residuals' Jacobian, see `SampleWeights`;
                where they cannot be had, the closure runs once more.
            places: What an earlier graph's residuals had.

        ``.grad`` is filled as backward fills it: added to what is there. Only parameters of the
        optimizer get one.

        Raises:
            TypeError: If the closure returns no tensor and calls no backward.
            ValueError: If there is no scalar with a graph that reaches the parameters, the loss or
                its gradient is not finite, or the gradient is sparse.
            NotImplementedError: If the model is wrapped in DDP or FSDP.
        """
        recorder = Recorder(self._params)
        if rows:
            budget = memory_budget(self._device, None) // 4
            recorder.sample_weights = SampleWeights(self._params, budget)
        with _refusing_wrappers():
            returned = self._run(recorder)
            graph = None
            if self._residuals:
                values = require_residuals(returned, recorder.calls)
                graph = recorder.rows_of(returned, values, places) if rows else None
                if rows and graph is None:
                    self._random.restore()
                    recorder = Recorder(self._params)
                    returned = self._run(recorder)
                    values = require_residuals(returned, recorder.calls)
                graph = recorder.pull_back(values) if graph is None else graph
                returned = graph.values.detach().square().sum()
        if graph is None and not recorder.calls:
            loss = require_loss(returned)
            with torch.enable_grad():
                recorder.add(loss, None, fill=False)
        value = _require_finite(recorder.value)
        used = [i for i, slope in enumerate(recorder.slopes) if slope is not None]
        slopes = [slope for slope in recorder.slopes if slope is not None]
        if not used:
            raise ValueError(
                "expected a loss that depends on the optimizer's parameters, got one that depends "
                "on none of them that requires grad; was the model replaced, or detached?"
            )
        self._gradients = [None if s is None else s.detach() for s in recorder.slopes]
        if not all(bool(slope.detach().isfinite().all()) for slope in slopes):
            raise ValueError(
                f"expected a finite gradient, got NaN or inf entries at a loss of {value:.6g}; "
                "the weights are left as they were; look for the operation with "
                "torch.autograd.set_detect_anomaly(True)"
            )
        if isinstance(returned, Tensor):
            returned = returned.detach()
        return LossGraph(value, [self._params[i] for i in used], slopes, returned, graph)

    def evaluate(self) -> float:
        """Return the loss at the parameters' present values, NaN or infinite ones too.

        backward computes nothing here: it adds the gradient of `differentiate` to ``.grad``, so
        that a closure that reads or clips it finds one, and only the forward pass is paid for.

        Raises:
            TypeError, ValueError: As `differentiate`, but for the loss being finite.
        """
        self._random.restore()
        reader = Reader(self._params, self._gradients)
        returned = self._run(reader)
        if self._residuals:
            reader.value = float(require_residuals(returned, reader.calls).detach().square().sum())
        elif not reader.calls:
            reader.value = float(require_loss(returned).detach())
        return reader.value

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Explain an error of a missing derivative inside; the closure runs again for that.

        Raises:
            MissingDerivativeError: In place of torch's error, with the operation and remedies.
        """
        try:
            yield
        except RuntimeError as error:  # NotImplementedError is one
            if not may_lack_derivative(error):
                raise
            order = 1 if self._residuals else 2
            try:
                explained = explain_closure(self._run_again, self._params, order)
            except Exception:  # the first error says most
                raise error from None
            if explained is None:
                raise
            raise explained from error

    def _run_again(self) -> Tensor:
        """Run the closure, and return the residuals, or what it calls backward on, in one sum."""
        self._random.restore()
        collector = Collector(self._params)
        returned = self._run(collector)
        if self._residuals:
            return require_residuals(returned, collector.calls)
        return collector.total if collector.total is not None else require_loss(returned)

    def _run(self, mode: Interception) -> Any:
        self.num_evaluations += 1
        with ExitStack() as stack:
            stack.enter_context(compilation_suspended())
            stack.enter_context(differentiable(self._device))
            stack.enter_context(mode)
            return self._closure()


def _require_finite(value: float) -> float:
    if value - value != 0:  # NaN or inf
        raise NonFiniteLossError(
            f"expected a finite loss, got {value}; the weights are left as they were; start from "
            "weights with a finite loss, or look for the operation with "
            "torch.autograd.set_detect_anomaly(True)"
        )
    return value


@contextmanager
def _refusing_wrappers() -> Iterator[None]:
    """Refuse modules whose gradients are made whole by hooks that no product would pass through."""
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return

    def refuse(module: nn.Module, args: Any) -> None:
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel") or kind.startswith(
            "FSDP"
        ):
            raise NotImplementedError(
                f"expected a plain model, got one in {kind}: its gradients are averaged over the "
                "processes by backward, which Hessian products do not pass through; run the "
                "optimizer in one process with all data"
            )

    handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
