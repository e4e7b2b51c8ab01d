"""Saliency: what the loss gains when a single weight is set to zero, by the top eigenspace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.pruning.curvature.eigenspace_model import (
    EigenspaceCurvature,
    quadratic_model_of,
    read_curvature,
)
from hesscurv.pruning.weights import (
    Weight,
    WeightSelection,
    current_mask,
    current_parameter,
    find_weights,
)

_KINDS = ("obd", "obs", "leverage")


def saliency(
    model: nn.Module,
    pairs: Eigenpairs,
    kind: str = "obd",
    *,
    diagonal: Tensor | None = None,
    gradient: Tensor | None = None,
    negative: str = "abs",
    damping: float | None = None,
    weights: WeightSelection = None,
) -> dict[Weight, Tensor]:
    """Return a score for each entry of the weights to prune: the lowest are to go first.

    With ``H = V L V^T + D0`` from the eigenpairs (L, V) and the gradient g, the score of w_i is

    - "obd": ``w_i^2 h_ii / 2 - g_i w_i`` with ``h_ii = d_i + sum_j lambda_j V_ij^2``, the change of
      the loss when w_i goes and all others stay;
    - "obs": ``(w_i - [H^-1 g]_i)^2 / (2 [H^-1]_ii)``, what removing w_i costs when all others
      follow: the constrained minimum less the free one;
    - "leverage": ``sum_j V_ij^2``. The mask of the k largest is the one of k entries that overlaps
      most with the eigenspace; the values of the weights do not matter.

    "obs" takes the inverse on the weights that are scored: biases and other entries stand still.
    A pruned weight enters with zeros where it is masked.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.
        pairs: The top eigenpairs, with the layout of the model's parameters, dense or pruned.
        kind: "obd", "obs" or "leverage".
        diagonal: Shape (D,), floating: an estimate of the Hessian's own diagonal, such as
            ``hesscurv.diagonal(H, num_matvecs).values`` or mean squared gradients. Then
            ``d_i = max(diagonal_i - sum_j lambda_j V_ij^2, damping)``; without, `damping`.
        gradient: Shape (D,), floating: the loss's gradient, for "obd" and "obs"; zeros by default.
        negative: What becomes of negative eigenvalues: "abs", their magnitudes are used; "clip",
            they are left out; "keep", for "obd" alone, they count against the score, and d_i is
            ``diagonal_i - sum_j lambda_j V_ij^2`` whatever its sign.
        damping: Not negative, and for "obs" positive, in units of the eigenvalues. By default
            |lambda_k|, the only bound that the pairs give on the rest, and 1 % of that with a
            `diagonal`; at least 10 eps |lambda_1|. For "keep" it is zero by default and not to be
            given with a `diagonal`.
        weights: Which weights, as in `find_weights`. By default those that the layout has.

    Returns:
        A dict from `Weight`, equal to ``(module, "weight")``, to a tensor of the weight's shape on
        its device, in the promoted dtype of weights and eigenvectors, at least float32. It is what
        `curvature_global` takes.

    Raises:
        TypeError: If `pairs` are no eigenpairs, or a vector is no floating tensor.
        ValueError: If the kind or `negative` is unknown or they do not go together; the pairs have
            no layout, or it lacks weights that `weights` asks for, or has none or one in another
            shape; a vector has another D or is not finite; the damping is out of range; or
            "leverage" is given what it does not use.

    Cost:
        O(D k) and the scores for "obd" and "leverage"; O(D k^2) and about three copies of V for
        "obs".

    References:
        LeCun, Denker and Solla, NIPS 1989, equation (5), and Hassibi and Stork, NIPS 1992, equation
        (5), both without first-order terms; Fernandez et al., TMLR 2025, arXiv 2504.14701, for the
        overlap.
    """
    if kind not in _KINDS:
        raise ValueError(f"expected kind 'obd', 'obs' or 'leverage', got {kind!r}")
    if kind == "obs":
        return _obs(model, pairs, diagonal, gradient, negative, damping, weights)
    if kind == "leverage" and any(x is not None for x in (diagonal, gradient, damping)):
        raise ValueError(
            "expected no diagonal, gradient or damping for kind='leverage', which uses the "
            "eigenvectors alone"
        )
    curvature = read_curvature(model, pairs, weights, diagonal, gradient, negative, damping)
    out = {}
    for name, weight in curvature.weights.items():
        if kind == "leverage":
            scores = curvature.weighted_squares(name, torch.ones_like(curvature.used))
        else:
            scores = _obd(curvature, name)
        parameter = current_parameter(*weight)
        out[weight] = scores.view(parameter.shape).to(parameter.device)
    return out


def _obd(curvature: EigenspaceCurvature, name: str) -> Tensor:
    w_p = _values(curvature.weights[name]).to(curvature.used)
    h_p = curvature.rest(name) + curvature.weighted_squares(name, curvature.used)
    scores = w_p.square() * h_p / 2
    gradient = curvature.gradient_of(name)
    return scores if gradient is None else scores - gradient * w_p


def _obs(
    model: nn.Module,
    pairs: Eigenpairs,
    diagonal: Tensor | None,
    gradient: Tensor | None,
    negative: str,
    damping: float | None,
    weights: WeightSelection,
) -> dict[Weight, Tensor]:
    quadratic = quadratic_model_of(
        model,
        pairs,
        diagonal=diagonal,
        gradient=gradient,
        negative=negative,
        damping=damping,
        weights=weights,
    )
    found = find_weights(model, quadratic.layout.names)
    like = quadratic.matrix.rows[0]
    w_D = torch.cat([_values(weight).to(like) for weight in found.values()])
    system = quadratic.matrix.restrict(torch.ones_like(w_D, dtype=torch.bool))
    if quadratic.gradient is not None:
        w_D = w_D + system.solve(quadratic.mu, None, quadratic.gradient)  # -H^-1 g
    scores = w_D.square() / (2 * system.inverse_diagonal(quadratic.mu))
    parts = quadratic.layout.split(scores)
    return {w: parts[name].to(current_parameter(*w).device) for name, w in found.items()}


def _values(weight: Weight) -> Tensor:
    """The weight as the model uses it, flat."""
    values, mask = current_parameter(*weight).detach(), current_mask(*weight)
    return (values if mask is None else values * mask).flatten()
