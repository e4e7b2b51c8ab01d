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
from torch.overrides import TorchFunctionMode

from hesscurv.linalg.device_memory import memory_budget
from hesscurv.objective.running.environment import compilation_suspended, differentiable
from hesscurv.objective.running.plain_embeddings import with_plain_arguments
from hesscurv.operators.ways.linearization import NonFiniteLossError, require_whole
from hesscurv.optim.flat_parameters import FlatParameters
from hesscurv.optim.newton.closure_derivatives import explain_closure, may_lack_derivative
from hesscurv.optim.newton.residual_jacobian import RowPlaces, SampleWeights
from hesscurv.optim.snapshot import RandomState

Closure = Callable[[], Any]
Loss = TypeVar("Loss")  # what a closure returns


@dataclass
class ResidualGraph:
    r"""Residuals at one point, with the graph of their derivatives.

    Args:
        values: r, shape (N,), with its graph.
        cotangent: c, shape (N,), at the values of r; requires grad.
        pullback: :math:`J^T c`, one tensor for each parameter that r depends on, with the graph
            that leads to c; None where an operation has no derivative of its backward pass.
        rows: J, shape (N, D), of the parameters that r depends on, where it was asked for and
            could be had cheaply; there is no pullback then.
        places: Where the rows were found.
    """

    values: Tensor
    cotangent: Tensor
    pullback: list[Tensor] | None
    rows: Tensor | None = None
    places: RowPlaces | None = None


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
        recorder = _Recorder(self._params)
        if rows:
            budget = memory_budget(self._device, None) // 4
            recorder.sample_weights = SampleWeights(self._params, budget)
        with _refusing_wrappers():
            returned = self._run(recorder)
            graph = None
            if self._residuals:
                values = _require_residuals(returned, recorder.calls)
                graph = recorder.rows_of(returned, values, places) if rows else None
                if rows and graph is None:
                    self._random.restore()
                    recorder = _Recorder(self._params)
                    returned = self._run(recorder)
                    values = _require_residuals(returned, recorder.calls)
                graph = recorder.pull_back(values) if graph is None else graph
                returned = graph.values.detach().square().sum()
        if graph is None and not recorder.calls:
            loss = _require_loss(returned)
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
        reader = _Reader(self._params, self._gradients)
        returned = self._run(reader)
        if self._residuals:
            reader.value = float(_require_residuals(returned, reader.calls).detach().square().sum())
        elif not reader.calls:
            reader.value = float(_require_loss(returned).detach())
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
        collector = _Collector(self._params)
        returned = self._run(collector)
        if self._residuals:
            return _require_residuals(returned, collector.calls)
        return collector.total if collector.total is not None else _require_loss(returned)

    def _run(self, mode: _Interception) -> Any:
        self.num_evaluations += 1
        with ExitStack() as stack:
            stack.enter_context(compilation_suspended())
            stack.enter_context(differentiable(self._device))
            stack.enter_context(mode)
            return self._closure()


class _Interception(TorchFunctionMode):
    """Hand the tensors that backward is called on to `add`, and do not run it."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.params = params
        self.own = {id(p) for p in params}
        self.value, self.calls = 0.0, 0
        self.sample_weights: SampleWeights | None = None

    def add(self, loss: Tensor, weight: Tensor | None, fill: bool = True) -> None:
        """Take a tensor that backward was called on, and the weights of its entries."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward or func is torch.autograd.backward:
            return self._backward(func, args, kwargs)
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        args, kwargs = with_plain_arguments(func, args, kwargs)
        if func is torch.nn.functional.linear and self.sample_weights is not None:
            return self.sample_weights.linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("tensors", "gradient", "retain_graph", "create_graph", "inputs")
        given = dict(zip(names, args, strict=False)) | kwargs
        inputs = given.get("inputs")
        if inputs is not None:
            inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
            if not any(id(t) in self.own for t in inputs):
                return func(*args, **kwargs)  # a derivative inside the loss
            raise ValueError(
                "expected loss.backward() for all parameters, got backward(inputs=...) with "
                "some of the optimizer's; leave `inputs` out"
            )
        if given.get("create_graph"):
            raise ValueError(
                "expected loss.backward(), got backward(create_graph=True); for derivatives inside "
                "the loss use torch.autograd.grad(..., create_graph=True), for the loss itself "
                "nothing is needed: the graph is kept"
            )
        tensors, weights = given["tensors"], given.get("gradient", given.get("grad_tensors"))
        if isinstance(tensors, Tensor):
            tensors, weights = (tensors,), (weights,)
        elif weights is None:
            weights = (None,) * len(tensors)
        elif isinstance(weights, Tensor):
            weights = (weights,)
        self.calls += 1
        for tensor, weight in zip(tensors, weights, strict=True):
            _require_graph(tensor, scalar=weight is None)
            self.value += float(
                tensor.detach() if weight is None else (tensor * weight).detach().sum()
            )
            self.add(tensor, weight)
        return None


class _Recorder(_Interception):
    """Differentiates what backward is called on, and keeps the graphs."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params)
        self.slopes: list[Tensor | None] = [None] * len(params)

    def add(self, loss: Tensor, weight: Tensor | None, fill: bool = True) -> None:
        """Differentiate a tensor that backward was called on."""
        if not fill:
            self.value = float(loss.detach())
        try:
            slopes = torch.autograd.grad(
                loss, self.params, weight, create_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise ValueError(
                "expected a loss whose graph is there, got one that was freed by "
                "torch.autograd.grad in the closure; call loss.backward() instead, or return the "
                "loss alone"
            ) from error
        require_whole(slopes)
        for i, (p, slope) in enumerate(zip(self.params, slopes, strict=True)):
            if slope is None:
                continue
            if slope.layout != torch.strided:
                raise ValueError(
                    f"expected dense gradients, got one of layout {slope.layout} for a parameter "
                    f"of shape {tuple(p.shape)}: a sparse gradient has no second derivative; make "
                    "the embedding with sparse=False"
                )
            before = self.slopes[i]
            self.slopes[i] = slope if before is None else before + slope
            if fill:
                _accumulate(p, slope.detach())

    def rows_of(
        self, returned: Any, values: Tensor, places: RowPlaces | None
    ) -> ResidualGraph | None:
        """Differentiate the sum of squares by the rows of its residuals' Jacobian, if there are."""
        if self.sample_weights is None or len({p.dtype for p in self.params}) > 1:
            return None
        parts = returned if isinstance(returned, (tuple, list)) else (returned,)
        found = self.sample_weights.jacobian(parts, values, places)
        if found is None:
            return None
        rows_ND, slopes, places = found
        kept = [rows for rows, s in zip(self.split(rows_ND), slopes, strict=True) if s is not None]
        self.value = float(values.detach().square().sum())
        self.slopes = slopes
        rows_ND = rows_ND if len(kept) == len(slopes) else torch.cat(kept, 1)
        values = values.detach()
        return ResidualGraph(values, values, None, rows_ND, places)

    def split(self, rows_ND: Tensor) -> tuple[Tensor, ...]:
        """Return each parameter's columns."""
        return rows_ND.split([p.numel() for p in self.params], dim=1)

    def pull_back(self, values: Tensor) -> ResidualGraph:
        """Differentiate the sum of squares, and keep the graph from a cotangent to its pullback."""
        self.value = float(values.detach().square().sum())
        with torch.enable_grad():
            cotangent = values.detach().clone().requires_grad_()
            try:
                parts = torch.autograd.grad(
                    values, self.params, cotangent, create_graph=True, allow_unused=True
                )
                require_whole(parts)
                pullback = [part for part in parts if part is not None]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # or an error that the next line raises too
                parts = torch.autograd.grad(
                    values, self.params, cotangent.detach(), retain_graph=True, allow_unused=True
                )
                pullback = None
        self.slopes = [None if part is None else 2 * part.detach() for part in parts]
        return ResidualGraph(values, cotangent, pullback)


class _Collector(_Interception):
    """Sums up what backward is called on, with its graph."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params)
        self.total: Tensor | None = None

    def add(self, loss: Tensor, weight: Tensor | None, fill: bool = True) -> None:
        """Add a tensor that backward was called on."""
        term = loss.reshape(()) if weight is None else (loss * weight).sum()
        self.total = term if self.total is None else self.total + term


class _Reader(_Interception):
    """Reads the loss off what backward is called on, and fills in a gradient known already."""

    def __init__(self, params: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
        super().__init__(params)
        self.gradients = gradients

    def add(self, loss: Tensor, weight: Tensor | None, fill: bool = True) -> None:
        """Fill in the gradient at the first call: it is that of all of them together."""
        if self.gradients:
            for p, gradient in zip(self.params, self.gradients, strict=True):
                if gradient is not None:
                    _accumulate(p, gradient)
        self.gradients = []


def _accumulate(p: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        if p.grad is None:
            p.grad = gradient.clone()
        else:
            p.grad += gradient


def _require_loss(returned: Any) -> Tensor:
    if not isinstance(returned, Tensor):
        raise TypeError(
            "expected the closure to call loss.backward() or to return the loss, a scalar tensor "
            f"with its graph, got {type(returned).__name__} and no backward; return loss, not "
            "loss.item()"
        )
    _require_graph(returned, scalar=True)
    return returned


def _require_residuals(returned: Any, calls: int) -> Tensor:
    parts = returned if isinstance(returned, (tuple, list)) else (returned,)
    if calls or not parts or not all(isinstance(part, Tensor) for part in parts):
        got = "a call of backward" if calls else type(returned).__name__
        raise TypeError(
            "expected the closure to return the residuals, a tensor or several with their graph, "
            f"whose squares add up to the loss, got {got}; return what you square and sum, each "
            "divided by the square root of the number it is the mean over, and leave backward out"
        )
    with torch.enable_grad():
        values = torch.cat([part.reshape(-1) for part in parts])
    _require_graph(values, scalar=False)
    return values


def _require_graph(loss: Tensor, *, scalar: bool) -> None:
    if scalar and loss.numel() != 1:
        raise ValueError(
            f"expected a scalar loss, got shape {tuple(loss.shape)}; reduce it with .mean() or "
            ".sum()"
        )
    if not loss.requires_grad:
        raise ValueError(
            "expected a loss with a graph, got one without: it was detached, computed under "
            "torch.no_grad(), or does not depend on a parameter that requires grad"
        )


def _require_finite(value: float) -> float:
    if value - value != 0:  # NaN or inf
        raise NonFiniteLossError(
            f"expected a finite loss, got {value}; the weights are left as they were; start from "
            "weights with a finite loss, or look for the operation with "
            "torch.autograd.set_detect_anomaly(True)"
        )
    return value


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # By its formula: torch 2.13's own has a wrong double backward.
    return v * (g / torch.norm_except_dim(v, 2, dim))


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
