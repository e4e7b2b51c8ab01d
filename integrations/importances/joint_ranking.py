"""Joint ranking of channels by greedy backward elimination."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_ROUNDS = 4096


def backward_elimination(
    rows_RC: Tensor, extra_C: Tensor, costs_C: Tensor, group_C: Tensor
) -> Tensor:
    r"""Rank channels by greedy removal under their joint quadratic form.

    Removing the set S raises the loss by :math:`\frac12 \|\sum_{c \in S} a_c\|^2 + \sum_{c \in S}
    e_c`, with a_c the columns of `rows_RC`. The next channel removed has the smallest rise per
    cost, given the removed ones. Channels whose effects cancel go together, and of two equivalent
    ones one stays. The last channel of each group is kept until all others are removed.

    Args:
        rows_RC: Shape (R, C), float64.
        extra_C: Shape (C,), float64: e, the separable contribution of each channel.
        costs_C: Shape (C,), positive.
        group_C: Shape (C,), int64: the group of each channel.

    Returns:
        Shape (C,), float64: each channel's rank in the order of removal, 0 first.

    Cost: C passes over R C values; beyond 4096 channels, several are removed at a time.
    """
    count = rows_RC.shape[1]
    alone_C = 0.5 * rows_RC.square().sum(0) + extra_C
    gone_R = rows_RC.new_zeros(rows_RC.shape[0])
    is_left = torch.ones(count, dtype=torch.bool, device=rows_RC.device)
    left_G = torch.bincount(group_C)
    place_C = torch.full_like(alone_C, float(count))
    at_once, place = -(-count // _MOST_ROUNDS), 0
    while place < count:
        rise_C = (alone_C + gone_R @ rows_RC) / costs_C
        may_go = is_left & (left_G[group_C] > 1)
        if not bool(may_go.any()):
            may_go = is_left  # only the last channel of each group remains
        rise_C = rise_C.masked_fill(~may_go, float("inf"))
        for c in rise_C.argsort()[:at_once].tolist():
            group = group_C[c]
            if not may_go[c] or (left_G[group] == 1 and bool((left_G > 1).any())):
                break
            place_C[c], is_left[c] = place, False
            left_G[group] -= 1
            gone_R += rows_RC[:, c]
            place += 1
    return place_C
