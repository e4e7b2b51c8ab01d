"""Norms and largest entries of blocks of long vectors.

Blocks are row-contiguous, (b, D), one vector in each row.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class Reduction(Protocol):
    """Sums and maxima over the processes that each hold some rows of the (D, b) matrices."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, the same bits on each."""

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its entrywise maximum over all processes."""

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by the first process' own."""


class BlockSize:
    """How large a block's entries and vectors are; a GPU is waited for at the first question.

    Args:
        numbers: Shape (2 + b,), float64, any device: the least entry, the largest, and the norms.
        across: How they sum up over processes, see `block_size`.
    """

    def __init__(self, numbers: Tensor, across: Reduction | None = None) -> None:
        self.numbers, self._across = numbers, across
        self._read: tuple[float, list[float]] | None = None

    @property
    def is_read(self) -> bool:
        """Whether the numbers are on the host, so that a question waits for nothing."""
        return self._read is not None or self.numbers.device.type == "cpu"

    @property
    def largest(self) -> float:
        """The largest magnitude of an entry; inf where one is NaN."""
        return self._look()[0]

    @property
    def norms(self) -> list[float]:
        """The norms of the vectors."""
        return self._look()[1]

    def take(self, numbers: Tensor) -> None:
        """Take the numbers from a copy on the CPU, which came with others."""
        low, high, *norms = numbers.tolist()
        finite = math.isfinite(low) and math.isfinite(high)
        largest = max(-low, high) if finite else math.inf
        if self._across is not None:
            both = torch.tensor([largest], dtype=torch.float64, device="cpu")
            largest = self._across.max_(both).item()
            squares = torch.tensor(norms, dtype=torch.float64, device="cpu").square()
            norms = self._across.sum_(squares).sqrt_().tolist()
        self._read = largest, norms

    def _look(self) -> tuple[float, list[float]]:
        if self._read is None:
            self.take(self.numbers.cpu())
        assert self._read is not None
        return self._read


def block_size(W_bD: Tensor, across: Reduction | None = None) -> BlockSize:
    """Return how large a block of long vectors is.

    Args:
        W_bD: Shape (b, D).
        across: Where every process holds some entries of all vectors: how they sum up.
    """
    if W_bD.numel() == 0:
        zeros = torch.zeros(2 + len(W_bD), dtype=torch.float64, device="cpu")
        return BlockSize(zeros, across)
    bounds = torch.stack(W_bD.aminmax()).double()
    return BlockSize(torch.cat([bounds, norms_on_device(W_bD)]), across)


def column_norms(W_bD: Tensor, across: Reduction | None = None) -> Tensor:
    """Return the norms of long vectors, shape (b,), float64 on the CPU.

    Args:
        W_bD: Shape (b, D).
        across: Where every process holds some entries of all vectors: how they sum up.
    """
    norms = norms_on_device(W_bD).cpu()
    return norms if across is None else across.sum_(norms.square_()).sqrt_()


def norms_on_device(W_bD: Tensor) -> Tensor:
    """Return the norms of long vectors, shape (b,), float64 where the vectors are: no wait."""
    # One at a time: in another dtype than the vectors', a norm takes a copy of what it is given.
    rows = [torch.linalg.vector_norm(w_D, dtype=torch.float64) for w_D in W_bD]
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64, device=W_bD.device)
