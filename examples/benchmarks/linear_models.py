"""Ill-conditioned linear models: mini-batch SGD against the same SGD with its top space damped.

Import it; it is not run. Ridge and logistic regression on features of a planted covariance, with
eigenvalues that fall geometrically from 1 to 1/kappa at the 100th and stay there; and ridge
regression on random features of MNIST (or of scikit-learn's digits). What is measured is the time
to the training loss that SGD, at its best rate, has after 40 epochs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from samples import digits, read_idx
from torch import Tensor, nn
from torch.nn import functional as F

from hesscurv.optim import PreconditionedOptimizer

TOP = 100  # kappa is lambda_1 / lambda_100
EPOCHS, CHECKS = 40, 20  # looks at the loss in an epoch
BATCH = 256  # as SketchySGD's authors have it


@dataclass
class LinearProblem:
    """Samples, a loss of outputs and targets, and a ridge."""

    name: str
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    outputs: int
    batch: int
    ridge: float

    def model(self) -> nn.Linear:
        model = nn.Linear(self.x.shape[1], self.outputs, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def objective(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = self.loss(model(x), y)
        return loss + 0.5 * self.ridge * sum(p.square().sum() for p in model.parameters())

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=generator)
        for index in order.split(self.batch):
            yield self.x[index], self.y[index]

    def total(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float(self.objective(model, (self.x, self.y)))


def planted(kind: str, kappa: float, samples: int, features: int, seed: int = 0) -> LinearProblem:
    """Return ridge or logistic regression whose covariance has lambda_1 / lambda_100 = kappa."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(features, dtype=torch.float64).clamp(max=TOP - 1) / (TOP - 1)
    scale = kappa ** (-steps / 2)
    turned, _ = torch.linalg.qr(
        torch.randn(features, features, generator=generator, dtype=torch.float64)
    )
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64) * scale @ turned.T
    # Every direction has a share of the target, whatever its curvature.
    target = torch.randn(features, generator=generator, dtype=torch.float64) / scale
    signal = x @ (turned @ target) / math.sqrt(features)
    noise = torch.randn(samples, generator=generator, dtype=torch.float64)
    if kind == "ridge":
        y, loss = (signal + 0.1 * noise)[:, None].float(), _half_squares
    else:
        chance = torch.sigmoid(2 * signal)
        y = (torch.rand(samples, generator=generator, dtype=torch.float64) < chance).float()[
            :, None
        ]
        loss = F.binary_cross_entropy_with_logits
    return LinearProblem(f"{kind}, {kappa:.0e}", x.float(), y, loss, 1, BATCH, 1e-2 / kappa)


def random_features(data: Path | None, features: int, samples: int) -> LinearProblem:
    """Return ridge regression, odd digits against even ones, on random ReLU features."""
    if data is None:
        source, images, y = digits(None, 8, 1)
    else:
        raw, source = data / "MNIST" / "raw", "MNIST"
        pixels = read_idx(raw / "train-images-idx3-ubyte", 16).reshape(-1, 784)
        images = torch.tensor(pixels / 255, dtype=torch.float32)
        y = torch.tensor(read_idx(raw / "train-labels-idx1-ubyte", 8).astype(int))
    images = images[:samples].flatten(1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(images.shape[1], features, generator=generator)
    x = F.relu((images - images.mean()) / images.std() @ weights / math.sqrt(images.shape[1]))
    x = x / math.sqrt(features)  # the kernel, and the rates that suit it, depend on no width then
    target = 2.0 * (y[:samples] % 2)[:, None] - 1  # odd or even: one output, no repeated spectrum
    return LinearProblem(f"ridge, features of {source}", x, target, _half_squares, 1, BATCH, 1e-6)


def _half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().mean()


@dataclass
class Curve:
    """Losses seen along a run, with the seconds and epochs before each."""

    seconds: list[float]
    epochs: list[float]
    losses: list[float]
    report: str = ""
    spectrum: tuple[float, ...] = ()

    def time_to(self, loss: float) -> tuple[float, float]:
        """Return seconds and epochs to a loss; infinite if it was not reached."""
        for s, e, value in zip(self.seconds, self.epochs, self.losses, strict=True):
            if value <= loss:
                return s, e
        return math.inf, math.inf


def train(
    problem: LinearProblem,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    epochs: float,
    stop_at: float = -math.inf,
    seconds: float = math.inf,
    looks: int = CHECKS,
) -> Curve:
    """Train by mini-batches; looking at the loss costs no time on the clock.

    Seconds are the process's own, of all its threads: other processes do not count.

    Args:
        problem: What to train.
        make: Returns the optimizer of a model.
        epochs: When to end,
        stop_at: or at this loss,
        seconds: or after so many.
        looks: At the loss, in an epoch.
    """
    model = problem.model()
    generator = torch.Generator().manual_seed(1)
    path = Curve([], [], [])
    per_epoch = math.ceil(len(problem.x) / problem.batch)
    every, steps, spent = max(1, per_epoch // looks), 0, 0.0
    start = time.process_time()
    optimizer = make(model)
    while steps < epochs * per_epoch:
        for batch in problem.batches(generator):
            optimizer.zero_grad()
            problem.objective(model, batch).backward()
            optimizer.step()
            steps += 1
            if steps % every == 0:
                spent += time.process_time() - start
                loss = problem.total(model)
                path.seconds.append(spent)
                path.epochs.append(steps / per_epoch)
                path.losses.append(loss)
                done = loss <= stop_at or steps >= epochs * per_epoch
                if not math.isfinite(loss) or done or spent > seconds:
                    if isinstance(optimizer, PreconditionedOptimizer):
                        path.report = str(optimizer.report())
                        path.spectrum = tuple(optimizer.report().eigenvalues)
                    return path
                start = time.process_time()
    return path


def sgd(rate: float, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), rate, **options)


def ours(
    problem: LinearProblem, rate: float, **options: Any
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return SGD with its top eigenspace damped; curvature from samples of its own draw."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        order = torch.randperm(len(problem.x), generator=torch.Generator().manual_seed(7))
        count = 2 * (options.get("samples") or 512)
        batch = (problem.x[order[:count]], problem.y[order[:count]])
        return PreconditionedOptimizer(
            torch.optim.SGD(model.parameters(), rate), model, problem.objective, [batch], **options
        )

    return make
