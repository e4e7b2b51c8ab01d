"""Losses to minimise by Newton steps, and closures of the kinds that people write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from planted import planted
from torch import Tensor, nn

from hesscurv.optim.newton.newton_cg import NewtonCG

DIM = 12
Loss = Callable[[], Tensor]


def quadratic(
    eigenvalues: Sequence[float], dim: int = DIM, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[list[nn.Parameter], Tensor, Loss]:
    """Parameters of two shapes, a matrix H with these eigenvalues, and w^T H w / 2 + b^T w."""
    H = planted(eigenvalues, dim, seed).matrix.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    b = H @ torch.randn(dim, generator=generator, dtype=torch.float64).to(dtype)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in [(2, 3), (dim - 6,)]
    ]

    def loss() -> Tensor:
        w = flat(params)
        return w @ H @ w / 2 + b @ w

    return params, H, loss


def flat(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params])


def gradient_of(loss: Loss, params: Sequence[nn.Parameter]) -> Tensor:
    return flat(torch.autograd.grad(loss(), params))


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def regression(model: nn.Module, seed: int = 0) -> Loss:
    """The mean squared error on some points that stay."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64).to(dtype)
    y = x.prod(dim=1, keepdim=True)
    return lambda: (model(x) - y).square().mean()


def closure_of(optimizer: torch.optim.Optimizer, loss: Loss) -> Loss:
    """The closure that the documentation of torch.optim.LBFGS shows."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def take_steps(optimizer: NewtonCG, loss: Loss, count: int) -> list[float]:
    """The losses before each of some steps, and the last."""
    losses = [float(optimizer.step(closure_of(optimizer, loss)).detach()) for _ in range(count)]
    return [*losses, float(loss().detach())]


def oscillator(seed: int, width: int = 10, points: int = 40) -> tuple[nn.Sequential, Loss]:
    """A network for u'' = -u, u(0) = 0, u'(0) = 1 on [0, 2 pi], with derivatives in its loss."""
    model, residuals = oscillator_residuals(seed, width, points)
    return model, lambda: torch.stack([part.square().sum() for part in residuals()]).sum()


def oscillator_residuals(
    seed: int, width: int = 10, points: int = 40
) -> tuple[nn.Sequential, Callable[[], list[Tensor]]]:
    """The same, as what is squared and summed."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    ).double()
    inner = torch.linspace(0, 2 * math.pi, points, dtype=torch.float64)[:, None]

    def residuals() -> list[Tensor]:
        x = inner.clone().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return [(bend + u) / math.sqrt(points), u[0], slope[0] - 1]

    return model, residuals
