"""CHITA's two pruning cases: WoodFisher's ResNet-20 and MLP, their checkpoints and images.

Import it; it is not run. Without the files there is a small network of either kind on digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import CIFARResNet
from samples import balanced, cifar10_part, digits, read_idx
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 250


class MLP(nn.Module):
    """WoodFisher's MLP for MNIST, without biases."""

    def __init__(self, inputs: int = 784) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


@dataclass
class Case:
    """A dense network, its data, and the training images split by use."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    calibration: int = 2000
    held_out: int = 5000

    def cut(self, index: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x[index].split(BATCH), self.y[index].split(BATCH), strict=True))

    def split(self, seed: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Return training images by use: held_out, calibration, gradients."""
        fixed = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(1234))
        held, rest = fixed[: self.held_out], fixed[self.held_out :]
        order = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        return {
            "held_out": self.cut(held),
            "calibration": self.cut(order[: self.calibration]),
            "gradients": self.cut(order[self.calibration :]),
        }

    def selected(self, name: str, _: Tensor) -> bool:
        return "shortcut" not in name

    def accuracy(self, model: nn.Module, batches: Any = None) -> float:
        """Return accuracy in per cent, on the test set by default."""
        if batches is None:
            batches = zip(self.x_test.split(500), self.y_test.split(500), strict=True)
        right = count = 0
        with torch.no_grad():
            for x, y in batches:
                right += int((model(x).argmax(1) == y).sum())
                count += len(y)
        return 100 * right / count


def load(name: str, data: Path | None, checkpoints: Path | None, *, quick: bool = False) -> Case:
    """Return a case from its files, or with `quick` a small one without any."""
    if quick or data is None or checkpoints is None:
        return small(name)
    files = {
        "resnet20": "resnet20_cifar10_woodfisher.pt",
        "mlp": "mlp_784_40_20_10_mnist_woodfisher.pt",
    }
    path = checkpoints / files[name]
    if not path.is_file():
        raise SystemExit(f"--checkpoints: found no {path.name} there")
    if name == "resnet20":
        return Case(name, load_resnet20(path), *cifar10(data))
    model = MLP()
    model.load_state_dict(torch.load(path, weights_only=True))
    parts = []
    for kind in ("train", "t10k"):
        pixels = read_idx(data / "MNIST" / "raw" / f"{kind}-images-idx3-ubyte", 16)
        labels = read_idx(data / "MNIST" / "raw" / f"{kind}-labels-idx1-ubyte", 8)
        x = torch.tensor(pixels.reshape(-1, 1, 28, 28) / np.float32(255))
        parts += [(x - 0.1307) / 0.3081, torch.tensor(labels.astype(np.int64))]
    return Case(name, model.eval(), *parts)


def load_resnet20(path: Path) -> CIFARResNet:
    """Return WoodFisher's ResNet-20 for CIFAR-10, in eval mode, from its checkpoint."""
    model, renamed = CIFARResNet(3), {}
    for name, value in torch.load(path, weights_only=True).items():
        own = name.replace("downsample", "shortcut").replace("fc.", "linear.")
        renamed[own] = value
    model.load_state_dict(renamed)
    return model.eval()


def cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return CIFAR-10 as the checkpoint has it: images and labels to train on, and to test on."""
    folder = folder / "cifar-10-batches-py"
    if not folder.is_dir():
        raise SystemExit("--data: found no cifar-10-batches-py there; unpack CIFAR-10 there")
    train = [cifar10_part(folder / f"data_batch_{i}") for i in range(1, 6)]
    x, y = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    x_test, y_test = cifar10_part(folder / "test_batch")
    return (x - 0.5) / 0.5, y, (x_test - 0.5) / 0.5, y_test


def small(name: str) -> Case:
    """Return a small network trained on scikit-learn's digits."""
    torch.manual_seed(0)
    _, x, y = digits(None, 16 if name == "resnet20" else 8, 3 if name == "resnet20" else 1)
    x = (x - x.mean()) / x.std()
    test = balanced(y, 500)
    model = CIFARResNet(1, (8, 16, 32)) if name == "resnet20" else MLP(64)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for index in torch.randperm(int((~test).sum())).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[~test][index]), y[~test][index]).backward()
            optimizer.step()
    parts = (x[~test], y[~test], x[test], y[test])
    return Case(name, model.eval(), *parts, calibration=200, held_out=300)
