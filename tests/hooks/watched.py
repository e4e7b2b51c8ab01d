"""A small training run to watch, and all of what it leaves behind, for the tests of hooks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import hesscurv

TASK = hesscurv.supervised(nn.CrossEntropyLoss())


class Clock:
    """Seconds that pass when a test says so, and a little at every look."""

    def __init__(self, per_look: float = 0.0) -> None:
        self.now, self.per_look = 0.0, per_look

    def __call__(self) -> float:
        self.now += self.per_look
        return self.now


class Kept:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, Any]]] = []

    def log(self, record: dict[str, Any], step: int) -> None:
        self.records.append((step, record))


def net(*, noisy: bool = False, seed: int = 1) -> nn.Sequential:
    """59 parameters in float64, smooth; `noisy` ones have batch norm and dropout, 67 parameters."""
    torch.manual_seed(seed)
    norm: list[nn.Module] = [nn.BatchNorm1d(4), nn.Dropout(0.3)] if noisy else []
    return nn.Sequential(
        nn.Linear(5, 4), *norm, nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()


def data(count: int = 4, size: int = 10, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, size, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (count, size), generator=generator)
    return list(zip(inputs, targets, strict=True))


def train(
    model: nn.Module,
    steps: int,
    after: Callable[[int], Any] = lambda step: None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    autocast: bool = False,
    first: int = 0,
) -> list[float]:
    """Train with momentum, call `after` each step, and return the losses."""
    dtype = next(model.parameters()).dtype
    batches = [(inputs.to(dtype), targets) for inputs, targets in data()]
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = TASK(model, batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        after(step)
        losses.append(loss.item())
    return losses


def left_behind(model: nn.Module) -> dict[str, Any]:
    """All that a measurement might change: values, gradients, flags, random and global states."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "grad mode": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same, tensors and arrays bit by bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return bool(numpy.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (a != a and b != b)


def dense_hessian(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The Hessian and the gradient of the mean loss in eval mode, by plain double backward."""
    params, training = list(model.parameters()), model.training
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = nn.functional.cross_entropy(model.eval()(inputs), targets)
    model.train(training)
    slope = flat(torch.autograd.grad(loss, params, create_graph=True))
    rows = [flat(torch.autograd.grad(entry, params, retain_graph=True)) for entry in slope]
    return torch.stack(rows), slope.detach()


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
