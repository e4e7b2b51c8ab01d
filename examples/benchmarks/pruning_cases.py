"""CHITA's two pruning cases: WoodFisher's ResNet-20 and MLP, their checkpoints and images.

Import it; it is not run. Without the files there is a small network of either kind on digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samples import balanced, cifar10_part, digits, read_idx
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 250


class Block(nn.Module):
    """A residual block with a convolution in the shortcut where the width changes."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.downsample = None
        if stride != 1 or fan_in != fan_out:
            conv = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet20(nn.Module):
    """WoodFisher's ResNet-20 for CIFAR-10."""

    def __init__(self, blocks: int = 3, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        fan_in = widths[0]
        for i, width in enumerate(widths, start=1):
            strides = [2 if i > 1 and j == 0 else 1 for j in range(blocks)]
            layers = []
            for stride in strides:
                layers.append(Block(fan_in, width, stride))
                fan_in = width
            self.add_module(f"layer{i}", nn.Sequential(*layers))
        self.fc = nn.Linear(fan_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


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
        return "downsample" not in name

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
    model = ResNet20() if name == "resnet20" else MLP()
    model.load_state_dict(torch.load(path, weights_only=True))
    if name == "mlp":
        parts = []
        for kind in ("train", "t10k"):
            pixels = read_idx(data / "MNIST" / "raw" / f"{kind}-images-idx3-ubyte", 16)
            labels = read_idx(data / "MNIST" / "raw" / f"{kind}-labels-idx1-ubyte", 8)
            x = torch.tensor(pixels.reshape(-1, 1, 28, 28) / np.float32(255))
            parts += [(x - 0.1307) / 0.3081, torch.tensor(labels.astype(np.int64))]
        return Case(name, model.eval(), *parts)
    folder = data / "cifar-10-batches-py"
    if not folder.is_dir():
        raise SystemExit("--data: found no cifar-10-batches-py there; unpack CIFAR-10 there")
    train = [cifar10_part(folder / f"data_batch_{i}") for i in range(1, 6)]
    x, y = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    x_test, y_test = cifar10_part(folder / "test_batch")
    return Case(name, model.eval(), (x - 0.5) / 0.5, y, (x_test - 0.5) / 0.5, y_test)


def small(name: str) -> Case:
    """Return a small network trained on scikit-learn's digits."""
    torch.manual_seed(0)
    _, x, y = digits(None, 16 if name == "resnet20" else 8, 3 if name == "resnet20" else 1)
    x = (x - x.mean()) / x.std()
    test = balanced(y, 500)
    model = ResNet20(1, (8, 16, 32)) if name == "resnet20" else MLP(64)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for index in torch.randperm(int((~test).sum())).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[~test][index]), y[~test][index]).backward()
            optimizer.step()
    parts = (x[~test], y[~test], x[test], y[test])
    return Case(name, model.eval(), *parts, calibration=200, held_out=300)
