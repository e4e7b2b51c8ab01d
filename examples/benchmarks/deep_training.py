"""Deep nets in training: the problems of `deep_nets.py`, and a run against the clock.

Import it; it is not run. Every net is trained a little by SGD with momentum first, the same weights
for all contenders, so that what is compared is training and not the first steps from a random
start. A run then has a budget of processor seconds, without looking at the loss, on a part of the
training data that stays the same.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import GPT, CIFARResNet, TokenLoss, mlp, three_c_three_d
from samples import (
    Data,
    cifar10_part,
    colour_images,
    digits,
    markov_tokens,
    mnist_training,
    shakespeare,
)
from torch import Tensor, nn

import hesscurv
from hesscurv.optim import PreconditionedOptimizer

LENGTH = 32  # characters in a sequence

Factory = Callable[[nn.Module], torch.optim.Optimizer]


class PixelLoss(nn.Module):
    """Cross-entropy of pixels in [0, 1] given logits, summed over an image, mean over images."""

    def forward(self, logits: Tensor, images: Tensor) -> Tensor:
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, images.flatten(1), reduction="none"
        )
        return losses.sum(1).mean()


@dataclass(frozen=True)
class Recipe:
    """A net, its data and loss, the batch of a step, and how it is trained before the start.

    `warm_up_lr` is the rate of SGD before the start, `lr` the middle of the rates tried, with
    `adaptive_lr` for Adam and its kin. `samples` are those that curvature is measured on, `seconds`
    the budget of a run, `looked_at` the training samples that the loss is looked at on.
    """

    model: Callable[[], nn.Module]
    data: Callable[[Path | None], Data]
    loss: Callable[[], nn.Module]
    batch: int
    warm_up: int
    warm_up_lr: float
    lr: float
    adaptive_lr: float
    samples: int
    seconds: float
    looked_at: int


def images(folder: Path | None) -> Data:
    """Return the first 20,000 of CIFAR-10's training images, or digits."""
    if folder is None or not (folder / "cifar-10-batches-py").is_dir():
        return colour_images(None)
    parts = [cifar10_part(folder / "cifar-10-batches-py" / f"data_batch_{i}") for i in (1, 2)]
    x, y = (torch.cat(several) for several in zip(*parts, strict=True))
    return "CIFAR-10", (x - 0.5) / 0.25, y


def small_images(folder: Path | None) -> Data:
    """Return the same at half their side: a net of 20 layers takes many steps of these."""
    name, x, y = images(folder)
    return f"{name}, 16x16", nn.functional.avg_pool2d(x, 2), y


def grey(folder: Path | None) -> Data:
    """Return MNIST's training images, or digits enlarged, as inputs and as targets."""
    if folder is None or not (folder / "MNIST" / "raw").is_dir():
        name, x, _ = digits(None, 28, 1)
    else:
        name, x = mnist_training(folder)
    x = x.flatten(1)
    return name, x, x


def text(folder: Path | None) -> Data:
    """Return tinyshakespeare in sequences of 32 characters, or a Markov chain."""
    path = None if folder is None else folder / "text" / "tinyshakespeare.txt"
    if path is None or not path.exists():
        return markov_tokens(4000, LENGTH)
    return shakespeare(path, LENGTH)


def autoencoder() -> nn.Module:
    """Return the classical deep autoencoder, in Xavier's weights: torch's stay on a plateau."""
    model = mlp(784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


RECIPES = {
    "3c3d": Recipe(
        model=three_c_three_d,
        data=images,
        loss=nn.CrossEntropyLoss,
        batch=128,
        warm_up=200,
        warm_up_lr=0.01,
        lr=0.04,
        adaptive_lr=1e-3,
        samples=64,
        seconds=80,
        looked_at=512,
    ),
    "resnet20": Recipe(
        model=CIFARResNet,
        data=small_images,
        loss=nn.CrossEntropyLoss,
        batch=256,
        warm_up=100,
        warm_up_lr=0.1,
        lr=0.2,
        adaptive_lr=4e-3,
        samples=64,
        seconds=60,
        looked_at=512,
    ),
    "gpt": Recipe(
        model=lambda: GPT(width=64, depth=2, length=LENGTH),
        data=text,
        loss=TokenLoss,
        batch=256,
        warm_up=100,
        warm_up_lr=0.2,
        lr=0.4,
        adaptive_lr=8e-3,
        samples=64,
        seconds=40,
        looked_at=512,
    ),
    "autoencoder": Recipe(
        model=autoencoder,
        data=grey,
        loss=PixelLoss,
        batch=250,
        warm_up=150,  # the plateau at the mean image, 207, ends after some 120
        warm_up_lr=2e-3,
        lr=2e-3,
        adaptive_lr=1e-3,
        samples=64,
        seconds=40,
        looked_at=1000,
    ),
}


@dataclass
class Training:
    """A net at the common start, and its data."""

    name: str
    source: str
    recipe: Recipe
    model: nn.Module
    x: Tensor
    y: Tensor
    task: Any = field(init=False)

    def __post_init__(self) -> None:
        self.task = hesscurv.supervised(self.recipe.loss())

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of all samples but those of the curvature, epoch after epoch."""
        generator = torch.Generator().manual_seed(seed)
        count, batch = len(self.x) - self.recipe.samples, self.recipe.batch
        while True:
            order = torch.randperm(count, generator=generator) + self.recipe.samples
            for index in order.split(batch)[: count // batch]:
                yield self.x[index], self.y[index]

    @property
    def curvature_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The samples in front, which no step is taken with."""
        count = self.recipe.samples
        return [(self.x[:count], self.y[:count])]

    def look(self, model: nn.Module) -> float:
        """Return the loss on samples that are trained with, always the same; nothing changes.

        Batch norms take the statistics of these samples, as in training.
        """
        first, last = self.recipe.samples, self.recipe.samples + self.recipe.looked_at
        buffers = [(b, b.clone()) for b in model.buffers()]
        with torch.no_grad():
            loss = float(self.task(model, (self.x[first:last], self.y[first:last])))
            for buffer, before in buffers:
                buffer.copy_(before)
        return loss


def start(name: str, folder: Path | None, warm_up: int | None = None) -> Training:
    """Return a net after its warm-up, the same one every time on one machine."""
    recipe = RECIPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = recipe.model()
        source, x, y = recipe.data(folder)
        order = torch.randperm(len(x))
        out = Training(name, source, recipe, model, x[order], y[order])
        optimizer = torch.optim.SGD(model.parameters(), recipe.warm_up_lr, momentum=0.9)
        batches = out.batches(1)
        for _ in range(recipe.warm_up if warm_up is None else warm_up):
            optimizer.zero_grad()
            out.task(model, next(batches)).backward()
            optimizer.step()
        optimizer.zero_grad()
    return out


@dataclass
class Curve:
    """Losses seen in a run, with the processor seconds and steps before each."""

    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    report: str = ""

    def smooth(self) -> list[float]:
        """Return means of up to three losses in a row: of a look and the two before."""
        return [
            sum(self.losses[max(0, i - 2) : i + 1]) / len(self.losses[max(0, i - 2) : i + 1])
            for i in range(len(self.losses))
        ]

    @property
    def final(self) -> float:
        """The mean of the last three losses; infinite if they diverged."""
        last = self.smooth()[-1]
        return last if math.isfinite(last) else math.inf

    def loss_after(self, steps: int) -> float:
        """Return the smoothed loss after so many steps, interpolated; the last one beyond them."""
        return float(np.interp(steps, self.steps, self.smooth()))

    def time_to(self, loss: float) -> tuple[float, float]:
        """Return seconds and steps to a loss, interpolated; infinite if it was not reached."""
        values = self.smooth()
        for i, value in enumerate(values):
            if value <= loss:
                if i == 0:
                    return self.seconds[0], self.steps[0]
                part = (values[i - 1] - loss) / (values[i - 1] - value)
                return tuple(
                    series[i - 1] + part * (series[i] - series[i - 1])
                    for series in (self.seconds, self.steps)
                )
        return math.inf, math.inf


def train(training: Training, make: Factory, seconds: float, seed: int, looks: int) -> Curve:
    """Train for so many processor seconds, and look at the loss afterwards.

    The rate falls in a straight line, with the seconds, from the optimizer's own to zero.
    The weights are kept at `looks` times, all alike, so that looking takes nothing of an
    optimizer's time. A run ends early where the loss of a batch has trebled.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(training.model)
    batches = training.batches(100 + seed)
    curve = Curve([0.0], [0])
    kept = [copy.deepcopy(model.state_dict())]
    steps, most, begun = 0, 3 * training.look(model), time.process_time()
    optimizer = make(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    while True:
        left = max(0.0, 1 - (time.process_time() - begun) / seconds)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * left
        optimizer.zero_grad()
        loss = training.task(model, next(batches))
        loss.backward()
        optimizer.step()
        steps += 1
        diverged = not float(loss.detach()) < most
        spent = time.process_time() - begun
        if diverged or spent >= len(kept) * seconds / looks:
            curve.seconds.append(spent)
            curve.steps.append(steps)
            kept.append(copy.deepcopy(model.state_dict()))
        if diverged or spent >= seconds:
            break
    if isinstance(optimizer, PreconditionedOptimizer):
        curve.report = str(optimizer.report())
    for state in kept:
        model.load_state_dict(state)
        curve.losses.append(training.look(model))
    if diverged:
        curve.losses[-1] = math.inf
    return curve
