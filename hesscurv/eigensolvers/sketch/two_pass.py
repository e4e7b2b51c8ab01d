"""Two-pass randomised Rayleigh-Ritz, with optional subspace iteration."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor

from hesscurv.eigensolvers.counted_operator import CountedOperator
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.sketch.ritz_result import ritz_result
from hesscurv.interface.integers import as_int
from hesscurv.linalg.orthogonalization import orthonormalize_
from hesscurv.linalg.projections import inner_products
from hesscurv.linalg.random_matrices import default_generator, draw_seed, make_test_matrix
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.matrix_operators import as_linear_operator
from hesscurv.storage.placement import allocate_basis


def rayleigh_ritz(
    H: LinearOperator,
    k: int,
    *,
    which: str = "LM",
    num_measurements: int | None = None,
    subspace_iterations: int = 0,
    measurements: str = "gaussian",
    generator: torch.Generator | None = None,
    initial: Tensor | None = None,
    block_size: int = 32,
    residuals: bool = True,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    storage: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Eigenpairs:
    """Compute the k eigenpairs of largest magnitude by Rayleigh-Ritz on a sketch of H's range.

    ``Q = orth(H Omega)``, then q times ``Q <- orth(H Q)``, and ``T = Q^T H Q = Y Theta Y^T``,
    ``V = Q Y``, with a random Omega (D, m). The error of an eigenvalue mu falls as
    ``(|lambda_{m+1}| / |mu|)^(2 q + 2)``: the flatter the spectrum, the more iterations.

    Args:
        H: The symmetric operator, D x D, float32 or float64, as for `eigsh`.
        k: Number of pairs, 1 <= k <= D.
        which: "LM", largest magnitudes (default); "LA", largest values; "SA", smallest values. The
            sketch captures large magnitudes: with "LA" and "SA", pairs below these do not count as
            converged.
        num_measurements: m, the number of basis vectors, k <= m <= D; default 2 k, or at least as
            many as `initial` has. All are stored.
        subspace_iterations: q, each with a reorthonormalisation; default 0.
        measurements: "gaussian" (default), "rademacher" or "ssrft".
        generator: Source of the random matrix's seed; default a new one with seed 0.
        initial: Vectors (D, k0), k0 <= m, for a warm start, such as earlier eigenvectors; they
            replace the first columns of Omega. They need not be orthonormal.
        block_size: Matvecs per block; default 32.
        residuals: Whether to measure ``||H v - lambda v||``, by k more matvecs; default True.
        tol: Pair i has converged when its residual is at most
            ``max(tol |lambda_i|, 10 eps |lambda_1|)``; default 1e-3.
        max_matvecs: Maximal number of matvecs, including residuals: bounds the default of
            `num_measurements`.
        storage: Location of the basis: "device" or, for an operator on the CPU (where "host" and
            "cpu" mean the same), a folder on a disk for a memory-mapped file; by default a
            temporary one if memory is short.
        progress: Whether to show a progress bar over the matvecs, see `eigsh`.

    Returns:
        The eigenpairs, both signs, largest magnitude first. The eigenvectors are a view of storage
        (m, D); ``.clone()`` them and drop the result to free the rest.

    Raises:
        ValueError: If an argument is out of range, or a product has NaN or inf entries.
        TypeError: If H's dtype is not float32 or float64.

    Warns:
        ConvergenceWarning: If residuals are measured and exceed the tolerance.

    Cost: (2 + q) m matvecs, and k for the residuals. Storage: m D floats and some blocks; about
    (5 + 4 q) m^2 D multiply-adds.

    References:
        Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
        algorithms 4.4 and 5.3.

    Example:
        >>> from hesscurv.eigensolvers import rayleigh_ritz
        >>> A = hesscurv.operators.DenseOperator(torch.diag(0.1 ** torch.arange(30.0).double()))
        >>> rayleigh_ritz(A, k=3, subspace_iterations=1).eigenvalues.round(decimals=3)
        tensor([1.0000, 0.1000, 0.0100], dtype=torch.float64)
    """
    start = time.perf_counter()
    H = as_linear_operator(H)
    dim, k = H.shape[0], as_int("k", k)
    if subspace_iterations < 0 or block_size < 1:
        raise ValueError(
            "expected subspace_iterations >= 0 and block_size >= 1, "
            f"got {subspace_iterations} and {block_size}"
        )
    passes = 2 + subspace_iterations
    num_initial = _check_initial(initial, dim)
    extra = k if residuals else 0
    m = _num_measurements(k, dim, num_measurements, num_initial, passes, max_matvecs, extra)
    if m == dim:
        measurements = "ssrft"  # any basis of R^D will do; orthogonal columns surely form one
    generator = default_generator(generator)
    omega = make_test_matrix(
        measurements, dim, m - num_initial, draw_seed(generator), H.dtype, H.device
    )
    total = passes * m + extra
    H.expect(total)
    reserved = 3 * block_size * dim * H.dtype.itemsize + H.memory_needed(block_size)
    with CountedOperator(H, total, "rayleigh_ritz", progress) as counted:
        Q_rD = allocate_basis(storage, m, dim, H.dtype, H.device, reserved)
        basis_mD = Q_rD
        if initial is not None:
            basis_mD[:num_initial] = initial.detach().mT
        for j in range(m - num_initial):
            basis_mD[num_initial + j] = omega.columns(j, j + 1)[:, 0]
        for _ in range(1 + subspace_iterations):
            for X_BD in Q_rD.split(block_size):
                X_BD.copy_((counted @ X_BD.mT).mT)
            Q_rD, _ = orthonormalize_(Q_rD)
            if len(Q_rD) == 0:  # the zero operator
                break
        columns = [inner_products(Q_rD, (counted @ X_BD.mT).mT) for X_BD in Q_rD.split(block_size)]
        return ritz_result(
            counted,
            basis_mD,
            torch.cat(columns, dim=1),
            k,
            which=which,
            method="rayleigh_ritz",
            generator=generator,
            residuals=residuals,
            tol=tol,
            block_size=block_size,
            start=start,
            info={
                "num_measurements": m,
                "subspace_iterations": subspace_iterations,
                "measurements": measurements,
            },
        )


def _check_initial(initial: Tensor | None, dim: int) -> int:
    """Return the number of initial vectors."""
    if initial is None:
        return 0
    if initial.ndim != 2 or initial.shape[0] != dim:
        raise ValueError(
            f"expected initial vectors of shape ({dim}, k0), one in each column, "
            f"got {tuple(initial.shape)}"
        )
    if initial.numel() and not torch.stack(initial.detach().aminmax()).isfinite().all():
        raise ValueError("expected finite initial vectors, got NaN or inf entries")
    return initial.shape[1]


def _num_measurements(
    k: int,
    dim: int,
    wanted: int | None,
    num_initial: int,
    passes: int,
    limit: int | None,
    extra: int,
) -> int:
    """Return the size of the basis, bounded by D and by the limit on matvecs."""
    if not 1 <= k <= dim:
        raise ValueError(f"expected 1 <= k <= D={dim}, got k={k}")
    least = max(k, num_initial)
    m = wanted
    if m is None:
        m = max(least, min(2 * k, dim))
        if limit is not None:
            m = max(least, min(m, (limit - extra) // passes))
    m = min(m, dim)
    if m < least:
        raise ValueError(
            f"expected num_measurements between max(k, k0) = {least} and D = {dim}, got {m} for "
            f"k={k} pairs and k0={num_initial} initial vectors"
        )
    if limit is not None and passes * m + extra > limit:
        raise ValueError(
            f"expected max_matvecs >= {passes * m + extra} for {passes} passes over {m} vectors "
            f"and {extra} residuals, got {limit}; raise it, lower k, or leave out residuals"
        )
    return m
