"""Thick-restart randomised block Krylov (block Lanczos) with full reorthogonalisation."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.krylov.checkpoint import Checkpoint
from hesscurv.eigensolvers.krylov.plan import (
    check_disk,
    check_sizes,
    expected_matvecs,
    identity,
    narrow_block,
    newest_state,
    plan,
)
from hesscurv.eigensolvers.krylov.resumed_operator import require_same_operator
from hesscurv.eigensolvers.krylov.run import KrylovRun
from hesscurv.eigensolvers.krylov.space import KrylovSpace
from hesscurv.eigensolvers.progress import Progress
from hesscurv.interface.integers import as_int
from hesscurv.linalg.random_matrices import default_generator
from hesscurv.linalg.ritz import sides_of
from hesscurv.operators.linear_operator import LinearOperator


def block_krylov(
    H: LinearOperator,
    k: int,
    *,
    which: str = "LM",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    initial: Tensor | None = None,
    block_size: int | None = None,
    max_basis: int | None = None,
    verify: bool = True,
    storage: str | os.PathLike[str] | None = None,
    storage_dtype: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Eigenpairs:
    r"""Compute k eigenpairs at an end of the spectrum by randomised block Krylov iteration.

    From a random block Q_1 the space span{Q_1, H Q_1, H^2 Q_1, ...} grows block by block, each
    block orthogonalised twice against all earlier ones; the Ritz pairs are those of
    :math:`T = Q^T H Q`. Residuals are free: with :math:`H Q = Q T + P R`, that of the Ritz pair
    (theta, Q y) is ||R y||. When the basis is full, the best Ritz vectors are kept and the space
    grows from them (thick restart). Once all k have converged, matvecs with fresh random vectors
    outside the space search for missed eigenvectors, such as further copies of an eigenvalue whose
    multiplicity exceeds the block size, and some residuals are measured to estimate the noise of
    the products.

    **No eigenpair is missed, except with a small probability.** A pair counts as converged if its
    residual is small and all eigenvalues before it are shown to be in the space: there are no
    others beyond ``x = |theta_i| + max(tol |theta_i|, 10 eps |lambda_1|)``. By Haynsworth's theorem
    that holds if H' + S(x) has no eigenvalue beyond x, with H' the compression of H outside the
    expanded vectors and S(x) known: see `krylov.eigenvalue_bounds`. A Krylov process of
    that matrix from one random vector runs until it finds an eigenvalue beyond x, or until the
    eigenvector would have to hold less than a share tau of that vector, which has probability
    0.001. So for every symmetric H, whatever its spectrum, multiplicities and gaps, a search
    wrongly reports nothing missed with probability at most 0.001, in exact arithmetic; a solve ends
    with two searches, one for each end, with random vectors independent of all earlier ones. If the
    matvecs do not suffice, because the spectrum is flat beyond the last pair or the basis is small,
    pairs that others may precede do not count as converged, and a warning says so. Products in
    error by more than their tolerance, or not symmetric, void the guarantee.

    Args:
        H: The symmetric operator, D x D.
        k: Number of pairs, 1 <= k <= D.
        which: "LM", largest magnitudes (default); "LA", largest values; "SA", smallest values.
        tol: Pair i has converged when its residual is at most
            ``max(tol |lambda_i|, 10 eps |lambda_1|)``, where |lambda_1| is the largest known
            magnitude, and none is missed before it; default 1e-3.
        max_matvecs: Maximal number of matvecs; default 20 k + 1000.
        generator: Source of the starting block; default a new one with seed 0.
        initial: Vectors (D, k0) for a warm start, such as an earlier solution; they are multiplied
            first, then the directions that couple most to unconverged pairs.
        block_size: Vectors in a block; by default chosen from the operator's calibration.
        max_basis: Maximal number of stored vectors, at least k + 3 block_size; default 2 k + 10
            block_size + 30, or fewer if memory is short. Memory is allocated as the basis grows.
        verify: Whether to search for missed eigenvectors at the end, usually 8 to 25 matvecs. If
            not, residuals alone decide convergence.
        storage: Location of the basis: "device", the operator's; "host" (or "cpu", the same), host
            memory, pinned if possible, with copies that overlap with the computation on a CUDA
            device; or a folder on a disk, for memory-mapped files that are removed with the result.
            By default chosen from the free memory: see
            `hesscurv.storage.placement.choose_placement`.
        storage_dtype: H's dtype, or torch.float16 or torch.bfloat16: half the memory, with vectors
            rounded by 2^-12 or 2^-9 of their norm, which weighs more in residuals further down the
            spectrum; sums stay in H's dtype. By default H's, or float16 if memory is short and tol
            is at least 5e-3. The eigenvectors are returned in this dtype.
        checkpoint: A folder for checkpoints; if it holds one, the same call resumes from it, and
            its result is bit-identical on a CPU. See below.
        progress: Whether to show a progress bar, see `eigsh`.

    Returns:
        The eigenpairs, in the order of `which`: largest magnitude first, both signs. Residuals are
        estimates that include the noise of the products, measured on up to 8 pairs. No pair is
        missed before any of the ``info["complete"]`` leading ones.

    Raises:
        ValueError: If an argument is out of range, the basis fits nowhere, or the checkpoint is
            damaged or belongs to another problem.
        DiskFullError: If the disk of the storage or the checkpoint is full, an OSError.
        BlockingIOError: If another process uses the same checkpoint.

    A checkpoint takes D numbers of the basis' dtype for each matvec, up to three times the basis,
    and little time. It may be resumed with another tol, max_matvecs or storage; everything else
    must be the same: weights, batches, k, generator, initial, block_size, max_basis, verify, number
    of processes. A finished one returns the result again for a few matvecs. The loss function and
    the model's code, which the fingerprint does not cover, are checked by one uncounted matvec
    against the projected matrix: see `hesscurv.eigensolvers.krylov.resumed_operator`.

    Cost: usually 2 k to 4 k matvecs and 2 k D floats; 2 m^2 D multiply-adds to orthogonalise m
    vectors twice.

    Warns:
        ConvergenceWarning: If pairs have not converged, or others may have been missed before
            them, within `max_matvecs`. It names the cause: too few matvecs, a small basis, noise
            or asymmetry of the products.

    References:
        Golub, Underwood, "The block Lanczos method for computing eigenvalues" (1977).
        Musco, Musco, "Randomized block Krylov methods", NeurIPS 2015, algorithm 2.
        Wu, Simon, "Thick-restart Lanczos method", SIAM J. Matrix Anal. Appl. 22 (2000).
        Haynsworth, "Determination of the inertia of a partitioned Hermitian matrix", Linear Algebra
        Appl. 1 (1968); Parlett, "The symmetric eigenvalue problem" (1998), chapter 10.

    Example:
        >>> from hesscurv.eigensolvers import block_krylov
        >>> block_krylov(H, 3, which="LA").eigenvalues.diff() <= 0
        tensor([True, True])
    """
    k, (block_size, max_basis) = as_int("k", k), check_sizes(block_size, max_basis)
    sides_of(which)
    generator = default_generator(generator)
    ranks, asked = H.communicator, {"block_size": block_size, "max_basis": max_basis}
    before, journal, state = generator.get_state(), None, None
    given = None if initial is None else tuple(initial.shape)
    # Ranks with different arguments would wait for each other in different collectives.
    ranks.agree(
        (k, which, tol, max_matvecs, asked, verify, str(storage_dtype), given, checkpoint is None),
        "arguments of the solve",
    )
    try:
        if checkpoint is not None:
            marks = identity(
                H,
                k,
                **asked,
                initial=initial,
                verify=verify,
                generator=generator,
                which=which,
            )
            with ranks.together("opening the checkpoint"):
                journal = Checkpoint(checkpoint, marks, ranks.rank)
            state = newest_state(journal, H)
        H.expect(expected_matvecs(k, block_size or narrow_block(k, H.shape[0])))
        if state is not None:
            # Resume with the same linearization: another one rounds differently.
            H.adopt(state["operator"])
        block, placement = plan(
            H,
            k,
            tol,
            **asked,
            num_initial=0 if initial is None else initial.shape[1],
            storage=storage,
            storage_dtype=storage_dtype,
            state=state,
        )
        if checkpoint is not None and state is None:
            with ranks.together("checking the disk"):
                check_disk(checkpoint, placement, k, block, ranks.size)
        space = KrylovSpace(H, k, tol, block, placement, generator, which)
        with H.solving(), Progress(k, progress, H) as bar:
            bar.announce(str(placement), unusual=placement.is_unusual(H.dtype))
            most = 20 * k + 1000 if max_matvecs is None else max_matvecs
            run = KrylovRun(space, most, verify, bar, journal)
            # The basis before the state, which is checked against its size.
            with ranks.together("restoring the basis"):
                if journal is not None:
                    journal.replay(space.basis)
                if state is not None:
                    run.load(state)
            if state is None:
                space.start(initial)
            else:
                assert checkpoint is not None
                require_same_operator(space, checkpoint)
                bar.go_on_from(space.num_matvecs)
                bar.announce(f"going on from {checkpoint} after {space.num_matvecs} products")
            run.solve()
            return run.result()
    except BaseException:
        generator.set_state(before)  # a repeated call draws the same numbers
        raise
    finally:
        if journal is not None:
            journal.close()
