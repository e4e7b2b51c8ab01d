"""Comparison of derivatives with finite differences.

A double backward pass is exact for torch's own functions. A custom function whose backward keeps an
intermediate, detaches, or has a wrong formula gives symmetric products that are wrong: differences,
which know nothing of backward passes, tell.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from hesscurv.objective.objective import Objective
from hesscurv.objective.running.plain_embeddings import dense
from hesscurv.objective.tasks import map_tensors
from hesscurv.operators.ways.linearization import require_whole

logger = logging.getLogger(__name__)

Params = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Scale:
    """Steps of differences, relative to the size of the weights, and what they can tell.

    Differences over shorter steps lose digits; over longer ones they meet more kinks of ReLU and
    pooling, where they see what no derivative does.
    """

    steps: tuple[float, ...]
    right: float  # what a right derivative may differ by
    wrong: float  # what a wrong one has to differ by, at least
    # And by how many times as much as differences over two steps differ from each other.
    times_unsteady: float
    eps: float  # the coarsest rounding, anywhere in the function, that such steps are seen through
    flat: float  # how many times the noise of the loss that of its gradient may be


_FINE = _Scale(
    (1e-6, 1e-7, 1e-8), right=1e-5, wrong=1e-4, times_unsteady=30.0, eps=1e-14, flat=100.0
)
_COARSE = _Scale((3e-3, 1e-3), right=5e-2, wrong=0.3, times_unsteady=5.0, eps=1e-6, flat=1.0)
# The weights are moved by so much first: at zero biases, kinks lie right where they are.
_MOVE = 1e-3
_TINY = 1e-300


@dataclass(frozen=True)
class _Mismatch:
    what: str
    gap: float


class WrongDerivativeError(ValueError):
    """A derivative that torch computes is not the function's own."""


@dataclass(frozen=True)
class Slope:
    """What a curvature differentiates.

    Args:
        name: For messages.
        twice: Whether it is differentiated twice.
        fn: A scalar function of parameters, batch and constants.
    """

    name: str
    twice: bool
    fn: Callable[[Params, Any, dict[str, Tensor]], Tensor]


def check_derivatives(objective: Objective, batch: Any, slope: Slope) -> None:
    r"""Compare derivatives on a few samples with differences, in float64 where that is at hand.

    With a random direction v, :math:`g^T v` is compared with :math:`(f(w + h v) - f(w - h v)) / 2h`
    and, of what is differentiated twice, :math:`H v` with :math:`(g(w + h v) - g(w - h v)) / 2h`,
    at weights near the model's own. Where differences over two steps h disagree with each other,
    nothing is decided.

    Args:
        objective: What is measured.
        batch: The samples.
        slope: The function f.

    Raises:
        WrongDerivativeError: If they differ, and custom autograd functions or operators are
            involved, which are named.

    Warns:
        UserWarning: If they differ, and only torch's own functions are involved: then something on
            the way is detached, and counts as a constant.

    Cost: usually three gradients and a product on the samples.
    """
    for dtype in dict.fromkeys((torch.float64, objective.dtype)):
        # The weights, the moved ones, a direction, a gradient's graph and its results.
        if dtype != objective.dtype and 8 * objective.layout.numel * 8 > objective.budget:
            continue
        try:
            point = _Point(objective, batch, slope, dtype)
            mismatch = _find_mismatch(point)
            custom = point.custom_functions() if mismatch else []
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no float64 on this device, in this kernel, in captured data
            logger.info("no comparison with differences in %s: %s", dtype, error)
            continue
        if mismatch is not None:
            _complain(mismatch, slope.name, custom)
        return


def random_sum(outputs: Tensor) -> Tensor:
    """Return a combination of outputs with fixed random coefficients: its slope tests theirs."""
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device="cpu")
    return (outputs * draw.to(outputs)).sum()


def _complain(mismatch: _Mismatch, name: str, custom: list[str]) -> None:
    off = f"{mismatch.what} of {name} differs by {mismatch.gap:.1%} from differences"
    if custom:
        raise WrongDerivativeError(
            f"{off}: the backward of one of {custom} is not its derivative (it keeps an "
            "intermediate on ctx or detaches one, so that a dependence is hidden, or its formula "
            "is wrong); compute the backward from ctx.saved_tensors of the inputs, with torch's "
            "differentiable functions, or pass check=False to go on at your own risk"
        )
    warnings.warn(
        f"{off}: something between the parameters and {name} is detached, rounded, run under "
        "no_grad, or has its gradient changed by a hook; it counts as a constant in what is "
        "measured. check=False silences this",
        stacklevel=7,
    )


class _Point:
    """The function, its gradient and its product with a vector, in one dtype."""

    def __init__(self, objective: Objective, batch: Any, slope: Slope, dtype: torch.dtype) -> None:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        self.params = tuple(map(cast, objective.parameters()))
        self.twice, self.dtype = slope.twice, dtype
        self._objective = objective
        self._constants = {name: cast(t) for name, t in objective.constants.items()}
        batch = map_tensors(batch, lambda t: cast(t.detach()).requires_grad_(t.requires_grad))
        self._fn = lambda params: slope.fn(params, batch, self._constants)

    def gradient(self, params: Params) -> tuple[Tensor, Params]:
        value, slopes, _, _ = self.derivatives(params, None)
        return value, slopes

    def derivatives(
        self, params: Params, direction: Params | None
    ) -> tuple[Tensor, Params, Params, float]:
        """Return the value, the gradient, and the Hessian's product with a direction, of one graph.

        The product is empty where no direction is given. The last is the epsilon of the narrowest
        dtype that the function casts to on its way.
        """
        leaves = tuple(p.detach().requires_grad_() for p in params)
        twice = direction is not None

        def grad(outputs: Any, weights: Any, **options: Any) -> Params:
            options |= {"allow_unused": True, "materialize_grads": True}
            return torch.autograd.grad(outputs, leaves, weights, **options)

        def differentiate() -> tuple[Tensor, Params, Params, float]:
            with _Narrowing() as narrowing:
                value = self._fn(leaves)
            eps = max(narrowing.eps, *(torch.finfo(t.dtype).eps for t in (value, *params)))
            zeros = tuple(map(torch.zeros_like, params))
            if not value.requires_grad:
                return value.detach(), zeros, zeros if twice else (), eps
            slopes = grad(value, None, create_graph=twice)
            if twice:
                require_whole(slopes)
            curved = [
                (s, d) for s, d in zip(slopes, direction or (), strict=False) if s.requires_grad
            ]
            products = zeros if twice else ()
            if curved:
                products = grad(*map(list, zip(*curved, strict=True)))
            return value.detach(), tuple(dense(s.detach()) for s in slopes), products, eps

        return self._run(differentiate, leaves)

    def custom_functions(self) -> list[str]:
        """Name the functions in the graph whose backward is not torch's own."""
        leaves = tuple(p.detach().requires_grad_() for p in self.params)
        value = self._run(lambda: self._fn(leaves), leaves)
        waiting = [value.grad_fn]
        seen = set(waiting)
        names: set[str] = set()
        while waiting:
            node = waiting.pop()
            if node is None:
                continue
            name = type(node).__name__
            if isinstance(node, BackwardCFunction) or name.startswith("GeneratedBackwardFor"):
                names.add(name.removeprefix("GeneratedBackwardFor_").removesuffix("Backward"))
            new = {n for n, _ in node.next_functions if n is not None} - seen
            seen |= new
            waiting += new
        return sorted(names)

    def _run(self, fn: Callable[[], Any], params: Params) -> Any:
        return self._objective.run(fn, params=params, constants=self._constants)


class _Narrowing(TorchDispatchMode):
    """Remembers the epsilon of the narrowest dtype that floating tensors are cast to.

    A model may compute parts of its own in float32 or less, whatever its inputs are.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.is_floating_point():
            self.eps = max(self.eps, torch.finfo(out.dtype).eps)
        return out


def _find_mismatch(point: _Point) -> _Mismatch | None:
    params = point.params
    generator = torch.Generator().manual_seed(0)
    moved = _moved(params, tuple(_direction(p, generator) for p in params), _MOVE)
    direction = tuple(_direction(p, generator) for p in params)
    value, slope, products, eps = point.derivatives(moved, direction if point.twice else None)
    if not bool(value.isfinite()):  # out of the function's domain: nothing is decided
        return None
    exact = _dot(slope, direction)
    for scale in (s for s in (_FINE, _COARSE) if eps <= s.eps):
        before: tuple[float, Params] | None = None
        for step in scale.steps:
            up, up_slope = point.gradient(_moved(moved, direction, step))
            down, down_slope = point.gradient(_moved(moved, direction, -step))
            difference = float(up - down) / (2 * step)
            differences = tuple(
                (u - d) / (2 * step) for u, d in zip(up_slope, down_slope, strict=True)
            )
            # A random direction is nearly at right angles to a gradient: its length is the scale.
            # A loss of nearly 0 is a difference of numbers of size 1.
            noise = 100 * eps * max(float(up.abs() + down.abs()), 1.0) / step
            size = max(abs(exact), 1e-2 * _norm(slope) * _norm(direction), noise, _TINY)
            gap = abs(difference - exact) / size
            product_gap = (
                _relative(differences, products, scale.flat * noise) if point.twice else 0.0
            )
            if max(gap, product_gap) <= scale.right:
                return None
            if before is not None:
                unsteady = (abs(difference - before[0]) + noise) / size
                if gap > max(scale.wrong, scale.times_unsteady * unsteady):
                    return _Mismatch("the gradient", gap)
                unsteady = (
                    _relative(differences, before[1], scale.flat * noise) if point.twice else 0.0
                )
                if product_gap > max(scale.wrong, scale.times_unsteady * unsteady):
                    return _Mismatch("the second derivative", product_gap)
            before = difference, differences
    logger.info("differences of the gradient are unsteady here, and decide nothing")
    return None


def _moved(params: Params, direction: Params, step: float) -> Params:
    return tuple(p + step * d for p, d in zip(params, direction, strict=True))


def _direction(p: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random tensor with entries of the size of p's; of 1 where p is zero."""
    size = p.square().mean().sqrt() if p.numel() else p.new_ones(())
    draw = torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu")
    return draw.to(p) * torch.where(size > 0, size, torch.ones_like(size))


def _dot(a: Params, b: Params) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def _norm(a: Params) -> float:
    return _dot(a, a) ** 0.5


def _relative(a: Params, b: Params, least: float) -> float:
    gap = _norm(tuple(x - y for x, y in zip(a, b, strict=True)))
    return gap / max(_norm(a), _norm(b), least, _TINY)
