"""Randomised block Krylov (block Lanczos) with full reorthogonalisation and thick restart."""

from __future__ import annotations

import math
import time
import warnings

import torch
from torch import Tensor

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.krylov_space import KrylovSpace
from hesscurv.eigensolvers.progress import Progress
from hesscurv.eigensolvers.residuals import ConvergenceWarning, measured_residuals
from hesscurv.linalg.device_memory import device_memory
from hesscurv.linalg.rayleigh_ritz import ritz_pairs
from hesscurv.operators.linear_operator import LinearOperator

# The search for missed eigenvectors: by how much one would dominate, and when to give up.
_DOMINANT, _MOST_STEPS, _MOST_ROUNDS = 10.0, 30, 3


def block_krylov(
    H: LinearOperator,
    k: int,
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    initial: Tensor | None = None,
    block_size: int | None = None,
    max_basis: int | None = None,
    verify: bool = True,
    progress: bool = False,
) -> Eigenpairs:
    r"""Compute the k eigenpairs of largest magnitude by randomised block Krylov iteration.

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
        progress: Whether to show a progress bar: pairs converged, products, rate.

    Returns:
        The eigenpairs, both signs, largest magnitude first. Residuals are estimates that include
        the noise of the products, as measured on one block.

    Raises:
        ValueError: If an argument is out of range.

    Cost: usually 2 k to 4 k products and 2 k D floats; 2 m^2 D multiply-adds to orthogonalise m
    vectors twice.

    Warns:
        ConvergenceWarning: If pairs have not converged within `max_matvecs`.

    References:
        Golub, Underwood, "The block Lanczos method for computing eigenvalues" (1977).
        Musco, Musco, "Randomized block Krylov methods", NeurIPS 2015, algorithm 2.
        Wu, Simon, "Thick-restart Lanczos method", SIAM J. Matrix Anal. Appl. 22 (2000).
    """
    generator = generator or torch.Generator().manual_seed(0)
    H.expect(expected_matvecs(k, block_size or min(16, max(4, k // 4))))
    block = min(block_size or choose_block_size(H, k), H.shape[0])
    known = 0 if initial is None else initial.shape[1]
    capacity = basis_capacity(H, k, block, known, max_basis)
    space = KrylovSpace(H, k, tol, block, capacity, generator)
    _start(space, initial, generator)
    with Progress(k, progress) as bar:
        run = _Run(space, 20 * k + 1000 if max_matvecs is None else max_matvecs, bar)
        run.solve(verify)
        return run.result()


def _start(space: KrylovSpace, initial: Tensor | None, generator: torch.Generator) -> None:
    """Put the first vectors into an empty space."""
    if initial is not None:
        start_KD = initial.mT.to(space.H.device, space.H.dtype, copy=True)
        if space.capacity < min(space.dim, 2 * len(start_KD) + 3 * space.block):
            # No room for all of them and their products: start from a block of their span.
            mix = torch.randn(space.block, len(start_KD), generator=generator, dtype=start_KD.dtype)
            start_KD = mix.to(start_KD.device) @ start_KD
        space.num_initial = space.add_pending(start_KD)
    if space.num_initial < space.k:
        space.add_random(space.block)


class _Run:
    """When to expand, to restart, to search and to stop."""

    def __init__(self, space: KrylovSpace, max_matvecs: int, progress: Progress) -> None:
        self.space, self.max_matvecs, self.progress = space, max_matvecs, progress
        self.start = time.perf_counter()
        self.next_check = 0

    def solve(self, verify: bool) -> None:
        """Expand until all pairs have converged and no missed one is found."""
        space = self.space
        count = 1 if space.k < 50 else 2
        inconclusive = 0
        while self._converge() and verify and space.num_expanded < space.dim:
            found = self._found_missed(count)
            if found is False or self._affordable(1) == 0:
                break
            if found:
                count, inconclusive = min(2 * count, space.block), 0
            else:
                inconclusive += 1
                if inconclusive == _MOST_ROUNDS:
                    break
        if verify:  # the search may have brought pairs among the k largest
            self._converge()

    def _converge(self) -> bool:
        """Expand until all k pairs have converged (True), or cannot any more (False)."""
        space = self.space
        while True:
            pending, expanded = space.num_pending, space.num_expanded
            if expanded >= space.k and (expanded >= self.next_check or pending == 0):
                # In H's dtype first: half the time in float32, and good to the products' rounding.
                done = int(space.converged(space.H.dtype).sum())
                if done == space.k:
                    done = int(space.converged().sum())
                self.progress.show(done, space.num_matvecs)
                if done == space.k or expanded == space.dim:
                    return True
                if self._at_noise():
                    return False
                # An eigenproblem of size m costs as much as several blocks: check more and more
                # rarely, but more often near the end.
                near = done / space.k
                share = 0.05 if near > 0.9 else 0.12 if near > 0.5 else 0.2
                self.next_check = expanded + max(space.block, int(share * expanded))
            size = self._affordable(space.block if pending > 1.5 * space.block else pending or 1)
            if size == 0:
                return False
            if not space.fits(max(size, space.block)):
                space.restart()
                self.next_check = 0
            elif pending == 0:
                space.add_random(space.block)
            elif expanded < space.num_initial:
                space.expand(min(size, space.num_initial - expanded))
            else:
                space.select(size)
                space.expand(size)
            self.progress.show(None, space.num_matvecs)

    def _at_noise(self) -> bool:
        """Whether what has not converged is as good as the products' noise lets it be."""
        space = self.space
        dtype = space.H.dtype
        if bool(space.converged(dtype).all()):  # the rough look was too rough
            dtype = torch.float64
        residuals = space.ritz(dtype)[2]
        return float(residuals[~space.converged(dtype)].max()) < 2 * space.noise

    def _found_missed(self, count: int) -> bool | None:
        """Look outside the basis for an eigenvalue that belongs to the k largest.

        Fresh random vectors, orthogonal to the basis, are expanded by themselves: what the basis
        misses grows out of them, since all else of its magnitude is in the basis. With theta their
        own largest Ritz value after s steps, an eigenvector of size |lambda_k| has grown by the
        Chebyshev polynomial T_s(|lambda_k| / |theta|) relative to the rest, from its share
        sqrt(count / D) of a random start. It is over when it would dominate, and does not; None
        when the basis or the steps ran out before.
        """
        space = self.space
        magnitudes = space.ritz()[0][: space.k].abs()
        # What is larger than |lambda_k| by less than a residual may have does not matter.
        bound = float(magnitudes[-1] + space.thresholds(magnitudes)[-1])
        if bound == 0:  # only the zero operator has no scale
            return False
        self.next_check = 0
        if space.basis.size == space.dim:  # all that is outside is pending
            space.expand(self._affordable(min(space.block, space.num_pending)))
            return True
        if not space.fits(count * (_MOST_STEPS // 2)):
            space.restart()
        added = space.add_random(count)
        first = space.num_expanded
        for step in range(_MOST_STEPS):
            if added == 0:  # the vectors' own Krylov space is exhausted
                space.step_back(first)
                return False
            if not space.fits(added) or self._affordable(added) < added:
                break
            space.bring_last_forward(added)
            added = space.expand(added)
            theta = float(ritz_pairs(space.A[first : space.num_expanded, first:])[0][0].abs())
            if theta > bound:
                return True
            growth = (step + 1) * math.acosh(bound / max(theta, 1e-3 * bound))
            if growth > math.log(2 * _DOMINANT * math.sqrt(space.dim / count)):
                space.step_back(first)
                return False
        return None

    def _affordable(self, size: int) -> int:
        return max(0, min(size, self.max_matvecs - self.space.num_matvecs))

    def result(self) -> Eigenpairs:
        """Form the eigenvectors, measure the noise of the products, and say what has converged."""
        space, H = self.space, self.space.H
        values, residuals, V_Dk = space.take()

        noise = float("nan")
        sample = torch.linspace(0, space.k - 1, min(space.block, space.k)).round().long().unique()
        if self._affordable(len(sample)) == len(sample):
            measured = measured_residuals(
                H, values[sample].to(H.dtype), V_Dk[:, sample.to(H.device)]
            ).to("cpu", torch.float64)
            space.num_matvecs += len(sample)
            # Only what the estimate does not explain is noise, which is alike for all pairs.
            excess = measured**2 - residuals[sample] ** 2
            excess[excess < 0.2 * residuals[sample] ** 2] = 0
            noise = float(excess.max().sqrt())
            residuals = torch.hypot(residuals, torch.tensor(noise, dtype=torch.float64))
            residuals[sample] = measured
        # The values are rounded to H's dtype, which alone makes a residual of this size.
        residuals = torch.hypot(residuals, space.eps / 2 * values.abs())
        done = residuals <= space.thresholds(values)
        self.progress.show(int(done.sum()), space.num_matvecs)
        if not bool(done.all()):
            self._warn(
                values, residuals, done, max(space.noise, 0.0 if math.isnan(noise) else noise)
            )
        return Eigenpairs(
            eigenvalues=values.to(H.device, H.dtype),
            eigenvectors=V_Dk,
            residuals=residuals.to(H.device, H.dtype),
            converged=done.to(H.device),
            num_matvecs=space.num_matvecs,
            method="block_krylov",
            layout=getattr(H, "layout", None),
            info={
                "tol": space.tol,
                "block_size": space.block,
                "max_basis": space.capacity,
                "restarts": space.num_restarts,
                "noise": noise,
                "seconds": time.perf_counter() - self.start,
            },
        )

    def _warn(self, values: Tensor, residuals: Tensor, done: Tensor, noise: float) -> None:
        space = self.space
        worst = int((residuals / values.abs().clamp(min=1e-300)).argmax())
        if float(residuals[~done].min()) > 5 * noise:
            remedy = f"raise max_matvecs (now {self.max_matvecs}), max_basis or tol"
        else:
            remedy = (
                f"the products' noise is {noise:.2g}: compute them in float64 "
                "(compute_dtype=torch.float64) or raise tol"
            )
        warnings.warn(
            f"{int(done.sum())} of {space.k} eigenpairs have converged to tol={space.tol:g} after "
            f"{space.num_matvecs} products; pair {worst} has eigenvalue {values[worst]:.3g} and "
            f"residual {residuals[worst]:.2g}; {remedy}. See `converged` and `residuals`",
            ConvergenceWarning,
            stacklevel=4,
        )


def expected_matvecs(k: int, block: int) -> int:
    """Return about how many products k pairs take, as measured on Hessians of small nets."""
    return 2 * k + 9 * block


def choose_block_size(H: LinearOperator, k: int) -> int:
    """Return the block size with the least predicted time for k pairs, by H's calibration.

    A wider block makes a product and the reading of the basis cheaper, and the space grow slower in
    degree: see `expected_matvecs`.
    """
    dim = H.shape[0]
    if not hasattr(H, "seconds_per_vector"):
        return max(1, min(16, k // 4 if k > 16 else 4, dim))
    # Orders of magnitude are enough: entries per second read, multiplied and added.
    read, multiplied = (2.5e9, 5e10) if H.device.type == "cpu" else (4e11, 1e13)

    def seconds(b: int) -> float:
        # A measured projection reads the basis, of k vectors on average, twice a block.
        gram_schmidt = 2 * k * dim * (1 / (b * read) + 1 / multiplied)
        return float((H.seconds_per_vector(b) + gram_schmidt) * expected_matvecs(k, b))

    return min(dim, min((b for b in (4, 8, 16, 32, 64) if b <= max(4, k // 4)), key=seconds))


def basis_capacity(
    H: LinearOperator, k: int, block: int, num_initial: int, wanted: int | None
) -> int:
    """Return how many vectors to store at most.

    Raises:
        ValueError: If `wanted`, or the memory, is less than k pairs need.
    """
    dim = H.shape[0]
    least = min(dim, k + 3 * block)
    if wanted is not None:
        if wanted < least:
            raise ValueError(
                f"expected max_basis >= k + 3 block_size = {least}, got {wanted}; lower k or "
                "block_size"
            )
        return min(wanted, dim)
    size = dim * torch.finfo(H.dtype).bits // 8
    room = device_memory(H.device) * 3 // 4 // size
    if room < least:
        raise ValueError(
            f"{least} vectors of {size / 1e9:.3g} GB each do not fit the memory of {H.device}: "
            f"there is room for {room}; lower k or block_size, or select fewer parameters"
        )
    return min(dim, max(least, min(room, 2 * max(k, num_initial) + 10 * block + _MOST_STEPS)))
