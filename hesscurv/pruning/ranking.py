"""Ranking by importance scores: validation of scores and amounts, selection of the lowest."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from hesscurv.metrics.masks import top_k_mask


def lowest(scores: Tensor, amount: float, what: str) -> Tensor:
    """Return a bool mask of the lowest scores, exactly as many as `amount` says.

    Ties prune the last entries. `what` names the entries in errors.
    """
    total = scores.shape[0]
    # Rounded as in torch.nn.utils.prune, so that both prune the same number.
    count = amount if isinstance(amount, int) else round(amount * total)
    if count > total:
        raise ValueError(
            f"expected to prune at most the {total} {what} that are left, got amount={amount}"
        )
    if count in (0, total):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    return ~top_k_mask(scores, total - count)


def check_amount(amount: Any) -> float:
    """Return an amount as a plain int of at least 0 or a float in [0, 1], or raise."""
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise TypeError(
            f"expected amount as an int (a number) or a float (a fraction), got {amount!r}"
        )
    amount = int(amount) if isinstance(amount, numbers.Integral) else float(amount)
    if not (amount >= 0 if isinstance(amount, int) else 0 <= amount <= 1):
        raise ValueError(
            f"expected amount as an int of at least 0 or a float in [0, 1], got {amount!r}"
        )
    return amount


def check_int(value: Any, what: str) -> int:
    """Return an integer as a plain int, or raise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected {what} as an int, got {value!r}")
    return int(value)


def as_scores(scores: Any, parameter: Tensor, where: str) -> Tensor:
    """Return validated scores of a parameter, on its device; `where` names it in errors."""
    if scores is None:
        raise TypeError(
            f"expected importance_scores for {where}, got none; compute them, e.g. with "
            "hesscurv.pruning.saliency"
        )
    check_scores(scores, f"the importance scores for {where}")
    if scores.shape != parameter.shape:
        raise ValueError(
            f"expected importance scores of shape {tuple(parameter.shape)} for {where}, got "
            f"{tuple(scores.shape)}"
        )
    return scores.detach().to(parameter.device)


def check_scores(scores: Any, what: str) -> None:
    """Raise unless scores are an integer or floating tensor without NaN, of any shape."""
    if not isinstance(scores, Tensor) or scores.dtype == torch.bool or scores.is_complex():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"expected {what} as an integer or floating tensor, got {got}")
    if bad := int(scores.isnan().sum()):
        raise ValueError(
            f"expected {what} without NaN, got {bad} NaN of {scores.numel()}; use inf for entries "
            "that must be kept and -inf for those that must go"
        )
