"""Remove channels in one call: checked, compensated, one group after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch_pruning as tp
from torch import nn

from hesscurv.integrations.channels.compensation import prepare_removal_
from hesscurv.integrations.channels.graph import repair_
from hesscurv.objective.tasks import Task


def remove_channels_(
    model: nn.Module,
    task: Task,
    batches: Iterable[Any],
    groups: Iterable[Any] | tp.pruner.BasePruner,
    *,
    damping: float | None = 1e-3,
    adapt: Callable[[nn.Module], None] | None = None,
) -> dict[str, float]:
    """Compensate for the channels of a pruner's step, and remove them.

    The smaller model computes what the compensated one does with the channels at zero where they
    are read. That is tried first on a copy, with some samples of the first batch; what differs is
    refused, and nothing has been changed then. The groups are removed in turn, each by what its
    indices mean once those before it are gone: behind a concatenation, indices move.

        importance.rank_jointly(pruner)
        remove_channels_(model, task, batches, pruner)

    Normalisation over channels (layer norm, group norm) takes its statistics over those that are
    left.

    Args:
        model: The model that the pruner has, in place.
        task: Says how the model is run on a batch, see `hesscurv.supervised`.
        batches: A list or DataLoader of batches.
        groups: The pruner, whose next step is taken; or `torch_pruning.Group`s of one model, as
            ``pruner.step(interactive=True)`` yields them.
        damping: As in `compensate_channels_`; None to remove the channels without compensation.
        adapt: Called with the model once its channels are gone, for sizes that its code keeps, such
            as an attention's ``head_dim``; and before, with the copy. Default none.

    Returns:
        As `compensate_channels_`: by layer's name, the part that could not be made up for.

    Raises:
        TypeError: If the model is no module, or a group none of torch-pruning.
        ValueError: If the smaller model would not run, or would compute something else; and as in
            `compensate_channels_`. The model is then as it was.

    Cost: as `compensate_channels_`, and two copies of the model.
    """
    if isinstance(groups, tp.pruner.BasePruner):
        repair_(groups.DG)  # before it scores the channels
        groups = groups.step(interactive=True)
    groups = list(groups)
    left = prepare_removal_(model, task, batches, groups, damping, adapt, must_run=True)
    for group in groups:
        group.prune()
    if adapt is not None:
        adapt(model)
    return left
