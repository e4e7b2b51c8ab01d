"""Pruning on one rank, with a broadcast of masks and weights to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed import Communicator
from hesscurv.distributed.sharded import is_sharded
from hesscurv.operators.summed_operator import device_of
from hesscurv.pruning import apply_masks_, masks_of, pruned_weights, refresh_
from hesscurv.pruning.weights import as_dense_name


def prune_on_first_rank(model: nn.Module, prune: Callable[[], Any]) -> Any:
    """Prune a model on the first rank, by its batches, and broadcast the result.

    In a single process that is ``prune()``. Otherwise the masks and parameters of the first rank
    are sent to all: with batches of their own the ranks would arrive at different masks. Other
    buffers, such as batch-norm statistics, stay as they are on each rank; DDP synchronises them.

    Args:
        model: The module, the same on all ranks, not sharded.
        prune: Prunes it in place, by masks of ``torch.nn.utils.prune``.

    Returns:
        The result of `prune`; None on the other ranks.

    Raises:
        NotImplementedError: If the model is sharded over ranks.
        DistributedError: On the other ranks, if `prune` raises on the first, whose error it quotes.

    Cost:
        The others wait while the first one prunes, within the group's timeout; then D numbers and
        D bytes are sent.
    """
    if any(map(is_sharded, model.parameters())):
        raise NotImplementedError(
            "expected a model that is whole on each rank, got parameters sharded by FSDP; prune "
            "before sharding, or train in DDP"
        )
    ranks = Communicator.of(None, device_of(model))
    report = None
    with ranks.together("pruning"):
        if ranks.rank == 0:
            report = prune()
    if ranks.size > 1:
        _take_from_first_rank(model, ranks)
    return report


def _take_from_first_rank(model: nn.Module, ranks: Communicator) -> None:
    """Overwrite masks and parameters with those of the first rank."""
    masks = masks_of(model)
    # Sorted by name: pruning moves a parameter to the end of its module, so the order differs.
    parameters = dict(sorted((as_dense_name(n), p) for n, p in model.named_parameters()))
    masked = torch.tensor([name in masks for name in parameters], dtype=torch.uint8, device="cpu")
    ranks.broadcast_(masked)
    first: dict[str, Tensor] = {}
    for (name, parameter), is_masked in zip(parameters.items(), masked.tolist(), strict=True):
        if is_masked:
            sent = masks.get(name, torch.ones_like(parameter, dtype=torch.bool)).to(torch.uint8)
            first[name] = ranks.broadcast_(sent) != 0
    with ranks.together("applying the masks"):
        if ranks.rank:
            apply_masks_(model, first)
    with torch.no_grad():
        for parameter in parameters.values():
            ranks.broadcast_(parameter.detach())
    for weight in pruned_weights(model).values():
        refresh_(*weight)
