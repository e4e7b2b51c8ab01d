"""The method "sample_space" of `eigsh`: eigenpairs from the Gram matrix of the rows."""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.residuals import ConvergenceWarning, converged
from hesscurv.eigensolvers.sample_space.sample_space import SampleSpace
from hesscurv.interface.progress_bar import ProgressBar
from hesscurv.linalg.device_memory import used_memory
from hesscurv.linalg.orthogonalization import orthonormalize_
from hesscurv.linalg.random_matrices import default_generator
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.sample_space.output_rows import NoRowsError
from hesscurv.operators.sample_space.sample_rows import SampleRows

# Between the rows and a product: what is more than rounding is part of the residuals, and what is
# more than that is another matrix.
_ROUNDING, _LARGEST_GAP = 1e4, 1e-4
_NOT_ORTHONORMAL = 1e3  # roundings, above which vectors are orthonormalised


def sample_space(
    H: LinearOperator,
    k: int,
    *,
    which: str = "LM",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Eigenpairs:
    r"""Compute the k largest eigenpairs of a Gauss-Newton or Fisher matrix from its rows.

    :math:`H = R^T R` with one row for each sample and rank of the curvature in its outputs;
    :math:`K = R R^T`, :math:`K u = \lambda u`, :math:`v = R^T u / \sqrt\lambda`: exact in one pass,
    with multiplicities and without a starting vector; see `SampleSpace`.

    Squares halve the digits: eigenvalues below about 3e-6 of the largest are noise in float32.

    Args:
        H: A `GGNOperator` or an `EmpiricalFisherOperator`, in a single process.
        k: Number of pairs, at most the number of eigenvalues that are not noise.
        which: "LM" or "LA", the same here.
        tol: As in `eigsh`.
        max_matvecs: At least 1: one product is compared with the rows.
        generator: Source of the vector for that comparison.
        progress: Whether to show a progress bar over the four passes.

    Returns:
        The eigenpairs, with residuals :math:`\|R^T R v - \lambda v\|` measured on the rows.

    Raises:
        NoRowsError: As for `SampleSpace`; or if the rows do not reproduce a product with H.
        ValueError: If k is too large, or ``which="SA"``.

    Warns:
        ConvergenceWarning: If residuals exceed the tolerance, at the end of the spectrum that the
            dtype carries.

    Cost: a product, a forward pass and a backward pass for each row of a sample, n^2 D and 3 n k D
    multiply-adds at most; k D numbers for the eigenvectors.
    """
    start = time.perf_counter()
    if which == "SA":
        raise ValueError(
            "expected which='LM' or 'LA', got 'SA': the smallest eigenvalues of a matrix of low "
            "rank are zero; use method='block_krylov'"
        )
    generator = default_generator(generator)
    bar = ProgressBar(4, "sample space", " passes", progress, partial(used_memory, H.device))
    with torch.inference_mode(False), torch.no_grad(), bar:
        space = SampleSpace(H)
        bar.update(note=f"{len(space):,} rows")
        weights_nk = space.weights(k)
        gap = _compare(H, space.rows, generator)
        V_kD = space.rows.combine(weights_nk)
        bar.update()
        values, W_nk = _ritz(space.rows, V_kD)
        bar.update()
        residuals = _residuals(space.rows, V_kD, values, W_nk)
        if gap > _ROUNDING * torch.finfo(H.dtype).eps:
            residuals = residuals + gap * values  # a model that computes in a narrower dtype inside
        bar.update()
    eigenvalues = values.to(H.dtype)
    eps = torch.finfo(H.dtype).eps
    done = converged(residuals, values, tol, eps)
    if not bool(done.all()):
        warnings.warn(
            f"{int((~done).sum())} of {k} eigenpairs have residuals above tol={tol:g}: squares of "
            f"the rows in {H.dtype} carry no more digits; use compute_dtype=torch.float64, a "
            "larger tol, or method='block_krylov'",
            ConvergenceWarning,
            stacklevel=3,
        )
    info: dict[str, Any] = {
        "tol": tol,
        "rows": len(space),
        "seconds": time.perf_counter() - start,
    }
    return Eigenpairs(
        eigenvalues,
        V_kD.mT,
        residuals.to(H.dtype),
        done,
        num_matvecs=1,
        method="sample_space",
        layout=space.rows.layout,
        info=info,
    )


def _compare(H: LinearOperator, rows: SampleRows, generator: torch.Generator) -> float:
    """Require a product by the rows to be that of the operator; return their relative gap."""
    x_D = torch.randn(H.shape[0], generator=generator, dtype=torch.float64, device="cpu")
    x_D = x_D.to(H.device, H.dtype)
    expected_D = H @ x_D
    got_D = rows.combine(rows.apply(x_D.unsqueeze(0)))[0]
    gap = float((got_D - expected_D).norm() / expected_D.norm().clamp(min=1e-300))
    if not gap <= max(_LARGEST_GAP, _ROUNDING * torch.finfo(H.dtype).eps):
        raise NoRowsError(
            f"the rows by sample give a product that differs by {gap:.1e} from the operator's: "
            "samples of a batch depend on each other, or a layer does more than its type says; use "
            "method='block_krylov'"
        )
    return gap


def _ritz(rows: SampleRows, V_kD: Tensor) -> tuple[Tensor, Tensor]:
    """Return Rayleigh quotients and R V; vectors that are not orthonormal are made so, in place."""
    eps = torch.finfo(V_kD.dtype).eps
    probe_k = torch.randn(
        len(V_kD), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    ).to(V_kD)
    gap = float((V_kD @ (V_kD.mT @ probe_k) - probe_k).norm() / probe_k.norm())
    if gap > _NOT_ORTHONORMAL * eps:
        orthonormalize_(V_kD)
        W_nk = rows.apply(V_kD)
        values, Y_kk = torch.linalg.eigh(W_nk.mT @ W_nk)
        Y_kk = Y_kk.flip(1)
        V_kD.copy_(Y_kk.mT.to(V_kD) @ V_kD)
        return values.flip(0), W_nk @ Y_kk
    W_nk = rows.apply(V_kD)
    return W_nk.square().sum(0), W_nk


def _residuals(rows: SampleRows, V_kD: Tensor, values: Tensor, W_nk: Tensor) -> Tensor:
    """Return ||R^T W - V Lambda|| of each pair, parameter by parameter; (k,), float64."""
    square_k = torch.zeros_like(values)
    weights_nk = W_nk.to(V_kD.dtype)
    for place, parameter in rows.parameters():
        product_kP = V_kD.new_empty(len(V_kD), parameter.numel)
        parameter.combine_into(product_kP, weights_nk)
        product_kP -= values.to(V_kD).unsqueeze(1) * V_kD[:, place]
        square_k += torch.linalg.vector_norm(product_kP, dim=1, dtype=torch.float64).square()
    return square_k.sqrt()
