"""Comparison of the loss of a batch with the weighted mean of its parts' losses, and their sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Finding:
    """How the loss of a batch compares with that of its parts.

    Args:
        holds: Whether the loss is the weighted mean of the parts'.
        is_sum: Whether it is their sum instead.
        loss: The loss of the whole.
        mean: The weighted mean.
    """

    holds: bool
    is_sum: bool = False
    loss: float = 0.0
    mean: float = 0.0


def judge(
    loss: float, weights: list[float], losses: list[float], dtype: torch.dtype
) -> Finding | None:
    """Compare a loss with the weighted mean of its parts', and with their sum."""
    kept = [(w, x) for w, x in zip(weights, losses, strict=True) if w > 0]
    total = sum(w for w, _ in kept)
    if not total > 0:
        return None
    mean, added = sum(w * x for w, x in kept) / total, sum(x for _, x in kept)
    size = max(abs(loss), *(abs(x) for _, x in kept))
    if not math.isfinite(size):  # refused elsewhere, in its own words
        return None
    if all(x == loss for _, x in kept):  # whatever it is a mean of, or nothing was cut
        return None
    # Far above the rounding of a sum over samples, far below what another weight makes. A part of
    # a model may compute in float32, whatever it is given.
    tolerance = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5 * size
    if abs(loss - mean) <= tolerance:
        return Finding(True)
    return Finding(False, abs(loss - added) <= tolerance, loss, mean)
