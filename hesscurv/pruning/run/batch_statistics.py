"""Recalibrate batch-norm statistics after a change of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hesscurv.objective.data.batches import Batches
from hesscurv.objective.parameters import unwrap
from hesscurv.objective.running.environment import unchanged_random_state
from hesscurv.objective.tasks import Task


def recalibrate_(model: nn.Module, task: Task, batches: Iterable[Any]) -> int:
    """Set the running means and variances of batch norms to the averages over some batches.

    Only the batch norms are in training mode meanwhile; modes and random state are restored.

    Args:
        model: The module; the buffers of its batch norms are changed.
        task: Runs the model on a batch, by `outputs`.
        batches: Re-iterable batches; larger ones give better estimates.

    Returns:
        The number of batch norms.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).double()
        >>> hesscurv.pruning.recalibrate_(net, task, batches)
        1
        >>> torch.allclose(net[0].running_mean, inputs.mean(0))
        True
    """
    inner = unwrap(model)
    norms = [
        m
        for m in inner.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return 0
    modes = {m: m.training for m in inner.modules()}
    momenta = [m.momentum for m in norms]
    device = next(inner.parameters()).device
    source = Batches(batches, device, None, 0)
    with unchanged_random_state(device), torch.no_grad():
        try:
            inner.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative instead of an exponential average
                norm.train()
            for batch in source.first_pass():
                task.outputs(inner, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for module, mode in modes.items():
                module.training = mode
    return len(norms)
