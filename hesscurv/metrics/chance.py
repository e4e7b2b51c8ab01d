"""Chance level of the overlap: mean, standard deviation and z-score."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from hesscurv.metrics.grassmann import overlap_of_spans
from hesscurv.metrics.leverage import scores_of_span
from hesscurv.metrics.subspace import (
    ColumnSpan,
    CoordinateSpan,
    Subspace,
    as_spans,
    check_count,
)

Against = Literal["random_space", "random_mask"]


class ChanceOverlap(NamedTuple):
    """Mean and standard deviation of an overlap under chance, both dimensionless.

    Attributes:
        mean: The mean.
        std: The standard deviation.

    Example:
        >>> hesscurv.chance_overlap(100, 10000).mean
        0.01
    """

    mean: float
    std: float


def chance_overlap(
    k: int, D: int, *, k2: int | None = None, against: Against = "random_space"
) -> ChanceOverlap:
    """Return mean and standard deviation of the overlap of a fixed and a random subspace.

    With ranks k and k2 the mean is ``sqrt(k k2) / D``, which is k/D for equal ranks. The standard
    deviation is the square root of

    - ``2 (D - k)(D - k2) / (D^2 (D - 1)(D + 2))`` against a uniformly random space, whether the
      fixed subspace is a mask or not.
    - ``(D - k)(D - k2) / (D^2 (D - 1))`` for a fixed mask against a uniformly random mask
      (hypergeometric). For a random mask against a fixed space that is not a mask, it depends on
      the leverage scores of the space: see `overlap_z_score`.

    Args:
        k: Rank of the first subspace, 1 <= k <= D.
        D: Dimension of the ambient space.
        k2: Rank of the second; k by default.
        against: The random subspace: ``"random_space"`` (default) or ``"random_mask"``, for two
            masks.

    Returns:
        A named tuple (mean, std).

    Raises:
        TypeError: If k, D or k2 is not an integer.
        ValueError: If a rank is not between 1 and D, or `against` is neither of the two.

    Cost:
        None.

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701, for the mean. The variance follows from the
        second moments of a uniformly random projector, fixed by invariance under rotation:
        Chikuse, Statistics on Special Manifolds, 2003. Exact at every D.

    Example:
        >>> mean, std = hesscurv.chance_overlap(1, 2)
        >>> mean, round(std, 4)
        (0.5, 0.3536)
    """
    D = check_count(D, 2**62, "D", "a dimension")
    k = check_count(k, D, "k", "D")
    k2 = k if k2 is None else check_count(k2, D, "k2", "D")
    _check_against(against)
    mean = math.sqrt(k * k2) / D
    if D == 1:
        return ChanceOverlap(mean, 0.0)
    # Let P have rank k2. E[tr(E P)^2] for a projector E of rank k needs E[P_ii^2] and
    # E[P_ii P_jj]. Rotation leaves E[P_ii^2] = k2 (k2 + 2) / (D (D + 2)), the second moment of a
    # beta variable; tr P = k2 then gives the mixed moment. For random masks P_ii^2 = P_ii.
    variance = (D - k) * (D - k2) / (D * D * (D - 1))
    if against == "random_space":
        variance *= 2 / (D + 2)
    return ChanceOverlap(mean, math.sqrt(variance))


def overlap_z_score(a: Subspace, b: Subspace, *, against: Against = "random_space") -> float:
    """Return the z-score of an overlap relative to its chance level.

    ``z = (overlap(a, b) - mean) / std``. Scores in the hundreds are usual for networks: they show
    that the overlap is not chance, not that it is large.

    Args:
        a: A bool mask (D,), a basis (D, k_a) with orthonormal columns, or `Eigenpairs`.
        b: Likewise, of the same D; its rank may differ.
        against: The null model: ``"random_space"`` (default) replaces one of the two by a
            uniformly random space of its rank. ``"random_mask"`` replaces the mask by a uniformly
            random mask of its size. It is stricter for a space that lies along few coordinates,
            since the overlap of masks then varies more:
            ``std^2 = (D - k_a) / (D (D - 1) k_b) sum_i (l_i - k_b/D)^2`` with b's leverage
            scores l.

    Returns:
        The score, dimensionless; negative below chance.

    Raises:
        TypeError: If an argument is not a subspace.
        ValueError: If D differs, a mask is empty, a basis is not finite or not orthonormal, no
            argument is a mask for ``"random_mask"``, or the overlap cannot vary: a rank is D, or
            all leverage scores are equal.

    Cost:
        As `overlap`; against random masks, also `leverage_scores`.

    References:
        As `chance_overlap`; Cochran, Sampling Techniques, 1977, theorem 2.2, for random masks.

    Example:
        >>> mask = hesscurv.best_mask(pairs)
        >>> hesscurv.overlap_z_score(mask, pairs) > 0
        True
    """
    _check_against(against)
    span_a, span_b = as_spans(a, b)
    axes, other = (span_a, span_b) if isinstance(span_a, CoordinateSpan) else (span_b, span_a)
    if against == "random_mask" and not isinstance(axes, CoordinateSpan):
        raise ValueError(
            "expected a mask as one argument with against='random_mask', got two bases; use "
            "against='random_space'"
        )
    if against == "random_mask" and isinstance(other, ColumnSpan):
        chance = _random_mask_chance(axes.rank, other)
    else:
        chance = chance_overlap(axes.rank, axes.dim, k2=other.rank, against=against)
    # Equal leverage scores differ by some eps due to rounding.
    if chance.std <= 1e-12 * chance.mean:
        raise ValueError(
            f"expected an overlap that can vary, got ranks {span_a.rank} and {span_b.rank} in "
            f"D={span_a.dim} with the overlap always at {chance.mean:.3g}; there is no z-score"
        )
    return (overlap_of_spans(span_a, span_b) - chance.mean) / chance.std


def _random_mask_chance(k: int, space: ColumnSpan) -> ChanceOverlap:
    """Return mean and deviation of the overlap of random k-masks with a fixed space."""
    D, rank = space.dim, space.rank
    mean = math.sqrt(k * rank) / D
    if k == D:
        return ChanceOverlap(mean, 0.0)
    spread = float((scores_of_span(space).double() - rank / D).square().sum())
    # Variance of a sum over k out of D drawn without replacement, over the normaliser k * rank.
    return ChanceOverlap(mean, math.sqrt((D - k) * spread / (D * (D - 1) * rank)))


def _check_against(against: str) -> None:
    if against not in ("random_space", "random_mask"):
        raise ValueError(f"expected against to be 'random_space' or 'random_mask', got {against!r}")
