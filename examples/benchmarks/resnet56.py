"""ResNet-56 for CIFAR-10, its checkpoint, its images, and a recipe to train it further.

Import it; it is not run.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from models import CIFARResNet
from samples import augmented, balanced, cifar10_part, digits
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the checkpoint was trained with
CHECKPOINT = "resnet56_cifar10_akamaster.pt"
FOLDER, TRAINING = "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]
BATCH = 250
Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Images:
    """Normalised images (n, 3, h, w) and labels, and the dense network."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    model: CIFARResNet

    def batches(self, count: int, seed: int) -> Batches:
        """Return the scores' images, other ones for each seed, and never those held out."""
        order = torch.randperm(len(self.x) // 2, generator=torch.Generator().manual_seed(seed))
        return self.cut(order[:count])

    def held_out(self, count: int) -> Batches:
        """Return images of the other half, to choose settings by."""
        return self.cut(torch.arange(len(self.x) // 2, len(self.x))[:count])

    def cut(self, chosen: Tensor) -> Batches:
        return list(zip(self.x[chosen].split(BATCH), self.y[chosen].split(BATCH), strict=True))


def cifar10(data: Path, checkpoints: Path) -> Images:
    for path in [*(data / FOLDER / name for name in [*TRAINING, "test_batch"])]:
        if not path.is_file():
            raise SystemExit(f"--data: found no {path.name} in {FOLDER}; unpack CIFAR-10 there")
    if not (checkpoints / CHECKPOINT).is_file():
        raise SystemExit(f"--checkpoints: found no {CHECKPOINT} there")
    middle, scale = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)

    def normalised(names: list[str]) -> tuple[Tensor, Tensor]:
        parts = [cifar10_part(data / FOLDER / name) for name in names]
        return (torch.cat([x for x, _ in parts]) - middle) / scale, torch.cat([y for _, y in parts])

    model = CIFARResNet(9, padded=True)
    model.load_state_dict(torch.load(checkpoints / CHECKPOINT, weights_only=True))
    return Images(*normalised(TRAINING), *normalised(["test_batch"]), model.eval())


def synthetic() -> Images:
    """Return scikit-learn's digits in three channels, and a small network trained on them."""
    torch.manual_seed(0)
    _, x, y = digits(None, 16, 3)
    x = (x - x.mean()) / x.std()
    test = balanced(y, 500)
    images = Images(x[~test], y[~test], x[test], y[test], CIFARResNet(1, (8, 16, 32), padded=True))
    tune(images.model, images, epochs=6, rate=0.1, shifted=False)
    return images


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Return the accuracy in per cent, in eval mode."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        right = sum(
            int((model(x.to(memory_format=torch.channels_last)).argmax(1) == y).sum())
            for x, y in batches
        )
    return 100 * right / sum(len(y) for _, y in batches)


def tune(
    model: nn.Module,
    images: Images,
    epochs: float,
    rate: float = 0.01,
    *,
    shifted: bool = True,
    part: Tensor | None = None,
) -> None:
    """Train a model in place, the same images, order and shifts for every model.

    SGD with momentum, batches of 128; the rate falls in a straight line to zero.

    Args:
        model: The model.
        images: The training images.
        epochs: How often each is seen; of a fraction, some are not.
        rate: The first step's.
        shifted: Whether images are shifted and flipped at random.
        part: Indices of the images; default all.
    """
    generator = torch.Generator().manual_seed(0)
    model.to(memory_format=torch.channels_last)  # a fifth faster, on CPUs
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    part = torch.arange(len(images.x)) if part is None else part
    orders = [part[torch.randperm(len(part), generator=generator)] for _ in range(ceil(epochs))]
    steps = [chosen for order in orders for chosen in order.split(128)]
    steps = steps[: round(epochs / ceil(epochs) * len(steps))]
    model.train()
    for step, chosen in enumerate(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / len(steps))
        x = augmented(images.x[chosen], generator) if shifted else images.x[chosen]
        optimizer.zero_grad()
        F.cross_entropy(model(x), images.y[chosen]).backward()
        optimizer.step()
    model.eval()
