"""Comparison of a batch's loss with the weighted mean and the sum of its parts' losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Finding:
    """Result of comparing the loss of a batch with those of its parts.

    Args:
        holds: Whether the loss is the weighted mean of the parts' losses.
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
    """Compare a loss with the weighted mean and the sum of its parts' losses."""
    kept = [(w, x) for w, x in zip(weights, losses, strict=True) if w > 0]
    total = sum(w for w, _ in kept)
    if not total > 0:
        return None
    mean, added = sum(w * x for w, x in kept) / total, sum(x for _, x in kept)
    size = max(abs(loss), *(abs(x) for _, x in kept))
    if not math.isfinite(size):  # refused elsewhere, with a better message
        return None
    if all(x == loss for _, x in kept):  # equal losses agree with every mean
        return None
    # Far above the rounding of a sum over samples, far below the effect of a wrong weight. At least
    # that of float32, since part of a model may compute in it regardless of its inputs.
    tolerance = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5 * size
    if abs(loss - mean) <= tolerance:
        return Finding(True)
    return Finding(False, abs(loss - added) <= tolerance, loss, mean)
