"""SEIGH by independent jobs: each takes some measurements, writes them to a folder, and exits.

Jobs neither wait for nor communicate with each other, as in the paper's runs: a job array on a
cluster, or a few shells. See `folder` for the files and `single_pass` for the algorithm.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
import os
import time
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers.counted_operator import CountedOperator
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.sketch.folder import MeasurementFolder
from hesscurv.eigensolvers.sketch.manifest import Manifest
from hesscurv.eigensolvers.sketch.ritz_result import ritz_result
from hesscurv.eigensolvers.sketch.single_pass import (
    core_matrix,
    group_size,
    sketch_sizes,
    take_measurements,
)
from hesscurv.interface.integers import as_int
from hesscurv.interface.moved_arguments import seed_moved
from hesscurv.interface.ranges import check_generator
from hesscurv.linalg.orthogonalization import orthonormalize_
from hesscurv.linalg.random_matrices import (
    TestMatrix,
    default_generator,
    draw_seed,
    make_test_matrix,
    next_seeds,
)
from hesscurv.objective.parameters import ParameterLayout
from hesscurv.operators.fingerprint import fingerprint, product_sample
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.matrix_operators import as_linear_operator

logger = logging.getLogger(__name__)


@seed_moved
def measure(
    H: Any,
    k: int,
    folder: str | os.PathLike[str],
    start: int | None = None,
    stop: int | None = None,
    *,
    part: tuple[int, int] | None = None,
    outer: int | None = None,
    inner: int | None = None,
    measurements: str = "ssrft",
    generator: torch.Generator | None = None,
    block_size: int = 32,
    progress: bool = False,
) -> list[tuple[int, int]]:
    """Take a share of `single_pass`'s measurements and write them to a folder.

    ``Y_j = H Omega_j`` and ``Psi^T Y_j`` for the measurements j of a share, with Omega and Psi
    (D, inner) defined by their seeds. Any number of jobs, on any machines that see the folder, take
    a share each, in any order; `assemble` computes the eigenpairs. Measurements are written chunk
    by chunk, and existing chunks are not measured again: a killed job loses at most one, and the
    same call resumes it. Shares may overlap. The first job records the settings and the operator; a
    job with another operator or other settings is refused before its first matvec.

    A chunk is a block of measurements; for the Gaussian and Rademacher kinds, which draw Psi for
    each chunk, the larger of a block and an eighth of outer.

    Args:
        H: The symmetric operator, D x D, float32 or float64, as for `eigsh`. Every job builds the
            same one; weights and batches are compared, and one matvec with that of the first job,
            which covers the loss function and the model's code.
        k: Number of eigenpairs, 1 <= k <= D.
        folder: Folder of the measurements; created if missing, in an existing folder.
        start: The share [start, stop) as measurements, 0 <= start < stop <= inner: the chunks that
            begin in it, so adjacent ranges partition the chunks wherever they are cut. Default 0.
        stop: One past the last; default inner. Without start, stop and part the job does all.
        part: The share as (i, n): part i = 0, ..., n - 1 of n equal ones, instead of a range.
        outer: Vectors in the basis, k <= outer <= inner; default 2 k. Only these are stored.
        inner: Total number of measurements; default 2 outer, at most D.
        measurements: "ssrft" (default), "gaussian" or "rademacher".
        generator: Source of the seeds of the two random matrices, in the same state in every job
            and left in it; the pairs are those of ``single_pass(H, k, generator=generator)``.
            Default None: a new one with seed 0.
        block_size: Matvecs per block, default 32. The first job's sets the chunks; the others'
            may be smaller, to save memory.
        progress: Whether to show a progress bar over this job's products, see `eigsh`.

    Returns:
        The ranges still missing in the folder afterwards: none if it can be assembled.

    Raises:
        ValueError: If an argument is out of range, the folder belongs to another operator or other
            settings, or a product has NaN or inf entries.
        TypeError: If H's dtype is not float32 or float64.
        FileNotFoundError: If the parent of `folder` does not exist.
        OSError: If the disk has too little space for the missing measurements, or is full; written
            chunks stay intact.

    Cost: one matvec for each measurement of the share, and one for the comparison. Memory: a chunk
    and a block of vectors. Disk, all jobs together: outer D floats and inner^2 doubles. SSRFT takes
    4 FFTs of length D for each measurement; the other kinds draw Psi, inner D random numbers, for
    each chunk.

    References:
        Fernandez, Schneider, Mahsereci, Hennig, "Connecting parameter magnitudes and Hessian
        eigenspaces at scale using sketched methods", TMLR 2025, arXiv 2504.14701.

    Example:
        >>> hesscurv.measure(H, 3, "measurements", part=(0, 2)) != []
        True
        >>> hesscurv.measure(H, 3, "measurements", part=(1, 2))
        []
    """
    H = as_linear_operator(H)
    if H.communicator.size > 1:
        raise ValueError(
            f"expected an operator of this process alone, got one that is spread over "
            f"{H.communicator.size} ranks: jobs of `measure` do not communicate; build it with "
            "process_group= a group of this rank only, or use eigsh(H, k, 'single_pass')"
        )
    wanted, omega, psi = _plan(H, k, outer, inner, measurements, generator, block_size)
    _check_share(start, stop, part, wanted.inner)
    files = MeasurementFolder.join(folder, wanted, functools.cache(lambda: product_sample(H)))
    files.remove_leftovers()
    manifest = files.manifest

    todo = []
    for chunk in _share(manifest.ranges(), start, stop, part):
        if files.is_whole(*chunk):
            continue
        if files.file(*chunk).exists():
            logger.warning("%s is damaged: measured again", files.file(*chunk))
            files.file(*chunk).unlink(missing_ok=True)
        todo.append(chunk)
    if todo:
        files.require_space(files.missing())
        products = sum(last - first for first, last in todo)
        H.expect(products)
        with CountedOperator(H, products, "measure", progress) as counted:
            _measure_chunks(counted, files, omega, psi, todo, block_size)
    return _joined(files.missing())


def missing(folder: str | os.PathLike[str]) -> list[tuple[int, int]]:
    """Return the ranges of measurements that a folder of `measure` still lacks.

    Truncated files count as missing; only `assemble` verifies the checksums of all numbers.

    Args:
        folder: The folder.

    Returns:
        Ranges (start, stop) as arguments of `measure`, in order; none if it can be assembled.

    Raises:
        FileNotFoundError: If no job has started there.
        ValueError: If the manifest is damaged, or a file belongs to other measurements.

    Example:
        >>> hesscurv.measure(H, 3, "measurements", 0, 4, block_size=4)
        [(4, 12)]
        >>> hesscurv.missing("measurements")
        [(4, 12)]
    """
    return _joined(MeasurementFolder.open(folder).missing())


def assemble(
    folder: str | os.PathLike[str],
    H: Any = None,
    *,
    residuals: bool = True,
    tol: float = 1e-3,
    block_size: int = 32,
    progress: bool = False,
) -> Eigenpairs:
    """Compute the eigenpairs from the measurements in a folder.

    ``Q = orth(Y[:, :outer])``, ``C = (Psi^T Q)^+ M ((Omega^T Q)^+)^T``, ``V = Q U``, as in
    `single_pass`: bit-identical for SSRFT, given the same products and number of threads, otherwise
    up to rounding. The folder is not changed.

    Args:
        folder: The folder of `measure`.
        H: The operator, on whose device the pairs are computed; compared with the measured one.
            Default None: the CPU, no residuals, and the layout from the folder.
        residuals: Whether to measure ``||H v - lambda v||`` if H is given, by k matvecs; default
            True. Otherwise they are NaN and no pair counts as converged.
        tol: Pair i has converged when its residual is at most
            ``max(tol |lambda_i|, 10 eps |lambda_1|)``; default 1e-3.
        block_size: Matvecs per block for the residuals; default 32.
        progress: Whether to show a progress bar over the matvecs for the residuals, see `eigsh`.

    Returns:
        The k eigenpairs, both signs, largest magnitude first. `num_matvecs` counts the measurements
        of all jobs. The eigenvectors are a view of storage (outer, D); ``.clone()`` them and drop
        the result to free the rest.

    Raises:
        FileNotFoundError: If no job has started in the folder.
        ValueError: If measurements are missing (the message lists the calls that take them), a file
            is damaged or belongs to other measurements, or H is another operator.

    Warns:
        ConvergenceWarning: If residuals are measured and exceed the tolerance.

    Cost: one read of the files, and k matvecs if residuals are measured. Memory: outer D floats,
    some blocks and, on a GPU, a chunk in host memory. SSRFT takes 4 outer FFTs of length D; the
    other kinds draw 2 inner D random numbers.

    References:
        As for `measure`.

    Example:
        >>> A = torch.diag(0.1 ** torch.arange(30.0).double())
        >>> hesscurv.measure(A, 3, "measurements")
        []
        >>> hesscurv.assemble("measurements", A, tol=0.1).eigenvalues.round(decimals=3)
        tensor([1.0000, 0.1000, 0.0100], dtype=torch.float64)
    """
    start = time.perf_counter()
    if block_size < 1:
        raise ValueError(f"expected block_size >= 1, got {block_size}")
    files = MeasurementFolder.open(folder)
    manifest = files.manifest
    if H is None:
        H, residuals = _Measured(manifest), False
    else:
        H = as_linear_operator(H)
        manifest.require_operator(fingerprint(H), files.path)
        manifest.require_product(lambda: product_sample(H), files.path)
    if lacking := _joined(files.absent()):
        calls = "\n".join(f"    {manifest.call(files.path, *chunk)}" for chunk in lacking)
        count = sum(last - first for first, last in lacking)
        raise ValueError(
            f"{count} of {manifest.inner} measurements are missing in {files.path}; run\n{calls}"
        )

    files.require_sizes()
    basis_mD = torch.empty(manifest.outer, manifest.dim, dtype=H.dtype, device=H.device)
    M_nn = torch.empty(manifest.inner, manifest.inner, dtype=torch.float64, device="cpu")
    for first, last in manifest.ranges():
        out_cD = basis_mD[first:last] if last <= manifest.outer else None
        M_nn[:, first:last] = files.read(first, last, out_cD)
    files.remove_leftovers()

    omega, psi = _test_matrices(manifest, H.device)
    Q_rD, _ = orthonormalize_(basis_mD)
    C_rr = core_matrix(Q_rD, M_nn, omega, psi)
    # In the state in which `single_pass` has it after the seeds of the two matrices.
    generator = torch.Generator().manual_seed(manifest.seed)
    for _ in range(2):
        draw_seed(generator)
    if residuals:
        H.expect(manifest.k)
    with CountedOperator(H, manifest.k, "assemble", progress) as counted:
        counted.num_matvecs = manifest.inner  # by the jobs
        return ritz_result(
            counted,
            basis_mD,
            C_rr,
            manifest.k,
            method="single_pass",
            generator=generator,
            residuals=residuals,
            tol=tol,
            block_size=block_size,
            start=start,
            info={
                "outer": manifest.outer,
                "inner": manifest.inner,
                "measurements": manifest.measurements,
                "seed": manifest.seed,
            },
        )


class _Measured(LinearOperator):
    """Placeholder for an operator known only by its measurements: sizes and layout, no matvecs."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest.dim, manifest.torch_dtype, torch.device("cpu"))
        layout = manifest.layout
        self.layout = None if layout is None else ParameterLayout.from_dict(layout)

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        raise NotImplementedError("measurements alone give no products; pass H to assemble")


def _plan(
    H: LinearOperator,
    k: int,
    outer: int | None,
    inner: int | None,
    measurements: str,
    generator: torch.Generator | None,
    block_size: int,
) -> tuple[Manifest, TestMatrix, TestMatrix]:
    """Check the settings; return this job's manifest and the random matrices."""
    k = as_int("k", k)  # JSON cannot hold NumPy integers
    check_generator(generator)
    if block_size < 1:
        raise ValueError(f"expected block_size >= 1, got {block_size}")
    dim = H.shape[0]
    outer, inner = map(operator.index, sketch_sizes(k, dim, outer, inner, None, 0))
    if inner == dim:
        measurements = "ssrft"
    omega_seed, psi_seed = next_seeds(default_generator(generator), 2)
    omega, psi = (
        make_test_matrix(measurements, dim, inner, matrix_seed, H.dtype, H.device)
        for matrix_seed in (omega_seed, psi_seed)
    )
    layout = getattr(H, "layout", None)
    manifest = Manifest(
        k=k,
        outer=outer,
        inner=inner,
        measurements=measurements,
        seed=default_generator(generator).initial_seed(),
        omega_seed=omega_seed,
        psi_seed=psi_seed,
        chunk=group_size(measurements, outer, block_size),
        dim=dim,
        dtype=str(H.dtype),
        layout=None if layout is None else layout.to_dict(),
        operator=fingerprint(H),
    )
    return manifest, omega, psi


def _test_matrices(manifest: Manifest, device: torch.device) -> tuple[TestMatrix, TestMatrix]:
    """Return Omega and Psi by the seeds in the manifest."""
    omega, psi = (
        make_test_matrix(
            manifest.measurements, manifest.dim, manifest.inner, seed, manifest.torch_dtype, device
        )
        for seed in (manifest.omega_seed, manifest.psi_seed)
    )
    return omega, psi


def _measure_chunks(
    H: CountedOperator,
    files: MeasurementFolder,
    omega: TestMatrix,
    psi: TestMatrix,
    todo: list[tuple[int, int]],
    block_size: int,
) -> None:
    """Measure chunks and write each one when done."""
    manifest = files.manifest
    # Past outer Y is not needed; but kinds that redraw Psi for each use test a whole chunk at once.
    stored = manifest.outer if manifest.measurements == "ssrft" else manifest.inner
    scratch_cD = torch.empty(
        max((last - first for first, last in todo if last <= stored), default=0),
        manifest.dim,
        dtype=H.dtype,
        device=H.device,
    )
    for first, last in todo:
        if files.file(first, last).exists():  # another job has written it meanwhile
            continue
        out_cD = scratch_cD[: last - first] if last <= stored else None
        tested_nc = take_measurements(H, omega, psi, first, last, out_cD, block_size)
        files.write(first, last, tested_nc, out_cD if last <= manifest.outer else None)


def _check_share(
    start: int | None, stop: int | None, part: tuple[int, int] | None, inner: int
) -> None:
    if part is not None:
        if start is not None or stop is not None:
            raise ValueError("expected a range (start, stop) or a part (i, n), got both")
        i, n = part
        if not 0 <= i < n:
            raise ValueError(f"expected part=(i, n) with 0 <= i < n, got {part}")
        return
    low, high = 0 if start is None else start, inner if stop is None else stop
    if not 0 <= low < high <= inner:
        raise ValueError(
            f"expected 0 <= start < stop <= inner={inner} measurements, got [{low}, {high})"
        )


def _share(
    ranges: list[tuple[int, int]],
    start: int | None,
    stop: int | None,
    part: tuple[int, int] | None,
) -> list[tuple[int, int]]:
    """Return the chunks of a job."""
    if part is not None:
        i, n = part
        return ranges[len(ranges) * i // n : len(ranges) * (i + 1) // n]
    low, high = start or 0, math.inf if stop is None else stop
    share = [chunk for chunk in ranges if low <= chunk[0] < high]
    if not share:
        before = max(first for first, _ in ranges if first <= low)
        after = min((first for first, _ in ranges if first > low), default=ranges[-1][1])
        raise ValueError(
            f"no chunk of measurements begins in [{low}, {high}); those around it begin at "
            f"{before} and {after}: take [{before}, {after}), or a wider range"
        )
    return share


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge adjacent ranges."""
    out: list[tuple[int, int]] = []
    for start, stop in ranges:
        if out and out[-1][1] == start:
            out[-1] = out[-1][0], stop
        else:
            out.append((start, stop))
    return out
