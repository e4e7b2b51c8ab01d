"""The images and tokens that the benchmarks' networks are trained and measured on.

Import it; it is not run. Every function returns a name, inputs and targets:

    digits         scikit-learn's 1,797 digits, or MNIST's 10,000 test images from ``MNIST/raw``
    colour_images  the same digits, grey in three channels, or CIFAR-10's 10,000 test images from
                   ``cifar-10-batches-py``
    markov_tokens  sequences of a random Markov chain, so that there is something to learn
"""

from __future__ import annotations

import gzip
import io
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = 10
VOCABULARY = 65


Data = tuple[str, Tensor, Tensor]  # where it comes from, inputs, targets


def digits(folder: Path | None, side: int, channels: int) -> Data:
    """Return images (n, channels, side, side) in [0, 1] and labels: MNIST, or bundled digits."""
    name = "digits"
    raw = None if folder is None else folder / "MNIST" / "raw"
    if raw is not None and raw.is_dir():
        pixels = read_idx(raw / "t10k-images-idx3-ubyte", 16)
        labels = read_idx(raw / "t10k-labels-idx1-ubyte", 8)
        images = torch.tensor(pixels.reshape(-1, 1, 28, 28) / 255, dtype=torch.float32)
        name = "MNIST"
    else:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise SystemExit(
                "the digits need scikit-learn: pip install 'hesscurv[bench]'"
            ) from error
        bundle = load_digits()
        images = torch.tensor(bundle.images / 16, dtype=torch.float32).unsqueeze(1)
        labels = bundle.target
    images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    images = images.expand(-1, channels, -1, -1).contiguous()
    return name, images, torch.tensor(labels.astype(np.int64))


def cifar10(folder: Path) -> Data:
    """Return CIFAR-10's test images, normalised, and labels."""
    images, labels = cifar10_part(folder / "cifar-10-batches-py" / "test_batch")
    return "CIFAR-10", (images - 0.5) / 0.25, labels


def cifar10_part(path: Path) -> tuple[Tensor, Tensor]:
    """Return one of CIFAR-10's files: images (n, 3, 32, 32) in [0, 1], and labels."""

    class ArraysOnly(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if (module.split(".")[0], name) in {
                ("numpy", "_reconstruct"),
                ("numpy", "ndarray"),
                ("numpy", "dtype"),
                ("_codecs", "encode"),
            }:
                module = module.replace("numpy.core", "numpy._core")
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"expected arrays and plain values, got {module}.{name}")

    batch = ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    images = torch.tensor(batch[b"data"].reshape(-1, 3, 32, 32), dtype=torch.float32) / 255
    return images, torch.tensor(batch[b"labels"])


def colour_images(folder: Path | None) -> Data:
    if folder is not None and (folder / "cifar-10-batches-py").is_dir():
        return cifar10(folder)
    return digits(None, 32, 3)


def markov_tokens(count: int, length: int = 64) -> Data:
    """Return sequences of a random Markov chain, and the same shifted by one."""
    transitions = torch.softmax(3 * torch.randn(VOCABULARY, VOCABULARY), dim=1)
    tokens = torch.randint(VOCABULARY, (count, length + 1))
    for t in range(length):
        tokens[:, t + 1] = torch.multinomial(transitions[tokens[:, t]], 1).squeeze(1)
    return "Markov chain", tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def mnist_training(folder: Path) -> tuple[str, Tensor]:
    """Return MNIST's training images (n, 784) in [0, 1], from ``MNIST/raw``."""
    pixels = read_idx(folder / "MNIST" / "raw" / "train-images-idx3-ubyte", 16)
    return "MNIST", torch.tensor(pixels.reshape(-1, 784) / 255, dtype=torch.float32)


def shakespeare(path: Path, length: int = 64) -> Data:
    """Return a text's characters, numbered, in sequences, and the same shifted by one."""
    text = path.read_text(encoding="utf-8")
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    if len(numbers) > VOCABULARY:
        raise SystemExit(f"expected a text of at most {VOCABULARY} characters, got {len(numbers)}")
    tokens = torch.tensor([numbers[character] for character in text])
    count = (len(tokens) - 1) // length
    inputs = tokens[: count * length].view(count, length)
    return path.stem, inputs, tokens[1 : count * length + 1].view(count, length)


def balanced(labels: Tensor, count: int) -> Tensor:
    """Return a mask of `count` samples, the first ones of every class in equal numbers."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(CLASSES):
        chosen[(labels == c).nonzero()[: -(-(count - c) // CLASSES), 0]] = True
    return chosen


def augmented(
    x: Tensor, generator: torch.Generator | None = None, most: int = 4, border: float = 0.0
) -> Tensor:
    """Shift every image by up to `most` pixels, bordered by one colour, and flip half of them."""
    n, channels, height, width = x.shape
    flip = torch.rand(n, generator=generator) < 0.5
    x = F.pad(torch.where(flip[:, None, None, None], x.flip(3), x), (most,) * 4, value=border)
    down, right = torch.randint(2 * most + 1, (2, n), generator=generator)
    rows, columns = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
    return x[
        torch.arange(n)[:, None, None, None],
        torch.arange(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def read_idx(path: Path, header: int) -> np.ndarray:
    """Return the bytes of one of MNIST's files, gzipped or not, after its header."""
    zipped = path.with_name(path.name + ".gz")
    content = gzip.decompress(zipped.read_bytes()) if zipped.exists() else path.read_bytes()
    return np.frombuffer(content, np.uint8, offset=header)
