"""Physics-informed networks for three equations with known solutions: convection, reaction, wave.

Import it; it is not run. The problems are those of Rathore, Lei, Frangella, Lu and Udell,
"Challenges in training PINNs: a loss landscape perspective" (ICML 2024), appendix A:

    convection   u_t + beta u_x = 0,    u(x, 0) = sin x,            periodic in x, [0, 2 pi]
    reaction     u_t = rho u (1 - u),   u(x, 0) a Gaussian at pi,   periodic in x, [0, 2 pi]
    wave         u_tt = 4 u_xx,         u(x, 0) = sin pi x + sin(beta pi x) / 2, u_t(x, 0) = 0,
                                        u = 0 at the ends, [0, 1]

all for t in [0, 1], in the paper with beta = 40, rho = 5 and beta = 5. The loss is the sum of the
mean squares of the residual, of the boundary conditions and of the initial conditions. The net has
three hidden layers of tanh; weights are Xavier's normal, biases zero. Residual points are a random
part of the inner points of a grid of 257 x 101; initial and boundary points are those of the grid,
all of them or every few.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GRID_X, GRID_T = 257, 101


@dataclass(frozen=True)
class Derivatives:
    """u and its derivatives at some points, each (N,); second ones only where asked for."""

    u: Tensor
    x: Tensor
    t: Tensor
    xx: Tensor | None = None
    tt: Tensor | None = None


@dataclass(frozen=True)
class Equation:
    """A problem: the residual, what holds at the borders and at t = 0, and the solution.

    Args:
        length: x lies in [0, length].
        order: The highest derivative.
        residual: Of the equation, from u and its derivatives.
        exact: The solution, from x and t.
        periodic: Whether u is the same at both ends; else it is zero there.
        at_rest: Whether u_t(x, 0) = 0 is asked for too.
    """

    length: float
    order: int
    residual: Callable[[Derivatives], Tensor]
    exact: Callable[[Tensor, Tensor], Tensor]
    periodic: bool = True
    at_rest: bool = False


def convection(beta: float) -> Equation:
    return Equation(
        2 * math.pi, 1, lambda d: d.t + beta * d.x, lambda x, t: torch.sin(x - beta * t)
    )


def reaction(rho: float) -> Equation:
    def exact(x: Tensor, t: Tensor) -> Tensor:
        start = torch.exp(-((x - math.pi) ** 2) / (2 * (math.pi / 4) ** 2))
        grown = start * torch.exp(rho * t)
        return grown / (grown + 1 - start)

    return Equation(2 * math.pi, 1, lambda d: d.t - rho * d.u * (1 - d.u), exact)


def wave(beta: float) -> Equation:
    def exact(x: Tensor, t: Tensor) -> Tensor:
        first = torch.sin(math.pi * x) * torch.cos(2 * math.pi * t)
        return first + torch.sin(beta * math.pi * x) * torch.cos(2 * beta * math.pi * t) / 2

    return Equation(1.0, 2, lambda d: d.tt - 4 * d.xx, exact, periodic=False, at_rest=True)


EQUATIONS = {"convection": convection, "reaction": reaction, "wave": wave}
PUBLISHED = {"convection": 40.0, "reaction": 5.0, "wave": 5.0}  # their coefficients


def network(width: int, seed: int, dtype: torch.dtype) -> nn.Sequential:
    """Return a net from (x, t) to u with three hidden layers."""
    torch.manual_seed(seed)
    sizes = [2, width, width, width, 1]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [nn.Tanh(), linear] if i else [linear]
    return nn.Sequential(*layers).to(dtype)


class Pinn:
    """A network with the loss of an equation on fixed points, and its error.

    Args:
        name: Of the equation.
        coefficient: beta or rho.
        width: Of the hidden layers.
        points: The number of residual points, at most 25,500.
        every: Of the grid's initial and boundary points, one in so many.
        seed: Of weights and residual points.
        dtype: Of everything.
        device: Where.
    """

    def __init__(
        self,
        name: str,
        coefficient: float,
        width: int,
        points: int,
        every: int,
        seed: int,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> None:
        self.equation = EQUATIONS[name](coefficient)
        self.device = torch.device(device)
        self.model = network(width, seed, dtype).to(device)
        to = {"dtype": dtype, "device": device}
        x = torch.linspace(0, self.equation.length, GRID_X, **to)
        t = torch.linspace(0, 1, GRID_T, **to)
        inner = torch.cartesian_prod(x[1:-1], t[1:])
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(inner), generator=generator, device="cpu")
        self.inner = inner[chosen[:points].to(device)]
        x0, t0 = x[::every], t[::every]
        start = torch.stack([x0, torch.zeros_like(x0)], dim=1)
        left = torch.stack([torch.zeros_like(t0), t0], dim=1)
        right = torch.stack([torch.full_like(t0, self.equation.length), t0], dim=1)
        # All in one pass: for small nets twice as fast as one after the other.
        self._points = torch.cat([inner[chosen[:points].to(device)], start, left, right])
        self._sizes = [points, len(start), len(left), len(right)]
        self._start_values = self.equation.exact(start[:, 0], start[:, 1])
        self._test = torch.cartesian_prod(x[::2], t)
        self._test_values = self.equation.exact(self._test[:, 0], self._test[:, 1])

    def residuals(self) -> list[Tensor]:
        """Return what is squared and summed, each part over the root of its number of points."""
        e = self.equation
        inner, start, left, right = differentiate(self.model, self._points, e.order, self._sizes)
        parts = [e.residual(inner), start.u - self._start_values]
        parts += [left.u - right.u] if e.periodic else [left.u, right.u]
        if e.at_rest:
            parts.append(start.t)
        return [part / math.sqrt(len(part)) for part in parts]

    def loss(self) -> Tensor:
        """Return the loss, a scalar with its graph."""
        return torch.stack([part.square().sum() for part in self.residuals()]).sum()

    @torch.no_grad()
    def error(self) -> float:
        """Return the relative L2 error on a grid of 129 x 101 points."""
        gap = self.model(self._test)[:, 0] - self._test_values
        return float(torch.linalg.vector_norm(gap) / torch.linalg.vector_norm(self._test_values))


def differentiate(
    model: nn.Module, points: Tensor, order: int, sizes: list[int]
) -> list[Derivatives]:
    """Return a net's output and its derivatives by x and t for parts of the points."""
    x, t = (column.clone().requires_grad_() for column in points.unbind(1))
    u = model(torch.stack([x, t], dim=1))[:, 0]
    found = [u, *torch.autograd.grad(u.sum(), (x, t), create_graph=True)]
    if order == 2:
        for slope, along in ((found[1], x), (found[2], t)):
            found += torch.autograd.grad(slope.sum(), along, create_graph=True)
    return [Derivatives(*parts) for parts in zip(*(f.split(sizes) for f in found), strict=True)]
