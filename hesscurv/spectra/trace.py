"""Stochastic trace estimation: XTrace, Hutch++, Hutchinson."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers.counted_operator import CountedOperator
from hesscurv.linalg.orthogonalization import orthonormalize_
from hesscurv.linalg.projections import project_out_
from hesscurv.linalg.random_matrices import draw_seed, make_test_matrix
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.spectra.diagonal import check_estimate, exact_diagonal
from hesscurv.spectra.leave_one_out import project, sketch_range

# The fewest products that give an error bar: two samples.
_FEWEST = {"xtrace": 4, "hutch++": 4, "hutchinson": 2}


@dataclass(frozen=True)
class TraceEstimate:
    """An estimate of tr H.

    Args:
        value: The estimate.
        standard_error: The estimated standard deviation of `value`; 0 if exact.
        num_matvecs: Matvecs with H.
        method: "xtrace", "hutch++", "hutchinson", or "exact".

    Example:
        >>> estimate = hesscurv.trace(H, num_matvecs=23)
        >>> estimate.method, estimate.standard_error
        ('exact', 0.0)
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
    """Estimate the trace of a symmetric operator from matvecs with random vectors.

    With n matvecs, and P the orthogonal projector onto the range of H times some test vectors:

    - "xtrace" (default): the mean over i of ``tr(P_i H) + c_i nu_i^T H nu_i``,
      ``nu_i = (I - P_i) omega_i``, where P_i uses all n/2 test vectors except omega_i and
      ``c_i = (D - rank P_i) / ||nu_i||^2`` removes the variance due to the length of nu_i.
    - "hutch++": ``tr(P H)`` with P from n/3 test vectors, and the mean of
      ``omega^T (I - P) H (I - P) omega`` over n/3 others.
    - "hutchinson": the mean of ``omega^T H omega`` over n random sign vectors.

    The error of Hutchinson falls as ``||H||_F / sqrt(n)``. The other two remove the large
    eigenvalues first: their error falls at least as 1/n, and like the spectrum if that decays
    faster. Then XTrace is the most accurate at equal cost; on a flat spectrum it is about as good
    as Hutchinson. If n >= D, the diagonal itself is computed, in D matvecs; XTrace and Hutch++ are
    also exact, to rounding, if the rank of H is below n/2 and n/3.

    Args:
        H: A hesscurv operator, a dense symmetric tensor (D, D), or any object with `shape`,
            `dtype`, `device` and ``@`` on tensors (D,) and (D, b); float32 or float64.
        num_matvecs: n, the maximal number of matvecs; at least 4 (2 for "hutchinson"), or D. XTrace
            leaves one unused if it is odd.
        method: "xtrace", "hutch++" or "hutchinson".
        generator: Source of the test vectors' seeds; default a new one with seed 0. The global
            generator is never used.
        block_size: Matvecs per block; default 32.
        progress: Whether to show a progress bar over the matvecs, see `eigsh`.

    Returns:
        The estimate with its standard error from the scatter of the m samples,
        ``sqrt(sum_i (t_i - t)^2 / (m (m - 1)))``, coarse for few samples. XTrace's samples share
        most of their test vectors but are treated as independent, as in the paper, so the error
        tends to be underestimated, most if m falls just short of the number of large eigenvalues.

    Raises:
        TypeError: If H is not an operator, or not float32 or float64, or a number is not an int.
        ValueError: If an argument is out of range, or a product has NaN or inf entries.

    Cost: n matvecs. Storage: n/2 D floats (XTrace), n/3 D (Hutch++) and some blocks, or only blocks
    (Hutchinson); about 1.5 n^2 D, n^2 D and n D multiply-adds.

    References:
        Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace
        estimation", SIAM J. Matrix Anal. Appl. 45 (2024), arXiv 2301.07825, sections 1.2, 2.1-2.3.
        Meyer, Musco, Musco, Woodruff, "Hutch++: optimal stochastic trace estimation" (2021),
        algorithm 1.
        Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines" (1990).

    Example:
        >>> hesscurv.trace(torch.diag(torch.tensor([1.0, 2.0, 3.0])), num_matvecs=3).value
        6.0
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
    """Return the leave-one-out estimates."""
    dim = H.shape[0]
    # Gaussian: the part of a test vector outside the range has a uniformly random direction,
    # independent of its length, as the factor c_i assumes.
    omega = make_test_matrix(
        "gaussian", dim, num_matvecs // 2, draw_seed(generator), H.dtype, H.device
    )
    sketch = sketch_range(H, omega, block_size)
    G_rr = project(H, sketch.Q_rD, block_size, None)
    R, S, W, U = sketch.R_rm, sketch.S_rm, sketch.W_rm, sketch.U_rm
    inside = G_rr.trace() - (S * (G_rr @ S)).sum(dim=0)
    # nu^T H nu, nu = omega - Q u, in small matrices: H omega = Q R, by symmetry Q^T H omega = R.
    outside = (S * R).sum(dim=0) * (S * W).sum(dim=0) - (U * (R - G_rr @ U)).sum(dim=0)
    # s_i is zero if leaving out omega_i loses no direction; otherwise the rank drops by one.
    rank = len(R) - (S * S).sum(dim=0)
    # ||nu||^2 = ||omega||^2 - ||P_i omega||^2 by Pythagoras.
    return inside + outside * (dim - rank) / (sketch.norms_squared - (U * U).sum(dim=0))


def _hutchpp(
    H: LinearOperator, num_matvecs: int, generator: torch.Generator, block_size: int
) -> Tensor:
    """Return the trace on a sketched range plus Hutchinson's samples of the rest."""
    dim, m = H.shape[0], num_matvecs // 3
    omega = make_test_matrix("rademacher", dim, m, draw_seed(generator), H.dtype, H.device)
    Y_mD = torch.empty(m, dim, dtype=H.dtype, device=H.device)
    for start in range(0, m, block_size):
        stop = min(start + block_size, m)
        Y_mD[start:stop] = (H @ omega.columns(start, stop)).mT
    Q_rD, _ = orthonormalize_(Y_mD)
    inside = project(H, Q_rD, block_size, None).trace()
    # m matvecs span the range and up to m give the trace on it; the rest are samples outside.
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
    """Return ``x^T H x`` for random signs x, with the range of Q projected out if given."""
    probes = make_test_matrix(
        "rademacher", H.shape[0], count, draw_seed(generator), H.dtype, H.device
    )
    samples = []
    for start in range(0, count, block_size):
        X_BD = probes.columns(start, min(start + block_size, count)).mT
        if Q_rD is not None:
            project_out_(X_BD, [Q_rD])
        Y_BD = (H @ X_BD.mT).mT
        # Row-wise sums: X Y^T would compute b^2 products for b of them.
        samples.append((X_BD * Y_BD).sum(dim=1, dtype=torch.float64).cpu())
    return torch.cat(samples)


_METHODS: dict[str, Callable[[LinearOperator, int, torch.Generator, int], Tensor]] = {
    "xtrace": _xtrace,
    "hutch++": _hutchpp,
    "hutchinson": _hutchinson,
}
