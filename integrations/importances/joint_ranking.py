"""The order in which channels go when each is chosen in view of those that went before it."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_ROUNDS = 4096


def backward_elimination(
    rows_RC: Tensor, extra_C: Tensor, costs_C: Tensor, group_C: Tensor
) -> Tensor:
    r"""Rank channels by greedy removal under their joint quadratic form.

    Removing the set S raises the loss by :math:`\frac12 \|\sum_{c \in S} a_c\|^2 + \sum_{c \in S}
    e_c`, with a_c the columns of `rows_RC`. Next to go is the channel with the smallest rise for
    its cost, given those that are gone. Channels whose effects cancel go together, and of two that
    do the same, one stays. The last channel of each group is kept until all others are gone.

    Args:
        rows_RC: Shape (R, C), float64.
        extra_C: Shape (C,), float64: e, what each channel adds by itself.
        costs_C: Shape (C,), positive.
        group_C: Shape (C,), int64: the group that each channel is in.

    Returns:
        Shape (C,), float64: each channel's place in the order, 0 for the first to go.

    Cost: C passes over R C values; beyond 4096 channels, several go at a time.
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
            may_go = is_left  # one of each group: what is left of the order
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
