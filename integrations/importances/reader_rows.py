"""Per-sample gradients of the weights that read channels, and moments of their inputs.

Shapes: R rows (one per sample and draw), o outputs and i inputs of a layer's weight matrix,
unfolded for a convolution; n samples of a chunk, P places of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.integrations.importances.sample_rows import Rows
from hesscurv.interface.descriptions import Described
from hesscurv.objective.data.batches import split
from hesscurv.objective.objective import Objective
from hesscurv.operators.sample_space.sample_gradients import (
    output_roots,
    output_slopes,
    random_signs,
)
from hesscurv.pruning.curvature.layer_inputs import unfolded
from hesscurv.pruning.curvature.sample_weights import check_mean_over_samples, weigh

_SAMPLES_AT_ONCE = 50
_MOST_CHECKED = 4
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(repr=False)
class ReaderRows(Described):
    """Measurements of one layer.

    Args:
        gradients: Shape (R, o, i), in the compute dtype: each row's gradient in the weight matrix,
            times the square root of the row's weight in the mean.
        sums: Shape (R, o), the same for the layer's intercept.
        second: Shape (i, i), float64: second moments of the inputs, averaged over places.
        mean: Shape (i,), float64: mean of the inputs.
        has_intercept: Whether a bias, or a batch norm directly after, can compensate the mean.
    """

    gradients: Tensor
    sums: Tensor
    second: Tensor
    mean: Tensor
    has_intercept: bool


def reader_rows(
    objective: Objective, layers: dict[str, Any], rows: Rows, draws: int, signs: torch.Generator
) -> dict[str, ReaderRows]:
    """Measure layers at the model's present weights, in one pass over the batches.

    Args:
        objective: The model and the task, in eval mode.
        layers: Dense layers and convolutions by name.
        rows: "fisher", gradients of the samples' losses; or "ggn", random combinations of the rows
            of a square root of the Gauss-Newton matrix.
        draws: Rows per sample, for "ggn".
        signs: Source of the random signs.

    Returns:
        By name; layers that do not run, or that do not affect the outputs, are omitted.

    Raises:
        ValueError: If the loss is not a mean over samples, or the first axis of a layer's inputs is
            not that of the samples.
    """
    objective.refresh()
    task = objective.task_parts
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    moments: dict[str, Tensor] = {}
    weights = []
    params = objective.leaves()
    with objective.environment(), _calls(objective.model, layers) as (calls, followed):
        for number, (batch, weights_n) in enumerate(
            weigh(objective, objective.batches.first_pass())
        ):
            if number < _MOST_CHECKED:
                check_mean_over_samples(objective, objective.parameters(), (batch, weights_n))
            size = _SAMPLES_AT_ONCE
            for chunk, part_n in zip(split(batch, size), weights_n.split(size), strict=True):
                for seen in calls.values():
                    seen.clear()
                out = objective.outputs(params, chunk)
                inputs = _inputs(layers, calls, len(part_n))
                _add_moments(moments, inputs, part_n)
                places = [call[1] for name in inputs for call in calls[name]]
                for direction in _directions(task, out.detach(), chunk, rows, draws, signs):
                    weights.append(part_n)
                    grads = iter(
                        torch.autograd.grad(
                            (out * direction).sum(), places, retain_graph=True, allow_unused=True
                        )
                    )
                    for name, read in inputs.items():
                        gradients = [_by_sample(layers[name], next(grads), u) for u in read]
                        parts.setdefault(name, []).append(_total(gradients))
    if not weights:
        raise ValueError(
            "expected at least one batch that has a weight, got none; pass a list of batches"
        )
    scale_R = torch.cat(weights)
    scale_R = (scale_R / scale_R.sum()).sqrt().to(objective.device, objective.dtype)
    result = {}
    for name, pieces in parts.items():
        by_weight = torch.cat([g for g, _ in pieces]).mul_(scale_R[:, None, None])
        sums = torch.cat([s for _, s in pieces]).mul_(scale_R[:, None])
        moment = moments[name] / moments[name][-1, -1]
        has_intercept = layers[name].bias is not None or name in followed
        result[name] = ReaderRows(by_weight, sums, moment[:-1, :-1], moment[:-1, -1], has_intercept)
    return result


@contextmanager
def _calls(
    model: nn.Module, layers: dict[str, Any]
) -> Iterator[tuple[dict[str, list[tuple[Tensor, Tensor]]], set[str]]]:
    """Collect the layers' inputs and outputs, and the outputs read directly by a batch norm."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    followed: set[str] = set()
    handles = []

    def read(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            calls[name].append(((args[0] if args else kwargs["input"]).detach(), out))

        return hook

    def norm(module: nn.Module, args: Any) -> None:
        for name, found in calls.items():
            if any(out is args[0] for _, out in found):
                followed.add(name)

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(read(name), with_kwargs=True))
        for module in model.modules():
            if isinstance(module, _NORMS) and module.running_mean is not None:
                handles.append(module.register_forward_pre_hook(norm))
        yield calls, followed
    finally:
        for handle in handles:
            handle.remove()


def _inputs(
    layers: dict[str, Any], calls: dict[str, list[tuple[Tensor, Tensor]]], n: int
) -> dict[str, list[Tensor]]:
    """Return the inputs of each layer's weight matrix, one (n, P, i) per call."""
    found: dict[str, list[Tensor]] = {}
    for name, seen in calls.items():
        for x, _ in seen:
            if len(x) != n:
                raise ValueError(
                    f"expected the {n} samples along the first axis of the inputs of {name}, got "
                    f"shape {tuple(x.shape)}; leave the layer out of `params`"
                )
            rows = unfolded(layers[name], x)
            found.setdefault(name, []).append(rows.view(n, -1, rows.shape[1]))
    return found


def _add_moments(moments: dict[str, Tensor], inputs: dict[str, list[Tensor]], w_n: Tensor) -> None:
    for name, read in inputs.items():
        for u in read:
            rows = torch.cat([u, u.new_ones(*u.shape[:2], 1)], 2)
            weighted = rows * w_n.to(u)[:, None, None]
            product = (weighted.flatten(0, 1).mT @ rows.flatten(0, 1)).double()
            moments[name] = moments[name] + product if name in moments else product


def _directions(
    task: Any, out: Tensor, batch: Any, rows: Rows, draws: int, signs: torch.Generator
) -> Iterable[Tensor]:
    """Yield, for each draw, the coefficients of the outputs' gradients, of their shape."""
    if rows == "fisher":
        yield output_slopes(task, out, batch)
        return
    root = output_roots(task, out, batch)
    for s in random_signs((draws, *root.shape[:2], 1), root, signs):
        yield (root @ s).view_as(out)


def _by_sample(layer: Any, grad: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's gradient in the weight matrix, (n, o, i), and intercept, (n, o)."""
    if grad is None:
        o = layer.weight.shape[0]
        return u.new_zeros(len(u), o, u.shape[2]), u.new_zeros(len(u), o)
    is_conv = isinstance(layer, nn.Conv2d)
    g = grad.flatten(2) if is_conv else grad.reshape(len(u), -1, grad.shape[-1]).mT
    return g @ u, g.sum(2)


def _total(gradients: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = gradients[0]
    for g, s in gradients[1:]:
        first, second = first + g, second + s
    return first, second
