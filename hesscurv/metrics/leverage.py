"""Leverage scores of a subspace, by coordinate and by parameter.

The leverage of row i of an orthonormal basis V is ``sum_j V_ij^2``, the squared length of the
coordinate axis i projected onto the space. Scores lie in [0, 1] and sum to the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.metrics.masks import check_scores, top_k_mask
from hesscurv.metrics.subspace import (
    ColumnSpan,
    Subspace,
    as_column_span,
    as_mask_span,
    check_count,
    compute_dtype,
    row_blocks,
)
from hesscurv.objective.parameters import ParameterLayout


@dataclass(frozen=True)
class ParameterOverlap:
    """Contribution of one named parameter to the overlap of a mask and a space.

    Args:
        numel: Entries of the parameter.
        num_kept: Entries that the mask keeps.
        leverage_share: The parameter's share of the total leverage; sums to 1 over all parameters.
        overlap: Contribution of the kept entries; sums to the overlap over all parameters.

    Example:
        >>> mask = hesscurv.magnitude_mask(model, k=5)
        >>> sum(part.num_kept for part in hesscurv.overlap_by_parameter(mask, pairs).values())
        5
    """

    numel: int
    num_kept: int
    leverage_share: float
    overlap: float


def leverage_scores(pairs: Subspace, k: int | None = None) -> Tensor:
    """Return the leverage score of each coordinate in the space of the first k columns.

    ``l_i = sum_(j < k) V_ij^2``.

    Args:
        pairs: `Eigenpairs`, or a basis (D, K) with orthonormal columns.
        k: The number of columns to use, 1 <= k <= K; all by default.

    Returns:
        Shape (D,), in the basis's dtype, at least float32, on its device; sums to k.

    Raises:
        TypeError: If `pairs` is neither, or k is not an integer.
        ValueError: If k is out of range, or the basis is not finite or not orthonormal.

    Cost:
        Two passes over the basis in row blocks, O(D K), and D floats.

    References:
        Mahoney and Drineas, PNAS 106 (2009), 697-702, equation (3), without the factor 1/k.

    Example:
        >>> hesscurv.leverage_scores(torch.eye(4)[:, :2])
        tensor([1., 1., 0., 0.])
    """
    return scores_of_span(as_column_span(pairs, "pairs"), k)


def best_mask(pairs: Subspace, k: int | None = None) -> Tensor:
    """Return the k-sparse mask that overlaps most with the space of the first k eigenvectors.

    The overlap of a mask and a basis is the mean leverage score over the mask, so the k largest
    scores maximise it over all masks of k entries. For a mask whose size is not the rank, use
    ``top_k_mask(leverage_scores(pairs), size)``.

    Args:
        pairs: `Eigenpairs`, or a basis (D, K) with orthonormal columns, most important first.
        k: The size of the mask and the number of columns used, 1 <= k <= K; K by default.

    Returns:
        Shape (D,), bool, exactly k True. Ties keep the first entry.

    Raises:
        TypeError: If `pairs` is neither, or k is not an integer.
        ValueError: If k is out of range, or the basis is not finite or not orthonormal.

    Cost:
        Two passes over the basis, O(D K).

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701, for the identity.

    Example:
        >>> basis = torch.eye(4)[:, [2, 0]]
        >>> hesscurv.best_mask(basis)
        tensor([ True, False,  True, False])
    """
    span = as_column_span(pairs, "pairs")
    return top_k_mask(scores_of_span(span, k), span.rank if k is None else k)


def overlap_by_k(scores: Tensor, pairs: Subspace, ks: Iterable[int] | None = None) -> Tensor:
    """Return the overlap of the top-k mask with the top-k space as a function of k.

    For each k: ``1/k sum_(i in top-k of scores) sum_(j < k) V_ij^2``. With the magnitudes of the
    parameters as scores this is the paper's curve of overlap against k.

    Args:
        scores: Shape (D,), integer or floating: the largest are kept. For the magnitude mask pass
            the absolute values of the flat parameter vector. Ties keep the first entry.
        pairs: `Eigenpairs`, or a basis (D, K) with orthonormal columns, most important first.
        ks: The ranks to evaluate, each between 1 and K, in any order; 1, ..., K by default.

    Returns:
        Shape (len(ks),), float64, dimensionless, on the basis's device.

    Raises:
        TypeError: If `scores` is not an integer or floating tensor, `pairs` is neither of the two,
            or a rank is not an integer.
        ValueError: If `scores` has NaN or another D than the basis, `ks` is empty or a rank is out
            of range, or the basis is not finite or not orthonormal.

    Cost:
        One pass over the basis to check it; then n^2 float64 values for n = max(ks), whatever the
        number of ranks, since masks and spaces of growing k are nested.

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701.

    Example:
        >>> weights = H.layout.flatten(dict(model.named_parameters())).abs()
        >>> hesscurv.overlap_by_k(weights, pairs).shape
        torch.Size([3])
    """
    span = as_column_span(pairs, "pairs")
    check_scores(scores)
    if scores.shape[0] != span.dim:
        raise ValueError(
            f"expected one score for each of the {span.dim} rows of the basis, got "
            f"{scores.shape[0]}; select the same parameters for both"
        )
    ranks = [
        check_count(k, span.rank, "k in ks", "the number of columns")
        for k in (range(1, span.rank + 1) if ks is None else ks)
    ]
    if not ranks:
        raise ValueError("expected at least one rank in ks, got none; pass None for all")
    largest = max(ranks)
    kept = top_k_mask(scores, largest).nonzero().squeeze(1)
    order = kept[torch.sort(scores.detach()[kept], descending=True, stable=True).indices]
    rows = span.basis[order.to(span.basis.device), :largest].double().square()
    # The k-th overlap is the sum of the leading k x k block; from k - 1 to k the block grows by
    # one row up to the diagonal and one column above it.
    growth = rows.tril().sum(1) + rows.triu(1).sum(0)
    index = torch.tensor(ranks, device=growth.device)
    # On the host: torch.use_deterministic_algorithms refuses cumsum on a GPU.
    return growth.cpu().cumsum(0).to(growth.device)[index - 1] / index


def leverage_by_parameter(
    pairs: Subspace, layout: ParameterLayout | None = None
) -> dict[str, Tensor]:
    """Return the leverage scores in the shapes of the named parameters.

    Args:
        pairs: `Eigenpairs`, or a basis (D, k) with orthonormal columns.
        layout: Names and shapes of the parameters; those stored with the eigenpairs by default.

    Returns:
        A dict from name to a tensor of the parameter's shape; all entries together sum to k.

    Raises:
        TypeError: If `pairs` is neither of the two, or `layout` is not a ParameterLayout.
        ValueError: If there is no layout or it has another D, or the basis is not finite or not
            orthonormal.

    Cost:
        That of `leverage_scores`; the tensors are views of one vector (D,).

    Example:
        >>> scores = hesscurv.leverage_by_parameter(pairs)
        >>> scores["0.weight"].shape
        torch.Size([3, 4])
        >>> round(float(sum(part.sum() for part in scores.values())), 6)
        3.0
    """
    layout = _layout_for(pairs, layout)
    span = as_column_span(pairs, "pairs")
    _check_layout(layout, span.dim)
    return layout.split(scores_of_span(span))


def overlap_by_parameter(
    mask: Tensor, pairs: Subspace, layout: ParameterLayout | None = None
) -> dict[str, ParameterOverlap]:
    """Return the contribution of each named parameter to the overlap of a mask and a space.

    Args:
        mask: Shape (D,), bool, with at least one True.
        pairs: `Eigenpairs`, or a basis (D, k) with orthonormal columns.
        layout: Names and shapes of the parameters; those stored with the eigenpairs by default.

    Returns:
        A dict from name to counts, leverage share and overlap; the overlaps sum to
        ``overlap(mask, pairs)``.

    Raises:
        TypeError: If `mask` is not a bool tensor, `pairs` is neither of the two, or `layout` is no
            layout.
        ValueError: If there is no layout, D differs, the mask is empty, or the basis is not finite
            or not orthonormal.

    Cost:
        That of `leverage_scores`.

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701, for the overlap.

    Example:
        >>> mask = hesscurv.magnitude_mask(model, k=5)
        >>> parts = hesscurv.overlap_by_parameter(mask, pairs)
        >>> abs(sum(p.overlap for p in parts.values()) - hesscurv.overlap(mask, pairs)) < 1e-9
        True
    """
    layout = _layout_for(pairs, layout)
    axes, span = as_mask_span(mask, "mask"), as_column_span(pairs, "pairs")
    _check_layout(layout, span.dim)
    if axes.dim != span.dim:
        raise ValueError(
            f"expected a mask of {span.dim} entries for this basis, got {axes.dim}; select the "
            "same parameters for both"
        )
    scores = scores_of_span(span).double()
    kept = axes.mask.to(scores.device)
    total = math.sqrt(axes.rank * span.rank)
    return {
        name: ParameterOverlap(
            numel=part.stop - part.start,
            num_kept=int(kept[part].sum()),
            leverage_share=float(scores[part].sum()) / span.rank,
            overlap=float(scores[part][kept[part]].sum()) / total,
        )
        for name, part in layout.slices().items()
    }


def scores_of_span(span: ColumnSpan, k: int | None = None) -> Tensor:
    """Return the `leverage_scores` of a validated basis."""
    k = span.rank if k is None else check_count(k, span.rank, "k", "the number of columns")
    scores = torch.empty(span.dim, dtype=compute_dtype(span), device=span.basis.device)
    for start, stop in row_blocks(span.dim, k):
        scores[start:stop] = span.basis[start:stop, :k].to(scores.dtype).square().sum(1)
    return scores


def _layout_for(pairs: Subspace, layout: ParameterLayout | None) -> ParameterLayout:
    if layout is None and isinstance(pairs, Eigenpairs):
        layout = pairs.layout
    if layout is None:
        raise ValueError(
            "expected the parameters' names and shapes, got neither `layout` nor eigenpairs that "
            "have one; pass layout=layout_of(select_parameters(model)), with the operator's "
            "`params` if it had any"
        )
    if not isinstance(layout, ParameterLayout):
        raise TypeError(f"expected layout to be a ParameterLayout, got {type(layout).__name__}")
    return layout


def _check_layout(layout: ParameterLayout, dim: int) -> None:
    if layout.numel != dim:
        raise ValueError(
            f"expected a layout of {dim} entries for this basis, got one of {layout.numel}; it "
            "has to list the parameters that the operator had"
        )
