"""Global pruning of several tensors by given scores, all validated first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hesscurv.pruning.masks.methods import apply_mask_
from hesscurv.pruning.ranking import as_scores, check_amount, lowest
from hesscurv.pruning.rollback import unchanged_on_error
from hesscurv.pruning.weights import Weight, check_prunable, current_mask


def curvature_global(
    parameters: Iterable[tuple[nn.Module, str]],
    amount: float,
    importance_scores: Mapping[Weight, Tensor] | Mapping[tuple[nn.Module, str], Tensor],
) -> None:
    """Prune the entries of lowest score over several tensors together, in place.

    As ``prune.global_unstructured``, but all scores are validated before anything is changed.

    Args:
        parameters: Pairs (module, name), such as ``find_weights(model).values()``.
        amount: A float in [0, 1] is a fraction of all entries not yet pruned, an int a number.
        importance_scores: For each pair a tensor of its shape, integer or floating, on any device,
            without NaN; ranked with their sign, over all tensors. Ties keep the entry that is first
            in `parameters`. Scores of other pairs are not used.

    Raises:
        TypeError: If the scores are not a mapping to real tensors, or `amount` is not a number.
        ValueError: If scores are missing, or have another shape or NaN, a pair occurs twice,
            two are one parameter, `amount` is out of range, or a tensor cannot be pruned. All
            modules are left as they were.

    Cost:
        A selection in O(D), two copies of the scores, and masks in the weights' dtypes.

    Example:
        >>> net = copy.deepcopy(model)
        >>> weights = hesscurv.pruning.find_weights(net).values()
        >>> scores = hesscurv.pruning.saliency(net, pairs)
        >>> hesscurv.pruning.curvature_global(weights, 0.5, scores)
        >>> sum(int(mask.sum()) for mask in hesscurv.pruning.masks_of(net).values())
        9
    """
    weights = [Weight(*pair) for pair in parameters]
    if not weights:
        raise ValueError("expected pairs (module, name) to prune, got none")
    if not isinstance(importance_scores, Mapping):
        raise TypeError(
            "expected importance_scores as a dict from (module, name) to a tensor, got "
            f"{type(importance_scores).__name__}"
        )
    amount = check_amount(amount)
    originals = [check_prunable(*weight) for weight in weights]
    if len({id(p) for p in originals}) < len(weights):
        raise ValueError("expected distinct parameters, got one twice; prune each of them once")
    scores, alive = [], []
    for number, (weight, parameter) in enumerate(zip(weights, originals, strict=True)):
        where = f"{weight.name!r} of {type(weight.module).__name__} (number {number})"
        if weight not in importance_scores:
            raise ValueError(f"expected importance scores for {where}, got none for it")
        scores.append(as_scores(importance_scores[weight], parameter, where))
        mask = current_mask(*weight)
        alive.append(torch.ones_like(parameter, dtype=torch.bool) if mask is None else mask)
    dtype = scores[0].dtype
    for tensor in scores:
        dtype = torch.promote_types(dtype, tensor.dtype)
    surviving = torch.cat(
        [s[a].to(scores[0].device, dtype) for s, a in zip(scores, alive, strict=True)]
    )
    dropped = lowest(surviving, amount, "entries")
    with unchanged_on_error(weight.module for weight in weights):
        start = 0
        for weight, mask in zip(weights, alive, strict=True):
            stop = start + int(mask.sum())
            mask[mask.clone()] = ~dropped[start:stop].to(mask.device)
            apply_mask_(*weight, mask)
            start = stop
