"""A-posteriori error estimate of an eigendecomposition, with tail bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hesscurv.distributed.sharded import whole
from hesscurv.eigensolvers.counted_operator import CountedOperator
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.linalg.precision import full_precision
from hesscurv.linalg.random_matrices import default_generator, draw_seed, make_test_matrix
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.matrix_operators import as_linear_operator

# Makes the probes independent of the random matrices of a solver with an equal generator.
_PROBE_SEED = 0x5BD1E995


@dataclass(frozen=True)
class ErrorEstimate:
    """Estimates of squared Frobenius norms from n Gaussian probes, with tail bounds.

    For any matrix E independent of the probes z_i, ``est = (1/n) sum_i ||E z_i||^2`` has the mean
    ``||E||_F^2``, and the tails that `probability_below` and `probability_above` bound.

    Args:
        num_probes: n, the number of probes.
        operator_norm_squared: Estimate of ``||H||_F^2``.
        approximation_norm_squared: Estimate of ``||Hhat||_F^2``, ``Hhat = V Lambda V^T``.
        error_norm_squared: Estimate of ``||H - Hhat||_F^2``.

    Example:
        >>> estimate = hesscurv.a_posteriori_error(H, pairs, num_probes=10)
        >>> lower, upper = estimate.confidence_interval(0.95)
        >>> lower <= estimate.error_norm_squared <= upper
        True
    """

    num_probes: int
    operator_norm_squared: float
    approximation_norm_squared: float
    error_norm_squared: float

    @property
    def relative_error(self) -> float:
        """Estimate of ``||H - Hhat||_F / ||H||_F``; 0 for the zero operator."""
        if self.operator_norm_squared == 0:
            return 0.0
        return math.sqrt(self.error_norm_squared / self.operator_norm_squared)

    def probability_below(self, e: float) -> float:
        """Bound the probability that an estimate is too small by the factor 1 - e or more.

        ``P(est <= (1 - e) true) <= (exp(e) (1 - e))^(n/2)``.

        Args:
            e: Relative deviation, 0 <= e <= 1.

        Returns:
            The bound, in [0, 1].

        Raises:
            ValueError: If e is out of range.
        """
        if not 0 <= e <= 1:
            raise ValueError(f"expected 0 <= e <= 1, got {e}")
        return 0.0 if e == 1 else math.exp(self.num_probes / 2 * (e + math.log1p(-e)))

    def probability_above(self, e: float) -> float:
        """Bound the probability that an estimate is too large by the factor 1 + e or more.

        ``P(est >= (1 + e) true) <= (exp(e) / (1 + e))^(-n/2)``.

        Args:
            e: Relative deviation, e >= 0.

        Returns:
            The bound, in [0, 1].

        Raises:
            ValueError: If e is negative.
        """
        if not e >= 0:
            raise ValueError(f"expected e >= 0, got {e}")
        return math.exp(-self.num_probes / 2 * (e - math.log1p(e)))

    def confidence_interval(
        self, confidence: float = 0.95, norm_squared: float | None = None
    ) -> tuple[float, float]:
        """Return an interval that holds the true squared norm with at least this probability.

        ``[est / (1 + e_above), est / (1 - e_below)]``, where each tail's bound is
        ``(1 - confidence) / 2``, solved for e by bisection.

        Args:
            confidence: The probability, in (0, 1); default 0.95.
            norm_squared: Which estimate; default `error_norm_squared`.

        Returns:
            The lower and the upper end.

        Raises:
            ValueError: If confidence is not in (0, 1).
        """
        if not 0 < confidence < 1:
            raise ValueError(f"expected 0 < confidence < 1, got {confidence}")
        tail = (1 - confidence) / 2
        estimate = self.error_norm_squared if norm_squared is None else norm_squared
        highest = 1.0
        while self.probability_above(highest) > tail:
            highest *= 2
        e_above = _bisect(self.probability_above, highest, tail)
        e_below = _bisect(self.probability_below, 1.0, tail)
        return estimate / (1 + e_above), estimate / (1 - e_below) if e_below < 1 else math.inf


def a_posteriori_error(
    H: LinearOperator,
    pairs: Eigenpairs,
    num_probes: int = 30,
    generator: torch.Generator | None = None,
    block_size: int = 32,
) -> ErrorEstimate:
    """Estimate the part of H that its eigenpairs leave out, by fresh Gaussian probes.

    ``||E||_F^2 ~ (1/n) sum_i ||E z_i||^2`` for E = H, ``Hhat = V Lambda V^T`` and ``H - Hhat``.
    All three share the probes, so their ratios have less variance than each of them.

    Args:
        H: The symmetric operator, D x D.
        pairs: Its eigenpairs, from products other than these probes.
        num_probes: n, at least 1; default 30.
        generator: Source of the probes' seed; default a new one with seed 0. An equal generator in
            the solver still gives independent probes.
        block_size: Matvecs per block; default 32.

    Returns:
        The estimates, with their tail bounds.

    Raises:
        ValueError: If the sizes do not match, num_probes < 1, or a product has NaN or inf entries.

    Cost: n matvecs, four blocks of D floats, 2 n k D multiply-adds.

    References:
        Tropp, Yurtsever, Udell, Cevher, "Streaming low-rank matrix approximation with an
        application to scientific simulation", SIAM J. Sci. Comput. 41 (2019), section 6.

    Example:
        >>> A = torch.diag(torch.tensor([4.0, -3.0, 0.0]))
        >>> hesscurv.a_posteriori_error(A, hesscurv.eigsh(A, k=2)).relative_error < 1e-5
        True
    """
    H = as_linear_operator(H)
    dim = H.shape[0]
    if pairs.eigenvectors.shape[0] != dim:
        raise ValueError(
            f"expected eigenvectors of length {dim}, got {pairs.eigenvectors.shape[0]}"
        )
    if num_probes < 1:
        raise ValueError(f"expected num_probes >= 1, got {num_probes}")
    generator = default_generator(generator)
    seed = draw_seed(generator) ^ _PROBE_SEED
    probes = make_test_matrix("gaussian", dim, num_probes, seed, H.dtype, H.device)
    V_Dk = whole(pairs.eigenvectors).to(H.device, H.dtype)
    eigenvalues_k1 = pairs.eigenvalues.to(H.device, H.dtype)[:, None]
    counted = CountedOperator(H, num_probes, "a_posteriori_error", progress=False)
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    for start in range(0, num_probes, block_size):
        Z_DB = probes.columns(start, min(start + block_size, num_probes))
        exact_DB = counted @ Z_DB
        with full_precision(H.device):
            approximate_DB = V_Dk @ (eigenvalues_k1 * (V_Dk.mT @ Z_DB))
        for i, block in enumerate((exact_DB, approximate_DB, exact_DB - approximate_DB)):
            sums[i] += torch.linalg.vector_norm(block, dtype=torch.float64).cpu() ** 2
    return ErrorEstimate(num_probes, *(sums / num_probes).tolist())


def _bisect(bound: Callable[[float], float], highest: float, tail: float) -> float:
    """Return the smallest e in [0, highest] with a decreasing bound <= tail, to rounding."""
    low, high = 0.0, highest
    while low < (middle := (low + high) / 2) < high:
        if bound(middle) > tail:
            low = middle
        else:
            high = middle
    return high
