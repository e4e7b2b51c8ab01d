"""Interception of backward in a closure: the graph that it would free is kept, or read off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hesscurv.objective.running.plain_embeddings import with_plain_arguments
from hesscurv.operators.ways.linearization import require_whole
from hesscurv.optim.newton.residual_jacobian import RowPlaces, SampleWeights


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


class Interception(TorchFunctionMode):
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


class Recorder(Interception):
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
        found = self.sample_weights.jacobian(parts_of(returned), values, places)
        if found is None:
            return None
        rows_ND, slopes, places = found
        columns = rows_ND.split([p.numel() for p in self.params], dim=1)
        kept = [rows for rows, s in zip(columns, slopes, strict=True) if s is not None]
        self.value = float(values.detach().square().sum())
        self.slopes = slopes
        rows_ND = rows_ND if len(kept) == len(slopes) else torch.cat(kept, 1)
        values = values.detach()
        return ResidualGraph(values, values, None, rows_ND, places)

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


class Collector(Interception):
    """Sums up what backward is called on, with its graph."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params)
        self.total: Tensor | None = None

    def add(self, loss: Tensor, weight: Tensor | None, fill: bool = True) -> None:
        """Add a tensor that backward was called on."""
        term = loss.reshape(()) if weight is None else (loss * weight).sum()
        self.total = term if self.total is None else self.total + term


class Reader(Interception):
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


def require_loss(returned: Any) -> Tensor:
    """Return what a closure returned, if it is a scalar loss with a graph."""
    if not isinstance(returned, Tensor):
        raise TypeError(
            "expected the closure to call loss.backward() or to return the loss, a scalar tensor "
            f"with its graph, got {type(returned).__name__} and no backward; return loss, not "
            "loss.item()"
        )
    _require_graph(returned, scalar=True)
    return returned


def parts_of(returned: Any) -> Any:
    """Return what a closure returned as several, also where it is one."""
    return returned if isinstance(returned, (tuple, list)) else (returned,)


def require_residuals(returned: Any, calls: int) -> Tensor:
    """Return what a closure returned as one vector, if it is residuals with a graph."""
    parts = parts_of(returned)
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


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # By its formula: torch 2.13's own has a wrong double backward.
    return v * (g / torch.norm_except_dim(v, 2, dim))
