"""Metrics between subspaces: pruning masks, eigenspaces of the Hessian, any orthonormal basis.

A `Subspace` is a bool mask (D,), a basis (D, k) with orthonormal columns, or `Eigenpairs`. A mask
with k True entries stands for the span of its k coordinate axes: masks and eigenspaces are points
of the same Grassmann manifold.
"""

from hesscurv.metrics.angles import principal_angles
from hesscurv.metrics.chance import ChanceOverlap, chance_overlap, overlap_z_score
from hesscurv.metrics.grassmann import (
    chordal_2_distance,
    chordal_f_distance,
    fubini_study_distance,
    geodesic_distance,
    grassmann_distances,
    overlap,
    projection_2_distance,
    projection_f_distance,
)
from hesscurv.metrics.leverage import (
    ParameterOverlap,
    best_mask,
    leverage_by_parameter,
    leverage_scores,
    overlap_by_k,
    overlap_by_parameter,
)
from hesscurv.metrics.masks import (
    intersection_over_union,
    magnitude_mask,
    random_mask,
    top_k_mask,
)
from hesscurv.metrics.subspace import Subspace

__all__ = [
    # Subspaces, their angles, distances and overlap
    "Subspace",
    "overlap",
    "principal_angles",
    "geodesic_distance",
    "chordal_2_distance",
    "chordal_f_distance",
    "projection_2_distance",
    "projection_f_distance",
    "fubini_study_distance",
    "grassmann_distances",
    # Masks
    "magnitude_mask",
    "random_mask",
    "top_k_mask",
    "best_mask",
    "intersection_over_union",
    # Leverage: which parameters carry a subspace
    "leverage_scores",
    "leverage_by_parameter",
    "overlap_by_k",
    "overlap_by_parameter",
    "ParameterOverlap",
    # Chance level
    "chance_overlap",
    "ChanceOverlap",
    "overlap_z_score",
]
