"""Norms and largest entries of blocks of long vectors.

Blocks are row-contiguous, (b, D), one vector per row.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class Reduction(Protocol):
    """Sums and maxima over processes that each hold some rows of the (D, b) matrices."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, bit-identical on each."""

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its entrywise maximum over all processes."""

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that of the first process."""


class BlockSize:
    """Largest entry and column norms of a block, copied from the GPU when first read.

    Args:
        numbers: Shape (2 + b,), float64, any device: the least entry, the largest, and the norms.
        across: Reduction over processes, see `block_size`.
    """

    def __init__(self, numbers: Tensor, across: Reduction | None = None) -> None:
        self.numbers, self._across = numbers, across
        self._read: tuple[float, list[float]] | None = None

    @property
    def is_read(self) -> bool:
        """Whether the numbers are on the host, so that reading them does not synchronise."""
        return self._read is not None or self.numbers.device.type == "cpu"

    @property
    def largest(self) -> float:
        """The largest magnitude of an entry; inf if any is NaN."""
        return self._look()[0]

    @property
    def norms(self) -> list[float]:
        """The norms of the vectors."""
        return self._look()[1]

    def take(self, numbers: Tensor) -> None:
        """Set the numbers from a copy on the CPU that was transferred with others."""
        low, high, *norms = numbers.tolist()
        # NaN propagates to both bounds; reported as inf, since comparisons with NaN are false.
        finite = math.isfinite(low) and math.isfinite(high)
        largest = max(-low, high) if finite else math.inf
        if self._across is not None:
            both = torch.tensor([largest], dtype=torch.float64, device="cpu")
            largest = self._across.max_(both).item()
            # Each process has some entries of every vector: squares add up, norms do not.
            squares = torch.tensor(norms, dtype=torch.float64, device="cpu").square()
            norms = self._across.sum_(squares).sqrt_().tolist()
        self._read = largest, norms

    def _look(self) -> tuple[float, list[float]]:
        if self._read is None:
            self.take(self.numbers.cpu())
        assert self._read is not None
        return self._read


def block_size(W_BD: Tensor, across: Reduction | None = None) -> BlockSize:
    """Return largest entry and norms of a block of long vectors.

    Args:
        W_BD: Shape (b, D).
        across: Reduction over processes that each hold some entries of all vectors.
    """
    if W_BD.numel() == 0:
        zeros = torch.zeros(2 + len(W_BD), dtype=torch.float64, device="cpu")
        return BlockSize(zeros, across)
    bounds = torch.stack(W_BD.aminmax()).double()
    return BlockSize(torch.cat([bounds, norms_on_device(W_BD)]), across)


def column_norms(W_BD: Tensor, across: Reduction | None = None) -> Tensor:
    """Return the norms of long vectors, shape (b,), float64 on the CPU.

    Args:
        W_BD: Shape (b, D).
        across: Reduction over processes that each hold some entries of all vectors.
    """
    norms = norms_on_device(W_BD).cpu()
    return norms if across is None else across.sum_(norms.square_()).sqrt_()


def norms_on_device(W_BD: Tensor) -> Tensor:
    """Return the norms of long vectors, shape (b,), float64 on their device, unsynchronised."""
    # One at a time: a norm in another dtype than its input casts a copy of the whole input.
    rows = [torch.linalg.vector_norm(w_D, dtype=torch.float64) for w_D in W_BD]
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64, device=W_BD.device)
