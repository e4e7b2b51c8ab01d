"""Stochastic diagonal estimation: XDiag, Hutchinson (Bekas)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers.counted_operator import CountedOperator
from hesscurv.interface.descriptions import Described
from hesscurv.interface.ranges import check_choice, check_count
from hesscurv.linalg.precision import full_precision
from hesscurv.linalg.random_matrices import default_generator, draw_seed, make_test_matrix
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.matrix_operators import as_floating_operator
from hesscurv.spectra.leave_one_out import deflate, project, sketch_range

# The fewest products that give an error bar: two samples.
_FEWEST = {"xdiag": 4, "hutchinson": 2}


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalEstimate(Described):
    """An estimate of diag H.

    Args:
        values: Shape (D,), in H's dtype on its device.
        standard_error: Shape (D,): the estimated standard deviation of each entry; 0 if exact.
        num_matvecs: Matvecs with H.
        method: "xdiag", "hutchinson", or "exact".

    Example:
        >>> estimate = hesscurv.diagonal(H, num_matvecs=10)
        >>> estimate.values.shape, estimate.method
        (torch.Size([23]), 'xdiag')
    """

    values: Tensor
    standard_error: Tensor
    num_matvecs: int
    method: str


def diagonal(
    H: Any,
    num_matvecs: int,
    method: str = "xdiag",
    *,
    generator: torch.Generator | None = None,
    block_size: int = 32,
    progress: bool = False,
) -> DiagonalEstimate:
    """Estimate the diagonal of a symmetric operator from matvecs with random sign vectors.

    With n matvecs, and P_i the orthogonal projector onto the range of H times all n/2 test vectors
    except omega_i (o is the entrywise product):

    - "xdiag" (default): the mean over i of ``diag(H - E_i) + omega_i o (E_i omega_i)`` with
      ``E_i = (I - P_i) H (I - P_i)``. The paper, for matrices that need not be symmetric, has
      ``E_i = (I - P_i) H``; the two-sided form, which requires symmetry, has a smaller error on
      decaying spectra at the same cost.
    - "hutchinson": the mean of ``omega_i o (H omega_i)`` over n test vectors.

    An entry's error is ``sqrt(sum_{j != i} H_ij^2 / n)`` with Hutchinson. XDiag removes the large
    eigenvalues first, which pays if the spectrum decays, as for curvature matrices. On a flat
    spectrum Hutchinson is better: it has twice the samples. If n >= D, the diagonal itself is
    computed, in D matvecs; XDiag is also exact, to rounding, if the rank of H is below n/2.

    Args:
        H: A hesscurv operator, a dense symmetric tensor (D, D), or any object with `shape`,
            `dtype`, `device` and ``@`` on tensors (D,) and (D, b); float32 or float64.
        num_matvecs: n, the maximal number of matvecs; at least 4 (2 for "hutchinson"), or D. XDiag
            leaves one unused if it is odd.
        method: "xdiag" or "hutchinson".
        generator: Source of the test vectors' seed; default a new one with seed 0. The global
            generator is never used.
        block_size: Matvecs per block; default 32.
        progress: Whether to show a progress bar over the matvecs, see `eigsh`.

    Returns:
        The estimate with a standard error for each entry from the scatter of the samples,
        ``sqrt(sum_i (d_i - d)^2 / (m (m - 1)))``, coarse for few samples.

    Raises:
        TypeError: If H is not an operator, or not float32 or float64, or a number is not an int.
        ValueError: If an argument is out of range, or a product has NaN or inf entries.

    Cost: n matvecs. XDiag: n D floats, some blocks, and about 3 n^2 D multiply-adds; Hutchinson:
    only blocks.

    References:
        Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace
        estimation", SIAM J. Matrix Anal. Appl. 45 (2024), arXiv 2301.07825, section 2.5.
        Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", Appl. Numer. Math. 57
        (2007).

    Example:
        >>> hesscurv.diagonal(torch.diag(torch.tensor([1.0, 2.0])), num_matvecs=2).values
        tensor([1., 2.])
    """
    H, generator = check_estimate(H, num_matvecs, method, _FEWEST, block_size, generator)
    dim = H.shape[0]
    total = min(num_matvecs, dim)
    H.expect(total)
    with CountedOperator(H, total, "diagonal", progress) as counted:
        if num_matvecs >= dim:
            values = exact_diagonal(counted, block_size)
            return DiagonalEstimate(values, torch.zeros_like(values), counted.num_matvecs, "exact")
        estimate = _xdiag if method == "xdiag" else _hutchinson
        values, errors = estimate(counted, num_matvecs, generator, block_size)
    return DiagonalEstimate(values.to(H.dtype), errors.to(H.dtype), counted.num_matvecs, method)


def check_estimate(
    H: Any,
    num_matvecs: Any,
    method: Any,
    fewest: dict[str, int],
    block_size: Any,
    generator: torch.Generator | None,
) -> tuple[LinearOperator, torch.Generator]:
    """Check the arguments shared by `trace` and `diagonal`.

    Args:
        H: The operator.
        num_matvecs: Maximal number of matvecs.
        method: One of the keys of `fewest`.
        fewest: Minimal number of matvecs of each method; D always suffice.
        block_size: Matvecs per block.
        generator: The caller's generator, or None.

    Returns:
        The operator, and the generator to draw from.

    Raises:
        TypeError: If H is not an operator, or not float32 or float64, or a number is not an int.
        ValueError: If an argument is out of range.
    """
    H = as_floating_operator(H)
    check_choice("method", method, tuple(fewest))
    check_count("block_size", block_size)
    least = min(fewest[method], H.shape[0])
    remedy = f"{method!r} needs two samples for an error bar"
    check_count("num_matvecs", num_matvecs, least=least, remedy=remedy)
    return H, default_generator(generator)


def exact_diagonal(H: LinearOperator, block_size: int) -> Tensor:
    """Return the diagonal (D,) from D matvecs with the unit vectors."""
    dim = H.shape[0]
    out = torch.empty(dim, dtype=H.dtype, device=H.device)
    for start in range(0, dim, block_size):
        stop = min(start + block_size, dim)
        unit_BD = torch.zeros(stop - start, dim, dtype=H.dtype, device=H.device)
        unit_BD[:, start:stop].fill_diagonal_(1)
        # Column j of the product is H e_(start + j): its own entry lies on this diagonal.
        out[start:stop] = (H @ unit_BD.mT)[start:stop].diagonal()
    return out


class _Moments:
    """Mean and standard error of blocks of samples (b, D), accumulated in float64."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, dim, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, samples_BD: Tensor) -> None:
        # Row by row: a float64 copy of a float32 block would triple its memory.
        for sample in samples_BD:
            sample = sample.double()
            self._sums[0] += sample
            self._sums[1].addcmul_(sample, sample)
        self._count += len(samples_BD)

    def result(self) -> tuple[Tensor, Tensor]:
        n, (total, squares) = self._count, self._sums
        # The difference cancels for nearly constant samples and may come out negative.
        variance = ((squares - total**2 / n) / (n - 1)).clamp(min=0)
        return total / n, (variance / n).sqrt()


def _xdiag(
    H: LinearOperator, num_matvecs: int, generator: torch.Generator, block_size: int
) -> tuple[Tensor, Tensor]:
    """Average the estimates that leave one test vector each out of the range.

    With Z = H Q, G = Q^T Z, and s, u, R_i of `SketchedRange`: ``E omega = Q c - Z u``,
    ``c = s (s^T R_i) + (I - s s^T) G u``, and ``diag(H - E) = diag(2 Q Z^T - Q G Q^T) +
    (Q s) o (Q a - 2 Z s)``, ``a = 2 G s - (s^T G s) s``.
    """
    dim, m = H.shape[0], num_matvecs // 2
    omega = make_test_matrix("rademacher", dim, m, draw_seed(generator), H.dtype, H.device)
    sketch = sketch_range(H, omega, block_size)
    Q_rD = sketch.Q_rD
    Z_rD = torch.empty_like(Q_rD)
    G_rr = project(H, Q_rD, block_size, Z_rD)
    R, S, U = sketch.R_rm, sketch.S_rm, sketch.U_rm
    GS = G_rr @ S
    A = 2 * GS - (S * GS).sum(dim=0) * S
    C = S * (S * R).sum(dim=0) + deflate(G_rr @ U, S)

    inside = torch.zeros(dim, dtype=torch.float64, device=H.device)
    moments = _Moments(dim, H.device)
    with full_precision(H.device):
        for start in range(0, len(Q_rD), block_size):
            rows = slice(start, start + block_size)
            QG_BD = G_rr[rows].to(Q_rD) @ Q_rD
            for q, z, qg in zip(Q_rD[rows], Z_rD[rows], QG_BD, strict=True):
                # Row by row in float64: r terms of either sign, without a float64 block.
                inside += q.double() * (2 * z - qg).double()
        for start in range(0, m, block_size):
            stop = min(start + block_size, m)
            A_br, C_br, S_br, U_br = (X[:, start:stop].mT.to(Q_rD) for X in (A, C, S, U))
            samples_BD = (C_br @ Q_rD).sub_(U_br @ Z_rD).mul_(omega.columns(start, stop).mT)
            samples_BD += (A_br @ Q_rD).sub_(S_br @ Z_rD, alpha=2).mul_(S_br @ Q_rD)
            moments.add(samples_BD)
    outside, errors = moments.result()
    return inside + outside, errors


def _hutchinson(
    H: LinearOperator, num_matvecs: int, generator: torch.Generator, block_size: int
) -> tuple[Tensor, Tensor]:
    dim = H.shape[0]
    omega = make_test_matrix(
        "rademacher", dim, num_matvecs, draw_seed(generator), H.dtype, H.device
    )
    moments = _Moments(dim, H.device)
    for start in range(0, num_matvecs, block_size):
        X_DB = omega.columns(start, min(start + block_size, num_matvecs))
        moments.add((X_DB * (H @ X_DB)).mT)
    return moments.result()
