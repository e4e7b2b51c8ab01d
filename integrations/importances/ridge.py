"""Ridge regression on possibly singular covariances: constant, repeated or too few inputs."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_TRIES = 40


def centred(second_ii: Tensor, mean_i: Tensor, measured_in: torch.dtype) -> Tensor:
    r"""Return the covariance of inputs from their second moments, with a nonnegative diagonal.

    The difference :math:`E[x x^T] - m m^T` cancels for nearly constant inputs, which leaves
    rounding errors of either sign. An input whose variance is within rounding is treated as
    constant: its row and column are zero.

    Args:
        second_ii: Shape (i, i), float64, second moments of the inputs.
        mean_i: Shape (i,), float64, the mean, or zeros for no centring.
        measured_in: The dtype in which products were summed.

    Returns:
        Shape (i, i), a new tensor.
    """
    C = second_ii - mean_i[:, None] * mean_i
    noise = 64 * torch.finfo(measured_in).eps * second_ii.diagonal()
    is_constant = C.diagonal() <= noise
    C[is_constant] = 0
    C[:, is_constant] = 0
    return C


def ridge_factor(C_ii: Tensor, ridge: float) -> Tensor:
    r"""Return the Cholesky factor of :math:`C + \mu I`, with mu raised until it exists.

    Rounding may leave a covariance with negative eigenvalues larger than the ridge. For a zero
    covariance any ridge gives the same fit, and 1 is used.

    Args:
        C_ii: Shape (i, i), symmetric; positive semi-definite up to rounding.
        ridge: mu, at least zero.

    Returns:
        Shape (i, i), lower triangular.

    Raises:
        ValueError: If the covariance is not finite.
    """
    largest = float(C_ii.diagonal().max()) if len(C_ii) else 0.0
    if not bool(C_ii.isfinite().all()) or not 0 <= ridge < float("inf"):
        raise ValueError("expected finite inputs, got NaN or inf")
    ridge = max(ridge, torch.finfo(C_ii.dtype).eps * largest) if largest > 0 else 1.0
    for _ in range(_MOST_TRIES):
        A = C_ii.clone()
        A.diagonal().add_(ridge)
        L, info = torch.linalg.cholesky_ex(A)
        if int(info) == 0 and bool(L.isfinite().all()):
            return L
        ridge *= 4
    raise ValueError(
        f"expected a covariance, got a matrix with an eigenvalue below {-ridge:.1e} times 1/4"
    )


def relative_ridge(C_ii: Tensor, damping: float) -> float:
    """Return a ridge relative to the mean of the covariance's diagonal."""
    return damping * float(C_ii.diagonal().mean()) if len(C_ii) else 0.0
