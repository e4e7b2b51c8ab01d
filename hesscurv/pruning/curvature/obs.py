"""Optimal Brain Surgeon update: joint compensation of all pruned weights by the kept ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.objective.parameters import unwrap
from hesscurv.pruning.curvature.eigenspace_model import quadratic_model_of
from hesscurv.pruning.curvature.quadratic_model import QuadraticModel
from hesscurv.pruning.masks.state_dicts import masks_of, write_pruned_
from hesscurv.pruning.weights import (
    Weight,
    current_mask,
    current_parameter,
    find_weights,
)


def compensate_(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None,
    curvature: QuadraticModel | Eigenpairs,
) -> float:
    """Prune weights by masks and move the kept ones to the minimum of a quadratic model, in place.

    For the pruned entries P and the kept ones S the exact joint minimum is

        w_S <- w_S - H_SS^-1 (g_S - H_SP w_P),    w_P <- 0,

    with ``H = R^T R + mu K`` and ``g = gradient + R^T residual``. The classical update, one weight
    after the other, agrees with it only for a single pruned weight.

    The compensated values w_P are the present ones of the parameter: for a pruned tensor those of
    ``weight_orig``, which torch keeps behind the mask. So `curvature` must be that of the loss
    before pruning. They are zero afterwards, so a second call does not count them again: without a
    first-order term it changes nothing; with one it repeats the step, so measure the curvature
    again first.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.
        masks: A dict from dotted dense name to a bool tensor of the weight's shape, on any device,
            True where it is kept; None for the model's own, `masks_of`. They are applied in
            addition to the model's present masks.
        curvature: The model of the loss, or top eigenpairs, converted by `quadratic_model_of` with
            its defaults. Its weights without a mask move too; weights outside are fixed.

    Returns:
        The predicted change of the loss.

    Raises:
        TypeError: If `masks` is neither a mapping nor None, a mask not a bool tensor, or
            `curvature` neither a model nor eigenpairs.
        ValueError: If there are no masks, the curvature lacks a masked weight or has one that the
            model does not, a shape differs, or the update is not finite. The model is restored bit
            for bit.

    Cost:
        About n s (n + i) operations for n rows, s kept entries and blocks of size i, a copy of the
        rows, and one of the layers' weights and buffers for a rollback.

    References:
        Hassibi and Stork, NIPS 1992, equation (5), for one weight; Kurtic et al., EMNLP 2022, arXiv
        2203.07259, equation (5), for several.

    Example:
        >>> net = copy.deepcopy(model)
        >>> masks = {"0.weight": torch.arange(12).reshape(3, 4) > 2}  # without the first three
        >>> change = hesscurv.pruning.compensate_(net, masks, pairs)
        >>> int((net[0].weight == 0).sum())
        3
    """
    model = unwrap(model)
    masks = masks_of(model) if masks is None else masks
    if isinstance(curvature, Eigenpairs):
        curvature = quadratic_model_of(model, curvature)
    if not isinstance(curvature, QuadraticModel):
        raise TypeError(f"expected a QuadraticModel or Eigenpairs, got {type(curvature).__name__}")
    weights, kept = _check(model, masks, curvature)
    like = curvature.matrix.rows[0]
    parameters = {name: current_parameter(*weights[name]) for name in curvature.layout.names}
    w_D = torch.cat([p.detach().flatten().to(like) for p in parameters.values()])
    mask_D = torch.cat([kept[name].flatten().to(like.device) for name in parameters])
    # The step of the pruned entries is fixed to -w, which makes them zero.
    system = curvature.matrix.restrict(mask_D, -w_D)
    delta_D = system.solve(curvature.mu, curvature.residual, curvature.gradient)
    change = curvature.change(delta_D)
    # Zero by the mask, not by the sum, which rounds.
    new = curvature.layout.split(torch.where(mask_D, w_D + delta_D, 0))
    # Checked after the cast, which may overflow in half precision, and before anything is written.
    stored = {name: new[name].to(p.device, p.dtype) for name, p in parameters.items()}
    if not all(bool(value.isfinite().all()) for value in stored.values()):
        raise ValueError(
            "expected finite weights after the update, got NaN or inf; look for them in the "
            "model's weights, or use a larger damping"
        )
    write_pruned_(model, weights, stored, masks)
    return change


def _check(
    model: nn.Module, masks: Mapping[str, Tensor], curvature: QuadraticModel
) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """Return the curvature's weights and their masks, by dense name."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"expected masks as a dict from name to mask, got {type(masks).__name__}")
    if not masks:
        raise ValueError("expected masks, got none; prune the model first, or pass `masks`")
    layout = curvature.layout
    if missing := [name for name in masks if name not in layout.names]:
        raise ValueError(
            f"expected curvature that has the weights {missing[:8]} ({len(missing)} in all), got "
            f"one of {list(layout.names)[:8]} ({len(layout.names)} in all); leave their masks out "
            "or measure it with them"
        )
    weights = find_weights(model, layout.names)
    kept = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in weights:
            raise ValueError(f"expected full names of weights in the curvature, got {name!r}")
        parameter = current_parameter(*weights[name])
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"expected a bool tensor as the mask of {name!r}, got {got}")
        for what, found in (("mask", mask.shape), ("part of the curvature", shape)):
            if tuple(found) != tuple(parameter.shape):
                raise ValueError(
                    f"expected a {what} of shape {tuple(parameter.shape)} for {name!r}, got "
                    f"{tuple(found)}"
                )
        before = current_mask(*weights[name])
        mask = mask.to(parameter.device)
        kept[name] = mask if before is None else mask & before
    return weights, kept
