"""Networks and data of gpu.py on a device, at full size or at a tenth.

Import it; it is not run. `make_problem` gives, in eval mode:

    name       full size                                         with --small
    mlp        the dense net of `models`, trained, 500 images    its smaller one, 200 images
    3c3d       3c3d, trained, 500 images                         the smallest conv net, 100 images
    resnet18   ResNet-18 at 224 px, 1000 classes, random         a quarter of its width at 64 px
    gpt2       GPT-2 small at random weights, random tokens      2 layers of width 128

The weights of the last two, and their data, are random: the time of a product does not depend on
them. Builders of networks are those of `models` and of examples/reproduce.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "reproduce"))

import torch
from gpt2 import GPT2
from models import RECIPES, Problem, TokenLoss, build
from resnet18 import resnet18
from samples import balanced, colour_images
from torch import Tensor, nn

NAMES = ("mlp", "3c3d", "resnet18", "gpt2")
RANDOM = "random numbers"

RECIPES["3c3d, 500 images"] = replace(RECIPES["3c3d"], samples=500)


def make_problem(name: str, options: argparse.Namespace) -> Problem:
    """Build one of `NAMES` on the device of the options, all samples in one batch."""
    small, device = options.quick, options.device
    torch.manual_seed(0)
    if name in ("mlp", "3c3d"):
        recipe = {"mlp": "small mlp", "3c3d": "small convnet"}[name] if small else name
        recipe = "3c3d, 500 images" if recipe == "3c3d" else recipe
        return replace(on_device(build(recipe, options.data), device), name=name)
    if name == "resnet18":
        model, (x, y) = imagenet_resnet18(options), random_images(options, 4 if small else 64)
        return Problem(name, model.eval(), nn.CrossEntropyLoss(), [(x, y)], RANDOM)
    model, batch = gpt2(options), random_tokens(options, 2 if small else 4)
    return Problem(name, model.eval(), TokenLoss(), [batch], RANDOM)


def on_device(problem: Problem, device: str) -> Problem:
    """Return the problem with its model, moved, and its data on a device."""
    batches = [(x.to(device), y.to(device)) for x, y in problem.batches]
    return replace(problem, model=problem.model.to(device), batches=batches)


def imagenet_resnet18(options: argparse.Namespace) -> nn.Module:
    """Return ResNet-18 for ImageNet at random weights, its batch norms having seen some images."""
    model = resnet18(224, 1000, width_of(options)).to(options.device)
    x, _ = random_images(options, 8)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model


def width_of(options: argparse.Namespace) -> int:
    return 16 if options.quick else 64


def random_images(options: argparse.Namespace, count: int) -> tuple[Tensor, Tensor]:
    """Return images (count, 3, 224, 224), 64 pixels wide with --small, and 1000 classes."""
    side = 64 if options.quick else 224
    x = torch.randn(count, 3, side, side, device=options.device)
    return x, torch.randint(1000, (count,), device=options.device)


def gpt2(options: argparse.Namespace) -> nn.Module:
    """Return GPT-2 small as it is initialised; with --small one of 0.5 million parameters."""
    if options.quick:
        model = GPT2(depth=2, heads=4, width=128, vocabulary=1024, positions=32)
    else:
        model = GPT2()
    return model.initialise_().to(options.device)


def random_tokens(options: argparse.Namespace, count: int) -> tuple[Tensor, Tensor]:
    """Return sequences of 128 tokens, 32 with --small, and what comes after each token."""
    length, vocabulary = (32, 1024) if options.quick else (128, 50257)
    tokens = torch.randint(vocabulary, (count, length + 1), device=options.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def trained_cifar_resnet18(
    options: argparse.Namespace, samples: int, batch: int, weights: Path | None
) -> Problem:
    """Return ResNet-18 for 32-pixel images after a short training, and images it has not seen.

    Args:
        options: Those of the script; `data` may hold CIFAR-10, else enlarged digits are taken.
        samples: Of the Hessian, classes balanced.
        batch: Samples in a batch of the Hessian.
        weights: A file to take the weights from, if it exists, and to leave them in if not: a
            training on a GPU does not come out the same twice.
    """
    device, steps = options.device, 5 if options.quick else 300
    torch.manual_seed(0)
    model = resnet18(32, 10, width_of(options)).to(device)
    source, x, y = colour_images(options.data)
    chosen = balanced(y, samples)
    if weights is not None and weights.is_file():
        model.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
    else:
        seen_x, seen_y = x[~chosen].to(device), y[~chosen].to(device)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            part = torch.randint(len(seen_x), (32 if options.quick else 128,), generator=generator)
            part = part.to(device)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(seen_x[part]), seen_y[part]).backward()
            optimizer.step()
        optimizer.zero_grad()
        if weights is not None:
            torch.save(model.state_dict(), weights)
    x, y = x[chosen].to(device), y[chosen].to(device)
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    return Problem("resnet18", model.eval(), nn.CrossEntropyLoss(), batches, source)
