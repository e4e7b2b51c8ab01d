"""Distances between subspaces on the Grassmann manifold, and their overlap."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hesscurv.metrics.angles import angles_of_spans, cross, rows_at
from hesscurv.metrics.subspace import CoordinateSpan, Span, Subspace, as_spans


def overlap(a: Subspace, b: Subspace) -> float:
    """Return the overlap of two subspaces, the share of one that lies in the other.

    ``overlap = norm_F(A^T B)^2 / sqrt(k_a k_b) = tr(P_A P_B) / (norm_F(P_A) norm_F(P_B))``, with
    orthonormal bases A, B and projectors P. It is 1 for equal spaces and only then, 0 for
    orthogonal ones. For equal ranks k it is the mean of cos^2 over the principal angles. For a
    mask and a basis of equal rank it is the mean leverage score over the mask. The chance level is
    sqrt(k_a k_b) / D, see `chance_overlap`.

    Args:
        a: A bool mask (D,), a basis (D, k_a) with orthonormal columns, or `Eigenpairs`.
        b: Likewise, of the same D; its rank may differ.

    Returns:
        A number in [0, 1], dimensionless.

    Raises:
        TypeError: If an argument is not a subspace.
        ValueError: If D differs, a mask is empty, or a basis is not finite or not orthonormal.

    Cost:
        Two bases: 2 D k_a k_b flops, and k_a k_b floats beside the bases. A mask and a basis: the
        basis is read once to check it, then only at the mask's rows.

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701, for equal ranks; Gur-Ari, Roberts and Dyer,
        arXiv 1812.04754, for the normaliser of unequal ones, which makes it the cosine of the
        angle between the projectors.

    Example:
        >>> hesscurv.overlap(torch.tensor([True, True, False]), torch.tensor([False, True, True]))
        0.5
    """
    span_a, span_b = as_spans(a, b)
    return overlap_of_spans(span_a, span_b)


def geodesic_distance(a: Subspace, b: Subspace, *, normalized: bool = False) -> float:
    """Return the geodesic distance, the length of the shortest path on the Grassmann manifold.

    ``norm2(t)`` with the principal angles t.

    Args:
        a: A bool mask (D,), a basis (D, k) with orthonormal columns, or `Eigenpairs`.
        b: Likewise, of the same D and k.
        normalized: Divide by the distance of orthogonal spaces, sqrt(k) pi/2; off by default.

    Returns:
        The distance, in radians unless normalised.

    Raises:
        TypeError: If an argument is not a subspace.
        ValueError: If D or k differ, a mask is empty, or a basis is not finite or not orthonormal.

    Cost:
        As `principal_angles`; `grassmann_distances` returns all distances at that cost.

    References:
        Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 4.3.

    Example:
        >>> a = torch.tensor([True, True, False, False])
        >>> b = torch.tensor([True, False, True, False])
        >>> round(hesscurv.geodesic_distance(a, b), 4)
        1.5708
    """
    return _distance("geodesic", a, b, normalized)


def chordal_2_distance(a: Subspace, b: Subspace, *, normalized: bool = False) -> float:
    """Return the chordal 2-norm distance, the least spectral norm of a difference of bases.

    ``max 2 sin(t/2)`` with the principal angles t.

    Args:
        a: A bool mask (D,), a basis (D, k) with orthonormal columns, or `Eigenpairs`.
        b: Likewise, of the same D and k.
        normalized: Divide by the distance of orthogonal spaces, sqrt(2); off by default.

    Returns:
        The distance, dimensionless.

    Raises:
        TypeError: If an argument is not a subspace.
        ValueError: If D or k differ, a mask is empty, or a basis is not finite or not orthonormal.

    Cost:
        As `principal_angles`; `grassmann_distances` returns all distances at that cost.

    References:
        Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 4.3.

    Example:
        >>> a = torch.tensor([True, True, False, False])
        >>> b = torch.tensor([True, False, True, False])
        >>> round(hesscurv.chordal_2_distance(a, b), 4)
        1.4142
    """
    return _distance("chordal_2", a, b, normalized)


def chordal_f_distance(a: Subspace, b: Subspace, *, normalized: bool = False) -> float:
    """Return the chordal Frobenius distance, the least Frobenius norm of a difference of bases.

    ``norm2(2 sin(t/2))`` with the principal angles t.

    Args:
        a: A bool mask (D,), a basis (D, k) with orthonormal columns, or `Eigenpairs`.
        b: Likewise, of the same D and k.
        normalized: Divide by the distance of orthogonal spaces, sqrt(2 k); off by default.

    Returns:
        The distance, dimensionless.

    Raises:
        TypeError: If an argument is not a subspace.
        ValueError: If D or k differ, a mask is empty, or a basis is not finite or not orthonormal.

    Cost:
        As `principal_angles`; `grassmann_distances` returns all distances at that cost.

    References:
        Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 4.3.

    Example:
        >>> a = torch.tensor([True, True, False, False])
        >>> b = torch.tensor([True, False, True, False])
        >>> round(hesscurv.chordal_f_distance(a, b), 4)
        1.4142
    """
    return _distance("chordal_f", a, b, normalized)


def projection_2_distance(a: Subspace, b: Subspace, *, normalized: bool = False) -> float:
    """Return the projection 2-norm distance, the spectral norm of the projectors' difference.

    ``max sin t`` with the principal angles t.

    Args:
        a: A bool mask (D,), a basis (D, k) with orthonormal columns, or `Eigenpairs`.
        b: Likewise, of the same D and k.
        normalized: Divide by the distance of orthogonal spaces, which is 1: no effect.

    Returns:
        The distance in [0, 1], dimensionless.

    Raises:
        TypeError: If an argument is not a subspace.
        ValueError: If D or k differ, a mask is empty, or a basis is not finite or not orthonormal.

    Cost:
        As `principal_angles`; `grassmann_distances` returns all distances at that cost.

    References:
        Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 4.3.

    Example:
        >>> a = torch.tensor([True, True, False, False])
        >>> b = torch.tensor([True, False, True, False])
        >>> round(hesscurv.projection_2_distance(a, b), 4)
        1.0
    """
    return _distance("projection_2", a, b, normalized)


def projection_f_distance(a: Subspace, b: Subspace, *, normalized: bool = False) -> float:
    """Return the projection Frobenius distance between two subspaces.

    ``norm2(sin t) = norm_F(P_A - P_B) / sqrt(2)`` with the principal angles t and the projectors
    P; ``overlap = 1 - projection_f^2 / k``.

    Args:
        a: A bool mask (D,), a basis (D, k) with orthonormal columns, or `Eigenpairs`.
        b: Likewise, of the same D and k.
        normalized: Divide by the distance of orthogonal spaces, sqrt(k); off by default.

    Returns:
        The distance, dimensionless.

    Raises:
        TypeError: If an argument is not a subspace.
        ValueError: If D or k differ, a mask is empty, or a basis is not finite or not orthonormal.

    Cost:
        As `principal_angles`; `grassmann_distances` returns all distances at that cost.

    References:
        Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 4.3.

    Example:
        >>> a = torch.tensor([True, True, False, False])
        >>> b = torch.tensor([True, False, True, False])
        >>> round(hesscurv.projection_f_distance(a, b), 4)
        1.0
    """
    return _distance("projection_f", a, b, normalized)


def fubini_study_distance(a: Subspace, b: Subspace, *, normalized: bool = False) -> float:
    """Return the Fubini-Study distance, the angle between the spaces' volume forms.

    ``arccos prod cos t`` with the principal angles t.

    Args:
        a: A bool mask (D,), a basis (D, k) with orthonormal columns, or `Eigenpairs`.
        b: Likewise, of the same D and k.
        normalized: Divide by the distance of orthogonal spaces, pi/2; off by default.

    Returns:
        The distance, in radians unless normalised.

    Raises:
        TypeError: If an argument is not a subspace.
        ValueError: If D or k differ, a mask is empty, or a basis is not finite or not orthonormal.

    Cost:
        As `principal_angles`; `grassmann_distances` returns all distances at that cost.

    References:
        Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 4.3.

    Example:
        >>> a = torch.tensor([True, True, False, False])
        >>> b = torch.tensor([True, False, True, False])
        >>> round(hesscurv.fubini_study_distance(a, b), 4)
        1.5708
    """
    return _distance("fubini_study", a, b, normalized)


def grassmann_distances(a: Subspace, b: Subspace, *, normalized: bool = False) -> dict[str, float]:
    """Return all six distances between two subspaces, from one set of principal angles.

    Args:
        a: A bool mask (D,), a basis (D, k) with orthonormal columns, or `Eigenpairs`.
        b: Likewise, of the same D and k.
        normalized: Divide each by its value for orthogonal spaces, the largest there is where
            2 k <= D; off by default.

    Returns:
        A dict with the keys geodesic, chordal_2, chordal_f, projection_2, projection_f and
        fubini_study; see the functions of these names for formulas and units.

    Raises:
        TypeError: If an argument is not a subspace.
        ValueError: If D or k differ, a mask is empty, or a basis is not finite or not orthonormal.

    Cost:
        That of `principal_angles`.

    References:
        Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20 (1998), section 4.3; Fernandez et
        al., TMLR 2025, arXiv 2504.14701, for the normalisers.

    Example:
        >>> a = torch.tensor([True, True, False, False])
        >>> b = torch.tensor([True, False, True, False])
        >>> distances = hesscurv.grassmann_distances(a, b, normalized=True)
        >>> round(distances["projection_f"], 4)
        0.7071
    """
    angles = _angles_at_equal_rank(a, b)
    return {name: _evaluate(name, angles, normalized) for name in _FORMULAS}


def overlap_of_spans(a: Span, b: Span) -> float:
    """Return the `overlap` of two validated spans."""
    return _squared_cosines(a, b) / math.sqrt(a.rank * b.rank)


def _squared_cosines(a: Span, b: Span) -> float:
    if isinstance(a, CoordinateSpan):
        if isinstance(b, CoordinateSpan):
            return float((a.mask & b.mask).sum())
        return float(sum(rows.double().square().sum() for rows in rows_at(a, b)))
    if isinstance(b, CoordinateSpan):
        return _squared_cosines(b, a)
    return float(cross(a, b).square().sum())


def _angles_at_equal_rank(a: Subspace, b: Subspace) -> Tensor:
    span_a, span_b = as_spans(a, b)
    if span_a.rank != span_b.rank:
        raise ValueError(
            f"expected two subspaces of equal rank, got ranks {span_a.rank} and {span_b.rank}: "
            "spaces of different ranks lie on different manifolds; truncate one, or use overlap "
            "or principal_angles, which are defined for any two"
        )
    return angles_of_spans(span_a, span_b)


def _fubini_study(angles: Tensor) -> Tensor:
    # arccos of a product near 1 would lose half of the digits, as arccos of one cosine does. The
    # logarithm of the product gives its sine as well.
    near_0 = torch.log1p(-angles.sin().square()) / 2
    log_cosine = torch.where(angles < math.pi / 4, near_0, angles.cos().log()).sum()
    return torch.atan2((-torch.expm1(2 * log_cosine)).sqrt(), log_cosine.exp())


# For each distance: its formula, and its value for orthogonal spaces of rank k.
_FORMULAS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], float]]] = {
    "geodesic": (lambda t: t.norm(), lambda k: math.sqrt(k) * math.pi / 2),
    "chordal_2": (lambda t: 2 * (t / 2).sin().max(), lambda k: math.sqrt(2)),
    "chordal_f": (lambda t: 2 * (t / 2).sin().norm(), lambda k: math.sqrt(2 * k)),
    "projection_2": (lambda t: t.sin().max(), lambda k: 1.0),
    "projection_f": (lambda t: t.sin().norm(), lambda k: math.sqrt(k)),
    "fubini_study": (_fubini_study, lambda k: math.pi / 2),
}


def _distance(name: str, a: Subspace, b: Subspace, normalized: bool) -> float:
    return _evaluate(name, _angles_at_equal_rank(a, b), normalized)


def _evaluate(name: str, angles: Tensor, normalized: bool) -> float:
    formula, maximum = _FORMULAS[name]
    value = float(formula(angles))
    return value / maximum(len(angles)) if normalized else value
