"""The networks that the benchmarks measure: built, trained a little, with their Hessians' data.

Import it; it is not run. `build` gives a `Problem`, the same one every time on one machine:

    name    parameters  network                                            Hessian's data
    mlp          7,030  256-20-20-20-20-20-10, tanh                        500 images, 16x16
    convnet     72,010  2 convolutions, tanh, average pooling, 2 dense     100 images, 16x16
    3c3d       895,210  3 convolutions, ReLU, max pooling, 3 dense         64 images, 3x32x32
    resnet20   272,474  CIFAR ResNet-20, batch norm in eval mode           64 images, 3x32x32
    gpt        354,336  3 layers, 4 heads, width 96, 65 tokens             16 sequences of 64

The images are scikit-learn's digits, enlarged; with a folder of data, MNIST (in torchvision's
layout, ``MNIST/raw``) for the first two and CIFAR-10 (``cifar-10-batches-py``) for the next two,
where the folder has them. The tokens come from a random Markov chain, so that there is something to
learn. Training is SGD for the steps given in `RECIPES`, enough for a Hessian with the few large and
many small eigenvalues of both signs that trained networks have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from samples import CLASSES, VOCABULARY, Data, balanced, colour_images, digits, markov_tokens
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Problem:
    """A trained model in eval mode, its mean loss, and the batches that its Hessian is taken on."""

    name: str
    model: nn.Module
    loss_fn: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    data: str = ""  # where they come from

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def num_samples(self) -> int:
        return sum(len(x) for x, _ in self.batches)

    def gradient(self) -> tuple[Tensor, ...]:
        """Return the gradient over all batches, of one batch: the unit of cost."""
        ((inputs, targets),) = self.batches
        return torch.autograd.grad(self.loss_fn(self.model(inputs), targets), self.params)


# -- networks ---------------------------------------------------------------------------------


def mlp(*widths: int) -> nn.Sequential:
    """Return dense layers with tanh between them, on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convnet(width: int = 16, hidden: int = 128, side: int = 16) -> nn.Sequential:
    """Return a small smooth conv net on grey images: its Hessian is the same in any precision."""
    return nn.Sequential(
        nn.Conv2d(1, width, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (side // 4) ** 2, hidden),
        nn.Tanh(),
        nn.Linear(hidden, CLASSES),
    )


def three_c_three_d() -> nn.Sequential:
    """Return 3c3d on 3x32x32 images; pooling rounds sizes up, 32-28-14-12-6-6-3."""
    layers: list[nn.Module] = []
    for fan_in, fan_out, kernel, padding in [(3, 64, 5, 0), (64, 96, 3, 0), (96, 128, 3, 1)]:
        layers += [nn.Conv2d(fan_in, fan_out, kernel, padding=padding), nn.ReLU()]
        layers += [nn.MaxPool2d(3, stride=2, ceil_mode=True)]
    layers += [nn.Flatten(), nn.Linear(1152, 512), nn.ReLU()]
    layers += [nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, CLASSES)]
    return nn.Sequential(*layers)


class PaddedShortcut(nn.Module):
    """Takes every second pixel and pads the width with zeros."""

    def __init__(self, padding: int, stride: int) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride

    def forward(self, x: Tensor) -> Tensor:
        sides = (self.padding, self.padding)
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *sides))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, a projection where the width changes, or padding."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, *, padded: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if stride > 1 and padded:
            self.shortcut = nn.Sequential(PaddedShortcut((fan_out - fan_in) // 2, stride))
        elif stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet20() -> nn.Sequential:
    """Return the CIFAR ResNet-20 with projections where the width changes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    layers += [nn.ReLU()]
    for fan_in, fan_out in [(16, 16), (16, 32), (32, 64)]:
        layers += [ResidualBlock(fan_in, fan_out, fan_out // fan_in)]
        layers += [ResidualBlock(fan_out, fan_out, 1) for _ in range(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


class CIFARResNet(nn.Module):
    """CIFAR ResNet of 6 n + 2 layers, n blocks of each width: 3 for ResNet-20, 9 for ResNet-56."""

    def __init__(
        self, blocks: int = 3, widths: tuple[int, ...] = (16, 32, 64), *, padded: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        fan_in = widths[0]
        for i, width in enumerate(widths, start=1):
            layers = []
            for j in range(blocks):
                stride = 2 if i > 1 and j == 0 else 1
                layers.append(ResidualBlock(fan_in, width, stride, padded=padded))
                fan_in = width
            self.add_module(f"layer{i}", nn.Sequential(*layers))
        self.linear = nn.Linear(fan_in, CLASSES)

    def blocks(self) -> list[ResidualBlock]:
        return [m for m in self.modules() if isinstance(m, ResidualBlock)]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A character-level transformer; logits (batch, length, vocabulary)."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class TokenLoss(nn.CrossEntropyLoss):
    """Cross-entropy, mean over all tokens."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits.flatten(0, 1), targets.flatten())


# -- problems ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a problem is made: network, data, and SGD's steps, batch and rate."""

    model: Callable[[], nn.Module]
    data: Callable[[Path | None], Data]
    num_params: int
    steps: int
    batch: int
    lr: float
    samples: int
    momentum: float = 0.0


RECIPES = {
    "mlp": Recipe(
        model=lambda: mlp(256, 20, 20, 20, 20, 20, CLASSES),
        data=lambda folder: digits(folder, 16, 1),
        num_params=7_030,
        steps=300,
        batch=500,
        lr=0.3,
        samples=500,
    ),
    "convnet": Recipe(
        model=convnet,
        data=lambda folder: digits(folder, 16, 1),
        num_params=72_010,
        steps=300,
        batch=64,
        lr=0.1,
        samples=100,
    ),
    "3c3d": Recipe(
        model=three_c_three_d,
        data=colour_images,
        num_params=895_210,
        steps=200,
        batch=64,
        lr=0.02,
        momentum=0.9,
        samples=64,
    ),
    "resnet20": Recipe(
        model=resnet20,
        data=colour_images,
        num_params=272_474,
        steps=100,
        batch=64,
        lr=0.05,
        momentum=0.9,
        samples=64,
    ),
    "gpt": Recipe(
        model=GPT,
        data=lambda folder: markov_tokens(1000),
        num_params=354_336,
        steps=200,
        batch=32,
        lr=0.1,
        momentum=0.9,
        samples=16,
    ),
    # For --quick alone.
    "small mlp": Recipe(
        model=lambda: mlp(64, 12, 12, CLASSES),
        data=lambda folder: digits(folder, 8, 1),
        num_params=1_066,
        steps=200,
        batch=500,
        lr=0.3,
        samples=200,
    ),
    "small convnet": Recipe(
        model=lambda: convnet(width=4, hidden=16, side=8),
        data=lambda folder: digits(folder, 8, 1),
        num_params=1_098,
        steps=200,
        batch=64,
        lr=0.1,
        samples=100,
    ),
}


def build(name: str, folder: Path | None = None, steps: int | None = None) -> Problem:
    """Build and train a network of `RECIPES`, and choose its Hessian's data.

    Args:
        name: A key of `RECIPES`.
        folder: Where MNIST or CIFAR-10 lie; None for the digits that come with scikit-learn.
        steps: Steps of training, instead of the recipe's.

    Returns:
        The problem: images or tokens that the training did not see, classes balanced.
    """
    recipe = RECIPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = recipe.model()
        source, inputs, targets = recipe.data(folder)
        if targets.ndim == 1:
            chosen, loss_fn = balanced(targets, recipe.samples), nn.CrossEntropyLoss()
        else:
            chosen, loss_fn = torch.arange(len(inputs)) < recipe.samples, TokenLoss()
        seen_inputs, seen_targets = inputs[~chosen], targets[~chosen]
        optimizer = torch.optim.SGD(model.parameters(), recipe.lr, momentum=recipe.momentum)
        for _ in range(recipe.steps if steps is None else steps):
            part = torch.randint(len(seen_inputs), (recipe.batch,))
            optimizer.zero_grad()
            loss_fn(model(seen_inputs[part]), seen_targets[part]).backward()
            optimizer.step()
        optimizer.zero_grad()
    problem = Problem(name, model.eval(), loss_fn, [(inputs[chosen], targets[chosen])], source)
    if (problem.size, problem.num_samples) != (recipe.num_params, recipe.samples):
        raise AssertionError(
            f"expected {recipe.num_params} parameters and {recipe.samples} samples for {name!r}, "
            f"got {problem.size} and {problem.num_samples}"
        )
    return problem
