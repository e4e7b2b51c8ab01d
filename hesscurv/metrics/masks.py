"""Masks of k out of D entries, by magnitude, by scores or at random, and their similarity.

A mask is a bool tensor (D,) in the flat order of the operators: the parameters of
`select_parameters`, in the model's order, each flattened row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hesscurv.metrics.subspace import as_mask_span, check_count
from hesscurv.objective.parameters import ParamSelection, select_parameters


def magnitude_mask(model: nn.Module | Tensor, k: int, params: ParamSelection = None) -> Tensor:
    """Return the mask of the k parameters of largest magnitude, ranked over all layers.

    Args:
        model: A module, or a flat parameter vector (D,), floating.
        k: How many parameters to keep, 1 <= k <= D.
        params: Which parameters of the module, as in the operators: None for all that require
            grad, names, parameters, or a predicate. D is their total number. None for a vector.

    Returns:
        Shape (D,), bool, exactly k True, on the device of the (first) parameter. Of equal
        magnitudes the one that comes first is kept.

    Raises:
        TypeError: If `model` is neither a module nor a floating tensor, or k is not an integer.
        ValueError: If k is out of range, a parameter is NaN, the vector is not flat, or `params`
            is given with a vector or selects nothing.

    Cost:
        D floats, and a selection in O(D).

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701.

    Example:
        >>> hesscurv.magnitude_mask(torch.tensor([0.1, -3.0, 2.0]), k=2)
        tensor([False,  True,  True])
        >>> int(hesscurv.magnitude_mask(model, k=5).sum())
        5
    """
    if isinstance(model, nn.Module):
        parameters = list(select_parameters(model, params).values())
        device = parameters[0].device
        magnitudes = torch.cat([p.detach().abs().flatten().to(device) for p in parameters])
    elif isinstance(model, Tensor):
        if params is not None:
            raise ValueError(
                "expected `params` with a module only, got it with a flat vector; select from the "
                "vector before the call"
            )
        magnitudes = model.detach().abs()
    else:
        raise TypeError(
            f"expected a module or a flat parameter vector (D,), got {type(model).__name__}"
        )
    return top_k_mask(magnitudes, k)


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Return the mask of the k largest scores.

    Args:
        scores: Shape (D,), integer or floating; inf is allowed and ranks first.
        k: How many entries are True, 1 <= k <= D.

    Returns:
        Shape (D,), bool, exactly k True, on the scores' device. Of equal scores the one that comes
        first is kept, so that the mask is deterministic and masks of growing k are nested.

    Raises:
        TypeError: If `scores` is not an integer or floating tensor, or k is not an integer.
        ValueError: If `scores` is not flat or has NaN, or k is out of range.

    Cost:
        A selection in O(D), and D scores.

    Example:
        >>> hesscurv.top_k_mask(torch.tensor([0.5, 2.0, 1.0]), k=1)
        tensor([False,  True, False])
    """
    check_scores(scores)
    k = check_count(k, scores.shape[0], "k", "the number of scores D")
    scores = scores.detach()
    threshold = torch.topk(scores, k, sorted=False).values.min()
    mask = scores > threshold
    # topk breaks ties arbitrarily, and differently on each device.
    ties = (scores == threshold).nonzero().squeeze(1)
    mask[ties[: k - int(mask.sum())]] = True
    return mask


def check_scores(scores: Tensor) -> None:
    """Raise unless `scores` is a flat real tensor without NaN; see `top_k_mask`."""
    if not isinstance(scores, Tensor) or scores.dtype == torch.bool or scores.is_complex():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"expected scores as a real tensor (D,), got {got}")
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"expected scores of shape (D,), got {tuple(scores.shape)}; use "
            "ParameterLayout.flatten for scores that have their parameters' shapes"
        )
    if scores.isnan().any():
        raise ValueError(
            f"expected scores without NaN, got {int(scores.isnan().sum())} NaN of {len(scores)}; "
            "use -inf for entries that must not be kept"
        )


def random_mask(D: int, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Return a uniformly random mask of k out of D entries.

    Args:
        D: The length of the mask.
        k: How many entries are True, 1 <= k <= D.
        generator: The source of randomness; the mask lies on its device. Default: PyTorch's
            global generator, on the CPU.

    Returns:
        Shape (D,), bool, exactly k True.

    Raises:
        TypeError: If D or k is not an integer.
        ValueError: If D < 1 or k is out of range.

    Cost:
        D integers.

    Example:
        >>> mask = hesscurv.random_mask(10, 3, torch.Generator().manual_seed(0))
        >>> int(mask.sum())
        3
    """
    D = check_count(D, 2**62, "D", "a length")
    k = check_count(k, D, "k", "D")
    device = torch.device("cpu") if generator is None else generator.device
    mask = torch.zeros(D, dtype=torch.bool, device=device)
    mask[torch.randperm(D, generator=generator, device=device)[:k]] = True
    return mask


def intersection_over_union(a: Tensor, b: Tensor) -> float:
    """Return the intersection over union of two masks, also called their Jaccard index.

    ``|a and b| / |a or b|``; for masks of equal size it is ``overlap / (2 - overlap)``.

    Args:
        a: Shape (D,), bool, with at least one True.
        b: Likewise, of the same D; its size may differ.

    Returns:
        A number in [0, 1], dimensionless: 1 for equal masks, 0 for disjoint ones.

    Raises:
        TypeError: If an argument is not a bool tensor.
        ValueError: If the shapes differ, are not (D,), or a mask is empty.

    Cost:
        O(D).

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701.

    Example:
        >>> a = torch.tensor([True, True, False, False])
        >>> b = torch.tensor([True, False, True, False])
        >>> round(hesscurv.intersection_over_union(a, b), 4)
        0.3333
    """
    mask_a, mask_b = as_mask_span(a, "a").mask, as_mask_span(b, "b").mask
    if mask_a.shape != mask_b.shape:
        raise ValueError(
            f"expected two masks over the same parameters, got {tuple(mask_a.shape)} and "
            f"{tuple(mask_b.shape)} entries; select the same parameters for both"
        )
    mask_b = mask_b.to(mask_a.device)
    return int((mask_a & mask_b).sum()) / int((mask_a | mask_b).sum())
