"""Norms and largest entries of blocks of long vectors.

Blocks are row-contiguous, (b, D), one vector in each row.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

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


class BlockSize(NamedTuple):
    """How large a block's entries and vectors are."""

    largest: float  # magnitude of an entry; inf where one is NaN
    norms: list[float]


def block_size(W_bD: Tensor, across: Reduction | None = None) -> BlockSize:
    """Return how large a block of long vectors is; a GPU is waited for once.

    Args:
        W_bD: Shape (b, D).
        across: Where every process holds some entries of all vectors: how they sum up.
    """
    largest, norms_b = 0.0, torch.zeros(len(W_bD), dtype=torch.float64, device="cpu")
    if W_bD.numel() > 0:
        bounds = torch.stack(W_bD.aminmax()).double()
        numbers = torch.cat([bounds, _norms(W_bD)]).cpu()
        low, high = numbers[:2].tolist()
        norms_b = numbers[2:]
        finite = math.isfinite(low) and math.isfinite(high)
        largest = max(-low, high) if finite else math.inf
    if across is not None:
        largest = across.max_(torch.tensor([largest], dtype=torch.float64, device="cpu")).item()
        norms_b = across.sum_(norms_b.square()).sqrt_()
    return BlockSize(largest, norms_b.tolist())


def column_norms(W_bD: Tensor, across: Reduction | None = None) -> Tensor:
    """Return the norms of long vectors, shape (b,), float64 on the CPU.

    Args:
        W_bD: Shape (b, D).
        across: Where every process holds some entries of all vectors: how they sum up.
    """
    norms = _norms(W_bD).cpu()
    return norms if across is None else across.sum_(norms.square_()).sqrt_()


def _norms(W_bD: Tensor) -> Tensor:
    # One at a time: in another dtype than the vectors', a norm takes a copy of what it is given.
    rows = [torch.linalg.vector_norm(w_D, dtype=torch.float64) for w_D in W_bD]
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64, device=W_bD.device)
