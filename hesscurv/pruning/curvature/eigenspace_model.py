"""Quadratic model of the loss from top eigenpairs plus a diagonal.

``H = V |L| V^T + D0`` with the top eigenpairs (L, V) and a diagonal D0. Shapes: D entries of the
eigenpairs' layout, of which p belong to a weight; k pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.interface.descriptions import Described
from hesscurv.linalg.woodbury import DiagonalBlock, LowRankPlusBlocks
from hesscurv.metrics.subspace import as_column_span, row_blocks
from hesscurv.objective.parameters import ParameterLayout
from hesscurv.pruning.curvature.quadratic_model import QuadraticModel
from hesscurv.pruning.weights import (
    Weight,
    WeightSelection,
    current_parameter,
    find_weights,
)

# Least curvature of an entry with known diagonal, relative to |lambda_k|.
_DAMPING_BESIDE_DIAGONAL = 1e-2


@dataclass(frozen=True, repr=False)
class EigenspaceCurvature(Described):
    """Curvature of some of a model's weights, from eigenpairs and possibly a diagonal.

    Args:
        weights: By dense name, in the model's order.
        slices: The slice of each weight in the layout, by dense name.
        eigenvectors: V, shape (D, k).
        eigenvalues: L, shape (k,), signed.
        used: L after the treatment of negative values, shape (k,): see `negative` in
            `quadratic_model_of`.
        diagonal: Shape (D,), or None.
        gradient: Shape (D,), or None.
        damping: Least entry of D0; None to use the remainder of the diagonal unchanged.
        dtype: The dtype of the computation.
    """

    weights: dict[str, Weight]
    slices: dict[str, slice]
    eigenvectors: Tensor
    eigenvalues: Tensor
    used: Tensor
    diagonal: Tensor | None
    gradient: Tensor | None
    damping: float | None
    dtype: torch.dtype

    def rest(self, name: str) -> Tensor:
        """Return a weight's part of D0, shape (p,)."""
        part = self.slices[name]
        if self.diagonal is None:
            damping = 0.0 if self.damping is None else self.damping
            return self.used.new_full((part.stop - part.start,), damping)
        # An estimated diagonal may fall below the part explained by the pairs.
        difference = self.diagonal[part] - self.weighted_squares(name, self.eigenvalues)
        return difference if self.damping is None else difference.clamp(min=self.damping)

    def weighted_squares(self, name: str, weights_k: Tensor) -> Tensor:
        """Return ``sum_j weights_j V_ij^2`` for a weight's entries, shape (p,)."""
        part = self.slices[name]
        V_pk = self.eigenvectors[part]
        out_p = weights_k.new_empty(len(V_pk))
        for start, stop in row_blocks(len(V_pk), len(weights_k)):
            out_p[start:stop] = V_pk[start:stop].to(weights_k).square() @ weights_k
        return out_p

    def gradient_of(self, name: str) -> Tensor | None:
        """Return the gradient in a weight's entries, shape (p,), or None."""
        return None if self.gradient is None else self.gradient[self.slices[name]]


def quadratic_model_of(
    model: nn.Module,
    pairs: Eigenpairs,
    *,
    diagonal: Tensor | None = None,
    gradient: Tensor | None = None,
    negative: str = "abs",
    damping: float | None = None,
    weights: WeightSelection = None,
) -> QuadraticModel:
    """Return the quadratic model of the loss given by eigenpairs, in the weights to prune.

    ``H = V |L| V^T + D0`` on these weights; other entries of the layout are fixed.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.
        pairs: The top eigenpairs (L, V), with the layout of the model's parameters, dense or
            pruned.
        diagonal: Shape (D,), floating: an estimate of the Hessian's own diagonal, such as
            ``hesscurv.diagonal(H, num_matvecs).values`` or mean squared gradients. Then D0 is the
            remainder, ``max(diagonal_i - sum_j lambda_j V_ij^2, damping)``. Otherwise D0 is
            `damping` everywhere.
        gradient: Shape (D,), floating: gradient of the loss; zeros by default.
        negative: Treatment of negative eigenvalues: "abs" uses their magnitudes, "clip" drops them.
        damping: Positive, in units of the eigenvalues. By default |lambda_k|, the only bound that
            the pairs give on the rest, and 1 % of that with a `diagonal`; at least
            10 eps |lambda_1|, the accuracy of the eigenvalues.
        weights: The selected weights, as in `find_weights`. By default those in the layout.

    Returns:
        The model with rows ``sqrt|lambda_j| V_ij`` and mu = 1, with dense names in the order of the
        weights, in the promoted dtype of weights and eigenvectors, at least float32.

    Raises:
        TypeError: If `pairs` are not Eigenpairs, or a vector is not a floating tensor.
        ValueError: If the pairs have no layout, it lacks selected weights or has none of the model,
            or one in another shape; if a vector has another D or is not finite, the damping is not
            positive, or `negative` is unknown.

    Cost:
        A copy of the rows of V of the weights, k numbers for each entry.

    References:
        Hassibi and Stork, NIPS 1992, for the inverse from a low-rank and a diagonal part.

    Example:
        >>> quadratic = hesscurv.pruning.quadratic_model_of(model, pairs)
        >>> quadratic.num_rows, quadratic.layout.numel
        (3, 18)
    """
    if negative == "keep":
        raise ValueError("expected negative 'abs' or 'clip', got 'keep': H has to be positive")
    curvature = read_curvature(model, pairs, weights, diagonal, gradient, negative, damping)
    if not curvature.damping:
        raise ValueError("expected a positive damping, got 0; H has to be positive definite")
    shapes, rows, blocks, gradients = [], [], [], []
    # Rows sqrt|L| V^T, so that R^T R = V |L| V^T.
    scale_k = curvature.used.sqrt()
    for name, weight in curvature.weights.items():
        V_pk = curvature.eigenvectors[curvature.slices[name]].to(scale_k)
        shapes.append(tuple(current_parameter(*weight).shape))
        rows.append((V_pk * scale_k).mT.contiguous())
        blocks.append(DiagonalBlock(curvature.rest(name)))
        gradients.append(curvature.gradient_of(name))
    return QuadraticModel(
        ParameterLayout(tuple(curvature.weights), tuple(shapes)),
        LowRankPlusBlocks(rows, blocks),
        gradient=None if gradient is None else torch.cat([g for g in gradients if g is not None]),
    )


def read_curvature(
    model: nn.Module,
    pairs: Eigenpairs,
    weights: WeightSelection,
    diagonal: Tensor | None,
    gradient: Tensor | None,
    negative: str,
    damping: float | None,
) -> EigenspaceCurvature:
    """Check the arguments of `quadratic_model_of` and find the weights in the pairs' layout."""
    if not isinstance(pairs, Eigenpairs):
        raise TypeError(f"expected Eigenpairs, got {type(pairs).__name__}")
    if negative not in ("abs", "clip", "keep"):
        raise ValueError(f"expected negative 'abs', 'clip' or 'keep', got {negative!r}")
    if damping is not None and not 0 <= damping < float("inf"):
        raise ValueError(f"expected a finite damping that is not negative, got {damping!r}")
    if damping is not None and negative == "keep" and diagonal is not None:
        raise ValueError(
            "expected no damping with negative='keep' and a diagonal, which is used as it is, got "
            f"{damping!r}"
        )
    pairs = pairs.gather()
    found, slices = _find(model, pairs.layout, weights)
    basis = as_column_span(pairs, "pairs").basis
    if not bool(pairs.eigenvalues.isfinite().all()):
        raise ValueError("expected finite eigenvalues, got NaN or inf; compute the pairs again")
    dim = len(basis)
    _check_vector("diagonal", diagonal, dim)
    _check_vector("gradient", gradient, dim)
    first = current_parameter(*next(iter(found.values())))
    # At least float32: sums over k in half precision would lose the small eigenvalues.
    dtype = torch.promote_types(torch.promote_types(basis.dtype, first.dtype), torch.float32)
    values = pairs.eigenvalues.detach().to(first.device, dtype)
    used = values if negative == "keep" else values.abs()
    if negative == "clip":
        used = values.clamp(min=0)
    if damping is None and negative != "keep":
        floor = 10 * torch.finfo(pairs.eigenvalues.dtype).eps * float(values[0].abs())
        share = 1.0 if diagonal is None else _DAMPING_BESIDE_DIAGONAL
        damping = max(share * float(values[-1].abs()), floor)
    return EigenspaceCurvature(
        found,
        slices,
        basis.to(first.device),
        values,
        used,
        None if diagonal is None else diagonal.detach().to(first.device, dtype),
        None if gradient is None else gradient.detach().to(first.device, dtype),
        damping,
        dtype,
    )


def _find(
    model: nn.Module, layout: ParameterLayout | None, weights: WeightSelection
) -> tuple[dict[str, Weight], dict[str, slice]]:
    """The weights in the layout, and their slices."""
    if layout is None:
        raise ValueError(
            "expected eigenpairs with the layout of the model's parameters, got none; solve with "
            "an operator of hesscurv, or set it by dataclasses.replace(pairs, layout=...)"
        )
    selected = find_weights(model, weights)
    slices, shapes = layout.slices(), dict(zip(layout.names, layout.shapes, strict=True))
    # Dense or pruned names; a dense parameter's own name may end in "_orig", too.
    stored = {name: name if name in slices else f"{name}_orig" for name in selected}
    found = {name: weight for name, weight in selected.items() if stored[name] in slices}
    missing = [name for name in selected if name not in found]
    if not found or (missing and weights is not None):
        raise ValueError(
            f"expected eigenpairs that have the weights {missing[:8]} ({len(missing)} in all), got "
            f"a layout of {list(layout.names)[:8]} ({len(layout.names)} in all); select them with "
            "the operator's `params`"
        )
    for name, weight in found.items():
        own = tuple(current_parameter(*weight).shape)
        if own != tuple(shape := shapes[stored[name]]):
            raise ValueError(
                f"expected shape {own} for {name!r} in the eigenpairs' layout, got {shape}; "
                "compute them for this model"
            )
    return found, {name: slices[stored[name]] for name in found}


def _check_vector(what: str, vector: Tensor | None, dim: int) -> None:
    if vector is None:
        return
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        got = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
        raise TypeError(f"expected the {what} as a floating tensor ({dim},), got {got}")
    if tuple(vector.shape) != (dim,):
        raise ValueError(
            f"expected a {what} of shape ({dim},), one entry for each of the eigenvectors' rows, "
            f"got {tuple(vector.shape)}"
        )
    if not bool(vector.isfinite().all()):
        raise ValueError(f"expected a finite {what}, got NaN or inf in it")
