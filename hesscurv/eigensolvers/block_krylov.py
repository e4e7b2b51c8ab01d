"""Randomised block Krylov (block Lanczos) with full reorthogonalisation and thick restart."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hesscurv.eigensolvers.checkpoint import Checkpoint
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.krylov_plan import (
    check_disk,
    check_sizes,
    expected_matvecs,
    identity,
    newest_state,
    plan,
)
from hesscurv.eigensolvers.krylov_run import KrylovRun
from hesscurv.eigensolvers.krylov_space import KrylovSpace
from hesscurv.eigensolvers.progress import Progress
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
    r"""Compute the top k eigenpairs by randomised block Krylov iteration.

    From a random block Q_1 the space span{Q_1, H Q_1, H^2 Q_1, ...} grows block by block, every
    block orthogonalised twice against all before it, and the pairs are those of
    :math:`T = Q^T H Q` (Rayleigh-Ritz). The residuals come free: with
    :math:`H Q = Q T + P R`, that of the Ritz pair (theta, Q y) is ||R y||. When the basis is full,
    the best Ritz vectors are kept and the space grows on from them (thick restart). Once all k
    have converged, a few products on fresh random vectors outside the space look for eigenvectors
    that the starting block missed, such as further copies of a repeated eigenvalue, and one
    block of residuals is measured to learn the noise of the products.

    Args:
        H: The symmetric operator, D x D.
        k: Number of pairs, 1 <= k <= D.
        which: "LM" (default) for the largest magnitudes, "LA" for the largest values, "SA" for the
            smallest; from that end on.
        tol: Pair i has converged when its residual is at most
            ``max(tol |lambda_i|, 10 eps |lambda_1|)``; default 1e-3.
        max_matvecs: The most products; default 20 k + 1000.
        generator: Source of the starting block; default a new one with seed 0.
        initial: Vectors (D, k0) to start from, such as an earlier solution's; they are multiplied
            first, then the directions that couple most to pairs not yet converged.
        block_size: Vectors in a block; by default chosen from the operator's calibration.
        max_basis: The most vectors to store, at least k + 3 block_size; default 2 k + 10
            block_size + 30, or fewer where memory is short. Memory is taken as the basis grows.
        verify: Whether to look for missed eigenvectors at the end, 6 to 12 products.
        storage: Where the basis lives: "device", the operator's; "cpu", the host's memory; or a
            folder on a disk, for files that are mapped into memory and go with the result. By
            default chosen from what is free: see `hesscurv.storage.placement.choose_placement`.
        storage_dtype: H's dtype, or torch.float16 or torch.bfloat16: half the memory, at the price
            of vectors rounded by 2^-12 or 2^-9 of their norm, more of which shows in residuals the
            further down the spectrum; sums are in H's dtype all the same. By default H's, or
            float16 where memory is short and tol is at least 5e-3. The eigenvectors are returned
            as they are stored.
        checkpoint: A folder to save the work in, as it goes; where there is work in it already,
            the same call goes on from there, and ends with the same bits on a CPU. See below.
        progress: Whether to show a progress bar: pairs converged, products, rate.

    Returns:
        The eigenpairs, both signs, largest magnitude first. Residuals are estimates that include
        the noise of the products, as measured on one block.

    Raises:
        ValueError: If an argument is out of range, the basis fits nowhere, or the checkpoint is
            another problem's or damaged.
        DiskFullError: If the disk of the storage or the checkpoint has no room, an OSError.
        BlockingIOError: If another process works with the same checkpoint.

    No pair is missed without a word. Pairs are called converged where a search has shown that
    nothing before them is missing: a block Krylov process from random vectors outside the space
    bounds the largest eigenvalue there, coupling included. The bound is wrong with a probability of
    at most 1e-3 a search, over these vectors, for any spectrum: repeated and clustered eigenvalues
    and both signs included. It is one up to the tolerance (an eigenvalue beyond the last pair's by
    less than its threshold may be missed) and to the noise of the products. Where products, steps
    or room run out before, pairs that may have others before them are not called converged, and a
    warning says so. With ``verify=False`` only the free test is made, of the singular values of the
    projection.

    A checkpoint takes D numbers of the basis' dtype for each product, up to three times the basis,
    and little time. It may be resumed with another tol, max_matvecs or storage, and with the same
    everything else: weights, batches, k, generator, initial, block_size, max_basis, verify, number
    of processes. A finished one gives the result again for a few products.

    Cost: usually 2 k to 4 k products and 2 k D floats; 2 m^2 D multiply-adds to orthogonalise m
    vectors twice.

    Warns:
        ConvergenceWarning: If pairs have not converged within `max_matvecs`.

    References:
        Golub, Underwood, "The block Lanczos method for computing eigenvalues" (1977).
        Musco, Musco, "Randomized block Krylov methods", NeurIPS 2015, algorithm 2.
        Wu, Simon, "Thick-restart Lanczos method", SIAM J. Matrix Anal. Appl. 22 (2000).
    """
    check_sizes(block_size, max_basis)
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
        with Progress(k, progress) as bar:
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
