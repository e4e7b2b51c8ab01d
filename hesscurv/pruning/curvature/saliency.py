"""Saliency of single weights from the top eigenspace: OBD, OBS, leverage."""

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
    """Return a score for each entry of the weights to prune, lowest first.

    With ``H = V L V^T + D0`` from the eigenpairs (L, V) and the gradient g, the score of w_i is

    - "obd": ``w_i^2 h_ii / 2 - g_i w_i`` with ``h_ii = d_i + sum_j lambda_j V_ij^2``, the change of
      the loss when w_i is removed and all others are fixed;
    - "obs": ``(w_i - [H^-1 g]_i)^2 / (2 [H^-1]_ii)``, the cost of removing w_i when all others
      adapt: the constrained minimum minus the free one;
    - "leverage": ``sum_j V_ij^2``. The k largest scores form the mask of k entries with the largest
      overlap with the eigenspace, independent of the values of the weights.

    "obs" takes the inverse on the scored weights only: biases and other entries are fixed. Masked
    entries of pruned weights are zero.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.
        pairs: The top eigenpairs, with the layout of the model's parameters, dense or pruned.
        kind: "obd", "obs" or "leverage".
        diagonal: Shape (D,), floating: an estimate of the Hessian's own diagonal, such as
            ``hesscurv.diagonal(H, num_matvecs).values`` or mean squared gradients. Then
            ``d_i = max(diagonal_i - sum_j lambda_j V_ij^2, damping)``; otherwise `damping`.
        gradient: Shape (D,), floating: gradient of the loss, for "obd" and "obs"; default zeros.
        negative: Treatment of negative eigenvalues: "abs" uses their magnitudes; "clip" drops them;
            "keep", only for "obd", lets them lower the score, and d_i is
            ``diagonal_i - sum_j lambda_j V_ij^2`` whatever its sign.
        damping: Nonnegative, positive for "obs", in units of the eigenvalues. By default
            |lambda_k|, the only bound that the pairs give on the rest, and 1 % of that with a
            `diagonal`; at least 10 eps |lambda_1|. With "keep" it is zero by default and must not
            be given together with a `diagonal`.
        weights: The selected weights, as in `find_weights`. By default those in the layout.

    Returns:
        A dict from `Weight`, equal to ``(module, "weight")``, to a tensor of the weight's shape on
        its device, in the promoted dtype of weights and eigenvectors, at least float32, as accepted
        by `curvature_global`.

    Raises:
        TypeError: If `pairs` are not Eigenpairs, or a vector is not a floating tensor.
        ValueError: If the kind or `negative` is unknown or they are incompatible; the pairs have no
            layout, or it lacks selected weights, or has none or one in another shape; a vector has
            another D or is not finite; the damping is out of range; or "leverage" is given an
            argument that it does not use.

    Cost:
        O(D k) and the scores for "obd" and "leverage"; O(D k^2) and about three copies of V for
        "obs".

    References:
        LeCun, Denker and Solla, NIPS 1989, equation (5), and Hassibi and Stork, NIPS 1992, equation
        (5), both without first-order terms; Fernandez et al., TMLR 2025, arXiv 2504.14701, for the
        overlap.

    Example:
        >>> scores = hesscurv.pruning.saliency(model, pairs, kind="obd")
        >>> scores[model[0], "weight"].shape
        torch.Size([3, 4])
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
    # Nothing is masked: the inverse on all scored weights, of which only the diagonal is formed.
    system = quadratic.matrix.restrict(torch.ones_like(w_D, dtype=torch.bool))
    if quadratic.gradient is not None:
        w_D = w_D + system.solve(quadratic.mu, None, quadratic.gradient)  # -H^-1 g
    scores = w_D.square() / (2 * system.inverse_diagonal(quadratic.mu))
    parts = quadratic.layout.split(scores)
    return {w: parts[name].to(current_parameter(*w).device) for name, w in found.items()}


def _values(weight: Weight) -> Tensor:
    """The masked weight, flat."""
    values, mask = current_parameter(*weight).detach(), current_mask(*weight)
    return (values if mask is None else values * mask).flatten()
