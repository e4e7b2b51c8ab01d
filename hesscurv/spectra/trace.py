"""Stochastic estimates of the trace: XTrace, Hutch++, Hutchinson."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers.counted_operator import CountedOperator
from hesscurv.linalg.orthogonalization import orthonormalize_, project_out_
from hesscurv.linalg.random_matrices import draw_seed, make_test_matrix
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.spectra.arguments import check_estimate
from hesscurv.spectra.diagonal import exact_diagonal
from hesscurv.spectra.leave_one_out import project, sketch_range

# The fewest products that give an error bar: two samples.
_FEWEST = {"xtrace": 4, "hutch++": 4, "hutchinson": 2}


@dataclass(frozen=True)
class TraceEstimate:
    """An estimate of tr H.

    Args:
        value: The estimate.
        standard_error: The estimated standard deviation of `value`; 0 where it is exact.
        num_matvecs: Products with H that were used.
        method: "xtrace", "hutch++", "hutchinson", or "exact".
    """

    value: float
    standard_error: float
    num_matvecs: int
    method: str


def trace(
    H: Any,
    num_matvecs: int,
    method: str = "xtrace",
    *,
    generator: torch.Generator | None = None,
    block_size: int = 32,
    progress: bool = False,
) -> TraceEstimate:
    """Estimate the trace of a symmetric operator from products with random vectors.

    With n products, and P the orthogonal projector onto the range of H times some test vectors:

    - "xtrace" (default): the mean over i of ``tr(P_i H) + c_i nu_i^T H nu_i``,
      ``nu_i = (I - P_i) omega_i``, where P_i comes from all of the n/2 test vectors but omega_i and
      ``c_i = (D - rank P_i) / ||nu_i||^2`` rids the second term of its length's variance.
    - "hutch++": ``tr(P H)`` with P from n/3 test vectors, and the mean of
      ``omega^T (I - P) H (I - P) omega`` over n/3 others.
    - "hutchinson": the mean of ``omega^T H omega`` over n random sign vectors.

    The error of Hutchinson falls as ``||H||_F / sqrt(n)``. The other two remove the large
    eigenvalues first: their error falls as 1/n at least, and like the spectrum where that decays
    fast. There XTrace is the most accurate at equal products; on a flat spectrum it is about as
    good as Hutchinson. When n >= D, the diagonal itself is measured instead, in D products; XTrace
    and Hutch++ are also exact, to rounding, where H's rank is below n/2 and n/3.

    Args:
        H: A hesscurv operator, a dense symmetric tensor (D, D), or any object with `shape`,
            `dtype`, `device` and ``@`` on tensors (D,) and (D, b); float32 or float64.
        num_matvecs: n, the most products; at least 4, for "hutchinson" 2, or D. XTrace leaves one
            over when it is odd.
        method: "xtrace", "hutch++" or "hutchinson".
        generator: Source of the test vectors' seeds; default a new one with seed 0. The global
            generator is never used.
        block_size: Products at a time; default 32.
        progress: Whether to show a progress bar over the products.

    Returns:
        The estimate with its standard error, which comes from the m samples' scatter,
        ``sqrt(sum_i (t_i - t)^2 / (m (m - 1)))``. Few samples give a coarse one. XTrace's samples
        share most of their test vectors; the paper counts them as independent, so that the result
        tends to be too small, most where m falls just short of the number of large eigenvalues.

    Raises:
        TypeError: If H is no operator, or not float32 or float64, or a number is not an int.
        ValueError: If an argument is out of range, or a product has NaN or inf entries.

    Cost: n products. Storage: n/2 D floats (XTrace), n/3 D (Hutch++) and some blocks, or blocks
    alone (Hutchinson); about 1.5 n^2 D, n^2 D and n D multiply-adds.

    References:
        Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace
        estimation", SIAM J. Matrix Anal. Appl. 45 (2024), arXiv 2301.07825, sections 1.2, 2.1-2.3.
        Meyer, Musco, Musco, Woodruff, "Hutch++: optimal stochastic trace estimation" (2021),
        algorithm 1.
        Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines" (1990).
    """
    H, generator = check_estimate(H, num_matvecs, method, _FEWEST, block_size, generator)
    dim = H.shape[0]
    total = min(num_matvecs, dim)
    H.expect(total)
    with CountedOperator(H, total, "trace", progress) as counted:
        if num_matvecs >= dim:
            value = float(exact_diagonal(counted, block_size).sum(dtype=torch.float64))
            return TraceEstimate(value, 0.0, counted.num_matvecs, "exact")
        samples = _METHODS[method](counted, num_matvecs, generator, block_size)
    error = float(samples.std()) / math.sqrt(len(samples))
    return TraceEstimate(float(samples.mean()), error, counted.num_matvecs, method)


def _xtrace(
    H: LinearOperator, num_matvecs: int, generator: torch.Generator, block_size: int
) -> Tensor:
    """Return the estimates that leave one test vector each out of the range."""
    dim = H.shape[0]
    # Gaussian: what is left of a test vector has a random direction, whatever its length was.
    omega = make_test_matrix(
        "gaussian", dim, num_matvecs // 2, draw_seed(generator), H.dtype, H.device
    )
    sketch = sketch_range(H, omega, block_size)
    G_rr = project(H, sketch.Q_rD, block_size, None)
    R, S, W, U = sketch.R_rm, sketch.S_rm, sketch.W_rm, sketch.U_rm
    inside = G_rr.trace() - (S * (G_rr @ S)).sum(dim=0)
    # nu^T H nu, nu = omega - Q u, in small matrices: H omega = Q R, by symmetry Q^T H omega = R.
    outside = (S * R).sum(dim=0) * (S * W).sum(dim=0) - (U * (R - G_rr @ U)).sum(dim=0)
    rank = len(R) - (S * S).sum(dim=0)
    return inside + outside * (dim - rank) / (sketch.norms_squared - (U * U).sum(dim=0))


def _hutchpp(
    H: LinearOperator, num_matvecs: int, generator: torch.Generator, block_size: int
) -> Tensor:
    """Return the trace on a sketched range, and Hutchinson's samples of the rest added to it."""
    dim, m = H.shape[0], num_matvecs // 3
    omega = make_test_matrix("rademacher", dim, m, draw_seed(generator), H.dtype, H.device)
    Y_mD = torch.empty(m, dim, dtype=H.dtype, device=H.device)
    for start in range(0, m, block_size):
        stop = min(start + block_size, m)
        Y_mD[start:stop] = (H @ omega.columns(start, stop)).mT
    Q_rD, _ = orthonormalize_(Y_mD)
    inside = project(H, Q_rD, block_size, None).trace()
    return inside + _samples(H, num_matvecs - 2 * m, generator, block_size, Q_rD)


def _hutchinson(
    H: LinearOperator, num_matvecs: int, generator: torch.Generator, block_size: int
) -> Tensor:
    return _samples(H, num_matvecs, generator, block_size, None)


def _samples(
    H: LinearOperator,
    count: int,
    generator: torch.Generator,
    block_size: int,
    Q_rD: Tensor | None,
) -> Tensor:
    """Return ``x^T H x`` for random signs x, projected out of a range where there is one."""
    probes = make_test_matrix(
        "rademacher", H.shape[0], count, draw_seed(generator), H.dtype, H.device
    )
    samples = []
    for start in range(0, count, block_size):
        X_bD = probes.columns(start, min(start + block_size, count)).mT
        if Q_rD is not None:
            project_out_(X_bD, [Q_rD])
        Y_bD = (H @ X_bD.mT).mT
        samples.append((X_bD * Y_bD).sum(dim=1, dtype=torch.float64).cpu())
    return torch.cat(samples)


_METHODS: dict[str, Callable[[LinearOperator, int, torch.Generator, int], Tensor]] = {
    "xtrace": _xtrace,
    "hutch++": _hutchpp,
    "hutchinson": _hutchinson,
}
