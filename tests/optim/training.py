"""Small problems to train on, and oracles in dense linear algebra, for the tests of optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from planted import planted
from support.bundles import bundled
from torch import Tensor, nn

import hesscurv
from hesscurv.optim import CurvatureWarning, PreconditionedOptimizer, PreconditionerOptions

# Spectra with a gap after every pair, so that each eigenspace is well defined.
SPECTRA = {
    "positive": [100.0, 40.0, 16.0, 6.0, 2.0, 1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05],
    "indefinite": [-110.0, 50.0, -20.0, 7.0, -3.0, 1.0, 0.7, -0.5, 0.3, 0.2, -0.1, 0.05],
    "rank 3": [80.0, -20.0, 5.0],
}
DIM = 12
EXACT = 1e-11  # the eigensolver's tolerance where formulas are compared


class Quadratic(nn.Module):
    """Parameters of several shapes, 12 entries in all, whose loss is a quadratic form."""

    def __init__(self, shapes: Sequence[tuple[int, ...]] = ((2, 3), (4,), (2, 1)), seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.parts = nn.ParameterList(
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
        )

    def flat(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.parts])


def quadratic_loss(model: Quadratic, matrices: Tensor) -> Tensor:
    """The mean over samples, each a matrix A, of w^T A w / 2."""
    w = model.flat()
    return 0.5 * w @ matrices.mean(0) @ w


def quadratic_data(*spectra: Sequence[float], seed: int = 0) -> list[Tensor]:
    """A batch of one sample for each spectrum."""
    return [planted(s, DIM, seed + i).matrix[None] for i, s in enumerate(spectra)]


def dense_preconditioner(H: Tensor, rank: int, damping: float | None = None) -> Tensor:
    """P = I + U (S - I) U^T by its formula, of a matrix whose rank is at least `rank`."""
    values, vectors = torch.linalg.eigh(H)
    order = values.abs().argsort(descending=True)
    magnitudes, U = values[order].abs(), vectors[:, order[:rank]]
    left, magnitudes = float(magnitudes[rank]), magnitudes[:rank]
    least = 0.1 * float(magnitudes[-1])
    mu = least if damping is None else damping
    if left < 1e-9 * float(magnitudes[0]):  # H has no other pairs
        left, mu = 0.0, max(mu, least)
    S = (left + mu) / (magnitudes + mu)
    return torch.eye(len(H), dtype=H.dtype) + (U * (S - 1)) @ U.mT


def set_gradients(model: nn.Module, flat: Tensor) -> None:
    for p, part in zip(model.parameters(), split_like(model, flat), strict=True):
        p.grad = part.clone()


def set_weights(model: nn.Module, flat: Tensor) -> None:
    with torch.no_grad():
        for p, part in zip(model.parameters(), split_like(model, flat), strict=True):
            p.copy_(part)


def split_like(model: nn.Module, flat: Tensor) -> list[Tensor]:
    params = list(model.parameters())
    parts = flat.split([p.numel() for p in params])
    return [part.view(p.shape) for part, p in zip(parts, params, strict=True)]


def weights(model: nn.Module) -> Tensor:
    """All parameters, as one vector of their own memory."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


# -- a net on data ----------------------------------------------------------------------------

TASK = hesscurv.supervised(nn.MSELoss())


def net(dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Sequential:
    """A net whose first eigenvalue is ten times the second: what is hidden has a mean."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.Linear(6, 1)).to(dtype)


def data(count: int = 4, size: int = 8, dtype: torch.dtype = torch.float64, seed: int = 2):
    """Batches of a regression."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 0.7, 0.5, 0.3, 0.2], dtype=torch.float64)
    inputs = [
        torch.randn(size, 5, generator=generator, dtype=torch.float64) * scale for _ in range(count)
    ]
    return [(x.to(dtype), (0.5 * x[:, :1] + x[:, 1:2] ** 2).to(dtype)) for x in inputs]


def precondition(
    base: torch.optim.Optimizer, model: nn.Module, task: Any = TASK, batches: Any = None, **options
) -> PreconditionedOptimizer:
    """Wrap a base, with few pairs and a fixed interval unless told."""
    options = {"rank": 3, "refresh_every": 3} | options
    given = data() if batches is None else batches
    return PreconditionedOptimizer(
        base, model, task, given, **bundled(PreconditionerOptions, options)
    )


def sgd(model: nn.Module, batches: Any = None, **options: Any) -> PreconditionedOptimizer:
    """SGD with momentum, preconditioned."""
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return precondition(base, model, TASK, batches, **options)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    first: int = 0,
    after: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Train on the batches in turn, from the one of step `first` on; return the weights."""
    batches = data(dtype=next(model.parameters()).dtype)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        TASK(model, batches[step % len(batches)]).backward()
        optimizer.step()
        after(step)
    return weights(model)


def quietly(fn: Callable[[], Any]) -> Any:
    """Call a function that may warn of curvature."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        return fn()
