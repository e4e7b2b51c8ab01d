"""SEIGH: sketched eigendecomposition from one pass of independent measurements."""

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
from hesscurv.linalg.random_matrices import (
    TestMatrix,
    default_generator,
    draw_seed,
    make_test_matrix,
)
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.matrix_operators import as_linear_operator
from hesscurv.storage.placement import allocate_basis


def single_pass(
    H: LinearOperator,
    k: int,
    *,
    which: str = "LM",
    outer: int | None = None,
    inner: int | None = None,
    measurements: str = "ssrft",
    generator: torch.Generator | None = None,
    block_size: int = 32,
    residuals: bool = True,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    storage: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Eigenpairs:
    """Compute the k eigenpairs of largest magnitude from independent matvecs.

    ``Y = H Omega``, ``M = Psi^T Y``, ``Q = orth(Y[:, :outer])``,
    ``C = (Psi^T Q)^+ M ((Omega^T Q)^+)^T``, ``(C + C^T)/2 = U Lambda U^T``, ``V = Q U``, with
    random Omega, Psi (D, inner). Since no matvec depends on another, independent jobs can share
    them: see `measure` and `assemble`. The price is accuracy, which decreases along the spectrum:
    in the paper's runs with 7,030 parameters and outer = 355 the eigenvalues were within 6 % up to
    number 200, and half of the true ones at number 300.

    Args:
        H: The symmetric operator, D x D, float32 or float64, as for `eigsh`.
        k: Number of pairs, 1 <= k <= D.
        which: "LM", largest magnitudes (default); "LA", largest values; "SA", smallest values. The
            sketch captures large magnitudes: with "LA" and "SA", pairs below these do not count as
            converged.
        outer: Vectors in the basis, k <= outer <= inner; default 2 k. Only these are stored.
        inner: Measurements; default 2 outer. At most D: D orthogonal (SSRFT) measurements
            determine H on the basis exactly, so they replace any larger number of any kind.
        measurements: "ssrft" (default), "gaussian" or "rademacher".
        generator: Source of the seeds of the two matrices; default a new one with seed 0.
        block_size: Matvecs per block; default 32.
        residuals: Whether to measure ``||H v - lambda v||``, by k more matvecs; default True.
        tol: Pair i has converged when its residual is at most
            ``max(tol |lambda_i|, 10 eps |lambda_1|)``; default 1e-3.
        max_matvecs: Maximal number of matvecs, including residuals: bounds the defaults of outer
            and inner.
        storage: Location of the basis: "device" or, for an operator on the CPU (where "host" and
            "cpu" mean the same), a folder on a disk for a memory-mapped file; by default a
            temporary one if memory is short.
        progress: Whether to show a progress bar over the matvecs, see `eigsh`.

    Returns:
        The eigenpairs, both signs, largest magnitude first. The eigenvectors are a view of storage
        (outer, D); ``.clone()`` them and drop the result to free the rest.

    Raises:
        ValueError: If an argument is out of range, or a product has NaN or inf entries.
        TypeError: If H's dtype is not float32 or float64.

    Warns:
        ConvergenceWarning: If residuals are measured and exceed the tolerance.

    Cost: `inner` matvecs, and k for the residuals. Storage: outer D floats, 1.125 times as many for
    the Gaussian and Rademacher kinds, and some blocks. SSRFT takes 4 (inner + outer) FFTs of length
    D; the other kinds take inner (inner + 2 outer) D multiply-adds and, since Psi is redrawn for
    each eighth of the basis, 12 inner D random numbers.

    References:
        Fernandez, Schneider, Mahsereci, Hennig, "Connecting parameter magnitudes and Hessian
        eigenspaces at scale using sketched methods", TMLR 2025, arXiv 2504.14701.
        Tropp, Yurtsever, Udell, Cevher, "Streaming low-rank matrix approximation with an
        application to scientific simulation", SIAM J. Sci. Comput. 41 (2019).

    Example:
        >>> from hesscurv.eigensolvers import single_pass
        >>> A = hesscurv.operators.DenseOperator(torch.diag(0.1 ** torch.arange(30.0).double()))
        >>> single_pass(A, k=3, tol=0.1).eigenvalues.round(decimals=3)
        tensor([1.0000, 0.1000, 0.0100], dtype=torch.float64)
    """
    start = time.perf_counter()
    H = as_linear_operator(H)
    dim, k = H.shape[0], as_int("k", k)
    outer, inner = sketch_sizes(k, dim, outer, inner, max_matvecs, k if residuals else 0)
    if block_size < 1:
        raise ValueError(f"expected block_size >= 1, got {block_size}")
    if inner == dim:
        measurements = "ssrft"
    generator = default_generator(generator)
    omega, psi = (
        make_test_matrix(measurements, dim, inner, draw_seed(generator), H.dtype, H.device)
        for _ in range(2)
    )
    total = inner + (k if residuals else 0)
    H.expect(total)
    reserved = 3 * block_size * dim * H.dtype.itemsize + H.memory_needed(block_size)
    with CountedOperator(H, total, "single_pass", progress) as counted:
        basis_mD = allocate_basis(storage, outer, dim, H.dtype, H.device, reserved)
        M_nn = torch.empty(inner, inner, dtype=torch.float64, device="cpu")
        # SSRFT tests block by block. Kinds that redraw Psi for each use test the whole basis at
        # once, and the other columns of Y, of which only Psi^T Y is needed, in groups wider than a
        # block.
        group, drawn_anew = group_size(measurements, outer, block_size), measurements != "ssrft"
        scratch_BD = basis_mD.new_empty(min(group, inner - outer), dim) if drawn_anew else None
        ranges = cut(0, outer, outer if drawn_anew else group) + cut(outer, inner, group)
        for first, last in ranges:
            out_BD = basis_mD[first:last] if last <= outer else scratch_BD
            M_nn[:, first:last] = take_measurements(
                counted, omega, psi, first, last, out_BD, block_size
            )
        del scratch_BD, out_BD

        Q_rD, _ = orthonormalize_(basis_mD)
        C_rr = core_matrix(Q_rD, M_nn, omega, psi)
        return ritz_result(
            counted,
            basis_mD,
            C_rr,
            k,
            which=which,
            method="single_pass",
            generator=generator,
            residuals=residuals,
            tol=tol,
            block_size=block_size,
            start=start,
            info={"outer": outer, "inner": inner, "measurements": measurements},
        )


def take_measurements(
    H: LinearOperator,
    omega: TestMatrix,
    psi: TestMatrix,
    start: int,
    stop: int,
    out_BD: Tensor | None,
    block_size: int = 32,
) -> Tensor:
    """Take measurements start, ..., stop - 1: ``Y = H Omega[:, start:stop]`` and ``Psi^T Y``.

    Args:
        H: The symmetric operator, D x D.
        omega: The test matrix (D, inner) that H is applied to.
        psi: The test matrix (D, inner) that tests the products.
        start: The first measurement.
        stop: One past the last.
        out_BD: Shape (at least stop - start, D), row-contiguous: its first rows are filled with Y;
            None keeps only one block of Y at a time.
        block_size: Matvecs per block.

    Returns:
        ``Psi^T Y``, shape (inner, stop - start), float64 on the CPU.

    Cost: stop - start matvecs.
    """
    tested = []
    for first in range(start, stop, block_size):
        last = min(first + block_size, stop)
        Y_DB = H @ omega.columns(first, last)
        if out_BD is None:
            tested.append(psi.transpose_matmul(Y_DB))
        else:
            out_BD[first - start : last - start] = Y_DB.mT
        del Y_DB  # free it before the next block is allocated
    if out_BD is None:
        return torch.cat(tested, dim=1)
    return psi.transpose_matmul(out_BD[: stop - start].mT)


def core_matrix(Q_rD: Tensor, M_nn: Tensor, omega: TestMatrix, psi: TestMatrix) -> Tensor:
    """Return the least-squares core C of ``H ~ Q C Q^T``.

    ``C = (Psi^T Q)^+ M ((Omega^T Q)^+)^T``, from ``M = Psi^T H Omega ~ (Psi^T Q) C (Q^T Omega)``.

    Args:
        Q_rD: Shape (r, D), r <= inner: the orthonormal basis, one vector per row.
        M_nn: Shape (inner, inner), ``Psi^T H Omega``, float64 on the CPU.
        omega: The test matrix that H was applied to.
        psi: The test matrix that tested the products.

    Returns:
        Shape (r, r), float64 on the CPU; not yet symmetrised.
    """
    # pinv instead of lstsq: LAPACK's default driver (gelsy) is not bit-reproducible, and a small
    # sign matrix can be singular.
    rtol = len(M_nn) * torch.finfo(Q_rD.dtype).eps
    left_rn = torch.linalg.pinv(psi.transpose_matmul(Q_rD.mT), rtol=rtol)
    right_rn = torch.linalg.pinv(omega.transpose_matmul(Q_rD.mT), rtol=rtol)
    return left_rn @ M_nn @ right_rn.mT


def group_size(measurements: str, outer: int, block_size: int) -> int:
    """Return how many measurements to test at once: a block, or more for kinds that redraw Psi."""
    return block_size if measurements == "ssrft" else max(block_size, outer // 8)


def cut(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Split [start, stop) into ranges of this size; the last may be shorter."""
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


def sketch_sizes(
    k: int, dim: int, outer: int | None, inner: int | None, limit: int | None, extra: int
) -> tuple[int, int]:
    """Return outer and inner, bounded by D and by the limit on matvecs."""
    if not 1 <= k <= dim:
        raise ValueError(f"expected 1 <= k <= D={dim}, got k={k}")
    most = dim if limit is None else min(dim, limit - extra)
    if inner is None:
        inner = max(outer or k, min(2 * (outer or 2 * k), most))
    inner = min(inner, dim)
    if outer is None:
        # Half of inner; but D measurements are exact for any basis, so a wider one costs nothing.
        outer = 2 * k if inner == dim else min(2 * k, max(k, inner // 2))
    outer = min(outer, dim)
    if not k <= outer <= inner:
        raise ValueError(
            f"expected k <= outer <= inner, got k={k}, outer={outer}, inner={inner}; "
            "usual values are outer = 2 k and inner = 2 outer"
        )
    if inner > most:
        raise ValueError(
            f"expected max_matvecs >= {inner + extra} for {inner} measurements and {extra} "
            f"residuals, got {limit}; raise it, lower k, or leave out residuals"
        )
    return outer, inner
