"""Randomised block Krylov (block Lanczos) with full reorthogonalisation and thick restart."""

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
    newest_state,
    plan,
)
from hesscurv.eigensolvers.krylov.resumed_operator import require_same_operator
from hesscurv.eigensolvers.krylov.run import KrylovRun
from hesscurv.eigensolvers.krylov.space import KrylovSpace
from hesscurv.eigensolvers.progress import Progress
from hesscurv.interface.integers import as_int
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

    From a random block Q_1 the space span{Q_1, H Q_1, H^2 Q_1, ...} grows block by block, every
    block orthogonalised twice against all before it, and the pairs are those of
    :math:`T = Q^T H Q` (Rayleigh-Ritz). The residuals come free: with
    :math:`H Q = Q T + P R`, that of the Ritz pair (theta, Q y) is ||R y||. When the basis is full,
    the best Ritz vectors are kept and the space grows on from them (thick restart). Once all k
    have converged, products on fresh random vectors outside the space look for eigenvectors that
    were missed, such as further copies of an eigenvalue of more copies than a block has vectors,
    and some residuals are measured to learn the noise of the products.

    **None is missed, but with a small probability.** A pair counts as converged when, beside its
    residual, it is shown that all eigenvalues before it are in the space: beyond
    ``x = |theta_i| + max(tol |theta_i|, 10 eps |lambda_1|)`` there are no others. By Haynsworth's
    theorem that is so if H' + S(x) has no eigenvalue beyond x, H' being H outside the expanded
    vectors and S(x) known: see `hesscurv.linalg.eigenvalue_bounds`. A Krylov process of that
    matrix from one random vector is continued until an eigenvalue beyond x is found, or until its
    eigenvector, by the numbers found, must have less than the share tau of that vector, where a
    smaller share than tau has a probability of 0.001. So for every symmetric H, whatever its
    spectrum, multiplicities and gaps, one search wrongly finds nothing missed with a probability
    of at most 0.001, in exact arithmetic; two searches, one for each end, end a solve. The random
    vectors are independent of all before them. Where it cannot be shown within the products,
    because the spectrum is flat beyond the last pair or the basis small, pairs that others may
    come before do not count as converged, and a warning says so. Products that are off by more
    than their tolerance, or not symmetric, void it.

    Args:
        H: The symmetric operator, D x D.
        k: Number of pairs, 1 <= k <= D.
        which: "LM", largest magnitudes (default); "LA", largest values; "SA", smallest values.
        tol: Pair i has converged when its residual is at most
            ``max(tol |lambda_i|, 10 eps |lambda_1|)``, where |lambda_1| is the largest magnitude
            known, and none is missed before it; default 1e-3.
        max_matvecs: The most products; default 20 k + 1000.
        generator: Source of the starting block; default a new one with seed 0.
        initial: Vectors (D, k0) to start from, such as an earlier solution's; they are multiplied
            first, then the directions that couple most to pairs not yet converged.
        block_size: Vectors in a block; by default chosen from the operator's calibration.
        max_basis: The most vectors to store, at least k + 3 block_size; default 2 k + 10
            block_size + 30, or fewer where memory is short. Memory is taken as the basis grows.
        verify: Whether to look for missed eigenvectors at the end, usually 8 to 25 products. If
            not, residuals alone decide what has converged.
        storage: Where the basis lives: "device", the operator's; "host" (or "cpu", the same), the
            host's memory, pinned where there is room for that, from and to which vectors are
            copied while a CUDA device computes; or a folder on a disk, for files that are mapped
            into memory and go with the result. By default chosen from what is free: see
            `hesscurv.storage.placement.choose_placement`.
        storage_dtype: H's dtype, or torch.float16 or torch.bfloat16: half the memory, at the price
            of vectors rounded by 2^-12 or 2^-9 of their norm, more of which shows in residuals the
            further down the spectrum; sums are in H's dtype all the same. By default H's, or
            float16 where memory is short and tol is at least 5e-3. The eigenvectors are returned
            as they are stored.
        checkpoint: A folder to save the work in, as it goes; where there is work in it already,
            the same call goes on from there, and ends with the same bits on a CPU. See below.
        progress: Whether to show a progress bar: pairs converged, products, rate.

    Returns:
        The eigenpairs, in the order of `which`: largest magnitude first, both signs. Residuals are
        estimates that include the noise of the products, as measured on up to 8 pairs.
        ``info["complete"]`` leading pairs are known to have none missed before them.

    Raises:
        ValueError: If an argument is out of range, the basis fits nowhere, or the checkpoint is
            another problem's or damaged.
        DiskFullError: If the disk of the storage or the checkpoint has no room, an OSError.
        BlockingIOError: If another process works with the same checkpoint.

    A checkpoint takes D numbers of the basis' dtype for each product, up to three times the basis,
    and little time. It may be resumed with another tol, max_matvecs or storage, and with the same
    everything else: weights, batches, k, generator, initial, block_size, max_basis, verify, number
    of processes. A finished one gives the result again for a few products. What a fingerprint does
    not know, the loss function and the model's code, is compared by one product, which does not
    count, with the projected matrix: see `hesscurv.eigensolvers.krylov.resumed_operator`.

    Cost: usually 2 k to 4 k products and 2 k D floats; 2 m^2 D multiply-adds to orthogonalise m
    vectors twice.

    Warns:
        ConvergenceWarning: If pairs have not converged, or others may have been missed before
            them, within `max_matvecs`. It names the cause: too few products, a small basis, noise
            or asymmetry of the products.

    References:
        Golub, Underwood, "The block Lanczos method for computing eigenvalues" (1977).
        Musco, Musco, "Randomized block Krylov methods", NeurIPS 2015, algorithm 2.
        Wu, Simon, "Thick-restart Lanczos method", SIAM J. Matrix Anal. Appl. 22 (2000).
        Haynsworth, "Determination of the inertia of a partitioned Hermitian matrix", Linear Algebra
        Appl. 1 (1968); Parlett, "The symmetric eigenvalue problem" (1998), chapter 10.
    """
    k, (block_size, max_basis) = as_int("k", k), check_sizes(block_size, max_basis)
    sides_of(which)
    generator = generator or torch.Generator().manual_seed(0)
    ranks, asked = H.communicator, {"block_size": block_size, "max_basis": max_basis}
    before, journal, state = generator.get_state(), None, None
    given = None if initial is None else tuple(initial.shape)
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
        H.expect(expected_matvecs(k, block_size or min(16, max(4, k // 4))))
        if state is not None:
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
            with ranks.together("looking at the disk"):
                check_disk(checkpoint, placement, k, block, ranks.size)
        space = KrylovSpace(H, k, tol, block, placement, generator, which)
        with H.solving(), Progress(k, progress) as bar:
            bar.say(str(placement), unusual=placement.is_unusual(H.dtype))
            most = 20 * k + 1000 if max_matvecs is None else max_matvecs
            run = KrylovRun(space, most, verify, bar, journal)
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
                bar.say(f"going on from {checkpoint} after {space.num_matvecs} products")
            run.solve()
            return run.result()
    except BaseException:
        generator.set_state(before)  # so that the same call can be made again
        raise
    finally:
        if journal is not None:
            journal.close()
