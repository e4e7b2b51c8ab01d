"""Compensation of removed channels by the layers that read them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.integrations.channels.groups import current_groups, follow_removals_
from hesscurv.integrations.channels.sections import level_sections_
from hesscurv.integrations.channels.slices import READERS, check_inside
from hesscurv.integrations.channels.trial import check_removal, zero_inputs_
from hesscurv.integrations.importances.ridge import centred, relative_ridge, ridge_factor
from hesscurv.objective.objective import Objective
from hesscurv.objective.parameters import unwrap
from hesscurv.objective.tasks import Task
from hesscurv.pruning.curvature.layer_inputs import has_covariance, input_covariances
from hesscurv.pruning.curvature.sample_weights import weigh
from hesscurv.pruning.weights import Weight

_logger = logging.getLogger(__name__)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class _Reader:
    """A layer that reads channels, the channels to remove, and the batch norm after it."""

    name: str
    layer: Any
    gone: Tensor  # (channels,), bool
    norm: Any  # the batch norm that is the only reader of its outputs, or None


@dataclass(frozen=True)
class _Update:
    """Update of a reader: new weights, and the change of its outputs' means."""

    weight: Tensor
    shift: Tensor
    left: float


@torch.no_grad()
def compensate_channels_(
    model: nn.Module,
    task: Task,
    batches: Iterable[Any],
    groups: Iterable[Any],
    *,
    damping: float = 1e-3,
) -> dict[str, float]:
    r"""Compensate for the removal of channels in the weights that read them.

    For a layer with weights W (o, i), unfolded for a convolution, and inputs of mean m and
    covariance C, of which P are removed and K kept:

    .. math:: W_K \leftarrow W_K + W_P C_{PK} (C_{KK} + \mu I)^{-1}, \quad W_P \leftarrow 0, \quad
        b \leftarrow b + (W - W') m

    This is the joint update of the Optimal Brain Surgeon for the Kronecker-factored curvature
    :math:`G \otimes C`, whatever G: least squares on the layer's outputs, with W' the new weights.
    If the layer has no bias, a batch norm that is the only reader of its outputs adjusts its
    running mean instead; without either, C is not centred and b is omitted. Call it between scoring
    and pruning::

        groups = list(pruner.step(interactive=True))
        compensate_channels_(model, task, batches, groups)
        for group in groups:
            group.prune()

    The groups may be pruned in any order: each is updated for those pruned before it, see
    `remove_channels_`, which does both. All layers are fitted to their present inputs, so remove
    many channels in stages. Afterwards the model computes what it will compute once the groups are
    pruned, as far as the removed channels are read by the updated layers: dense layers and
    two-dimensional convolutions without groups. Other readers are unchanged. Where the model splits
    a tensor into equal chunks, enough channels are kept, with zero weights behind them, for the
    chunks to stay equal.

    Args:
        model: The pruner's model, changed in place; batch norms are used in eval mode.
        task: Runs the model on a batch, see `hesscurv.supervised`.
        batches: A list or DataLoader of batches; targets only enter by the samples' weights.
        groups: `torch_pruning.Group`s with the channels to remove, not pruned yet.
        damping: mu, relative to the mean of the diagonal of C; default 1e-3. Directions of smaller
            variance hardly change.

    Returns:
        By layer name, the uncompensated fraction of the variance that the removal takes from the
        outputs (summed over outputs): 0 is full compensation, 1 none.

    Raises:
        TypeError: If the model is not a module, or a group not one of torch-pruning.
        ValueError: If the damping is not positive, a layer loses all of its inputs, its weight is
            not a parameter of the model, values are not finite, or the smaller model, tried on a
            copy, differs from the model with the channels at zero. The model is unchanged then. If
            the trial is impossible, such as with hard-coded view sizes, that is logged.

    Cost:
        Two copies of the model for the trial, one forward pass; ``i^2`` operations per sample and
        place, ``i^3`` per layer, ``i^2`` floats.

    References:
        He et al., ICCV 2017, arXiv 1707.06168, equation (5), least squares on a layer's outputs;
        Kurtic et al., NeurIPS 2023, arXiv 2302.04089, equation (2), the same as OBS.

    Example:
        >>> import torch_pruning
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()
        >>> importance = hesscurv.integrations.CompensatedImportance(net, task, batches)
        >>> pruner = torch_pruning.pruner.BasePruner(
        ...     net, inputs, importance, pruning_ratio=0.5, ignored_layers=[net[2]])
        >>> groups = list(pruner.step(interactive=True))
        >>> uncompensated = hesscurv.integrations.compensate_channels_(net, task, batches, groups)
        >>> for group in groups:
        ...     group.prune()
        >>> net[0].out_features
        4
    """
    return prepare_removal_(model, task, batches, list(groups), damping, None, must_run=False)


@torch.no_grad()
def prepare_removal_(
    model: nn.Module,
    task: Task,
    batches: Iterable[Any],
    groups: list[Any],
    damping: float | None,
    adapt: Callable[[nn.Module], None] | None,
    *,
    must_run: bool,
) -> dict[str, float]:
    """Check groups, compensate for them, and prepare them for pruning one after the other.

    Args:
        model: The model, changed in place.
        task: Runs the model on a batch.
        batches: Batches.
        groups: The groups, in pruning order; updated in place.
        damping: As in `compensate_channels_`; None for no compensation.
        adapt: Adapts a model after the removal of channels.
        must_run: See `check_removal`.

    Returns:
        As `compensate_channels_`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if damping is not None and (isinstance(damping, bool) or not 0 < damping < float("inf")):
        raise ValueError(f"expected a positive finite damping, got {damping!r}")
    model = unwrap(model)
    current_groups(groups)
    if not groups:
        return {}
    readers, before = _read(model, groups), [list(group.items) for group in groups]
    everything = [name for name, p in model.named_parameters() if p.is_floating_point()]
    objective = Objective(
        model, task, batches, everything, training=False, compute_dtype=None, budget=None
    )
    updates = {}
    try:
        at_zero = level_sections_(groups)
        check_removal(objective, groups, adapt, must_run=must_run)
        if readers and damping is not None:
            updates = _updates(model, task, batches, readers, damping)
    except BaseException:
        for group, items in zip(groups, before, strict=True):
            group.items[:] = items
        raise
    for reader in readers:
        if reader.name in updates:
            _write_(reader, updates[reader.name])
    for layer, inputs in at_zero.items():
        zero_inputs_(layer, torch.tensor(sorted(inputs), device=layer.weight.device).long())
    follow_removals_(groups)
    return {name: update.left for name, update in updates.items()}


def _updates(
    model: nn.Module, task: Task, batches: Iterable[Any], readers: list[_Reader], damping: float
) -> dict[str, _Update]:
    """Fit the readers in one pass over the batches; layers that do not run are omitted."""
    weights = {f"{r.name}.weight": Weight(r.layer, "weight") for r in readers}
    objective = Objective(
        model, task, batches, list(weights), training=False, compute_dtype=None, budget=None
    )
    objective.refresh()
    moments = input_covariances(
        objective,
        objective.parameters(),
        weigh(objective, objective.batches.first_pass()),
        weights,
        largest=2**31,
        constant=True,
    )
    return {
        r.name: _fit(r, moments[f"{r.name}.weight"][0], damping)
        for r in readers
        if f"{r.name}.weight" in moments
    }


def _read(model: nn.Module, groups: list[Any]) -> list[_Reader]:
    """Return the layers that read removed channels, each once, with all inputs that it loses."""
    names = {module: name for name, module in model.named_modules()}
    own = {id(p) for p in model.parameters()}
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    found: dict[Any, tuple[Any, set[int]]] = {}
    for group in groups:
        for dep, idxs in group:
            if dep.handler in READERS and len(idxs):
                node = dep.target
                found.setdefault(node.module, (node, set()))[1].update(map(int, idxs))
    readers = []
    for layer, (node, indices) in found.items():
        if layer not in names or id(layer.weight) not in own:
            raise ValueError(
                f"expected groups of this model whose weights are parameters, got {node.name}; "
                "make the pruner for this model, and call torch.nn.utils.prune.remove first"
            )
        if not has_covariance(Weight(layer, "weight")):
            continue
        if owners[id(layer.weight)] > 1:  # an update would change the other layer as well
            _logger.warning("%s is not refitted: it shares its weight", names[layer])
            continue
        check_inside(torch.tensor(list(indices), device="cpu"), layer.weight.shape[1], names[layer])
        gone = torch.zeros(layer.weight.shape[1], dtype=torch.bool, device=layer.weight.device)
        gone[list(indices)] = True
        if bool(gone.all()):
            raise ValueError(f"expected {names[layer]} to keep an input, got groups with all")
        readers.append(_Reader(names[layer], layer, gone, _norm_after(node)))
    return readers


def _norm_after(node: Any) -> Any:
    """Return the batch norm, with running means, that is the only reader of a layer, or None."""
    if len(node.outputs) != 1 or len(node.outputs[0].inputs) != 1:
        return None
    after = node.outputs[0].module
    return after if isinstance(after, _NORMS) and after.running_mean is not None else None


def _fit(reader: _Reader, moments: Tensor, damping: float) -> _Update:
    """Fit a layer's outputs by the kept inputs; `moments` (i + 1, i + 1) includes a constant."""
    measured_in, moments = moments.dtype, moments.double()
    places = moments[-1, -1]
    mean_i, second_ii = moments[-1, :-1] / places, moments[:-1, :-1] / places
    if reader.layer.bias is None and reader.norm is None:
        mean_i = torch.zeros_like(mean_i)
    C = centred(second_ii, mean_i, measured_in)
    W = reader.layer.weight.detach().double().flatten(1)
    # Inputs of a convolution are unfolded channel by channel.
    gone = reader.gone.repeat_interleave(W.shape[1] // len(reader.gone))
    W_P, C_PK, C_KK = W[:, gone], C[gone][:, ~gone], C[~gone][:, ~gone]
    if not bool(C.isfinite().all() and W.isfinite().all()):
        raise ValueError(
            f"expected finite inputs and weights of {reader.name}, got NaN or inf; look for them "
            "in the model and the batches"
        )
    L = ridge_factor(C_KK, relative_ridge(C, damping))
    new = torch.zeros_like(W)
    new[:, ~gone] = W[:, ~gone] + torch.cholesky_solve(C_PK.mT @ W_P.mT, L).mT
    change = W - new
    lost = float(((W_P @ C[gone][:, gone]) * W_P).sum())
    left = float(((change @ C) * change).sum()) / lost if lost > 0 else 0.0
    return _Update(new.view_as(reader.layer.weight), change @ mean_i, left)


def _write_(reader: _Reader, update: _Update) -> None:
    reader.layer.weight.copy_(update.weight)
    if reader.layer.bias is not None:
        reader.layer.bias.add_(update.shift)
    elif reader.norm is not None:
        reader.norm.running_mean.sub_(update.shift)
