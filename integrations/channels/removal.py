"""Channel removal in one call: check, compensation, pruning of all groups."""

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
    are read. That is verified first on a copy, with some samples of the first batch; a difference
    raises an error and leaves the model unchanged. The groups are removed in turn, with indices
    translated after each removal, since they shift behind a concatenation.

        importance.rank_jointly(pruner)
        remove_channels_(model, task, batches, pruner)

    Normalisation over channels (layer norm, group norm) uses statistics over the remaining ones.

    Args:
        model: The pruner's model, changed in place.
        task: Runs the model on a batch, see `hesscurv.supervised`.
        batches: A list or DataLoader of batches.
        groups: The pruner, whose next step is taken; or `torch_pruning.Group`s of one model, as
            yielded by ``pruner.step(interactive=True)``.
        damping: As in `compensate_channels_`; None to remove the channels without compensation.
        adapt: Called with the model after the removal, and before that with the copy, to update
            sizes kept in its code, such as an attention's ``head_dim``. Default none.

    Returns:
        As `compensate_channels_`: by layer name, the uncompensated fraction.

    Raises:
        TypeError: If the model is not a module, or a group not one of torch-pruning.
        ValueError: If the smaller model does not run or computes something else; and as in
            `compensate_channels_`. The model is unchanged then.

    Cost: as `compensate_channels_`, and two copies of the model.

    Example:
        >>> import torch_pruning
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()
        >>> importance = hesscurv.integrations.CompensatedImportance(net, task, batches)
        >>> pruner = torch_pruning.pruner.BasePruner(
        ...     net, inputs, importance, pruning_ratio=0.5, ignored_layers=[net[2]])
        >>> uncompensated = hesscurv.integrations.remove_channels_(net, task, batches, pruner)
        >>> net[0].out_features, list(uncompensated)
        (4, ['2'])
    """
    if isinstance(groups, tp.pruner.BasePruner):
        repair_(groups.DG)  # before the pruner scores the channels
        groups = groups.step(interactive=True)
    groups = list(groups)
    left = prepare_removal_(model, task, batches, groups, damping, adapt, must_run=True)
    for group in groups:
        group.prune()
    if adapt is not None:
        adapt(model)
    return left
