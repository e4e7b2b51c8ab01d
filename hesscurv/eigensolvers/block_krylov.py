"""Randomised block Krylov (block Lanczos) with full reorthogonalisation and thick restart."""

from __future__ import annotations

import math
import time
import warnings

import torch
from torch import Tensor

from hesscurv.eigensolvers.basis import Basis
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.progress import Progress
from hesscurv.eigensolvers.residuals import converged, convergence_threshold, measured_residuals
from hesscurv.linalg.device_memory import device_memory
from hesscurv.linalg.orthogonalization import orthonormalize_against_, project_out_
from hesscurv.linalg.rayleigh_ritz import ritz_pairs
from hesscurv.operators.linear_operator import LinearOperator

# The search for missed eigenvectors: by how much one would dominate, and when to give up.
_DOMINANT, _MOST_STEPS, _MOST_ROUNDS = 10.0, 30, 3


class ConvergenceWarning(UserWarning):
    """Some of the returned eigenpairs have not converged."""


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
        max_basis: The most vectors to store, at least k + 2 block_size; default 2 k + 10
            block_size + 30, or fewer where memory is short. Memory is taken as the basis grows.
        verify: Whether to look for missed eigenvectors at the end, 6 to 12 products.
        progress: Whether to show a progress bar: pairs converged, products, rate.

    Returns:
        The eigenpairs, both signs, largest magnitude first. Residuals are estimates that include
        the noise of the products, as measured on one block.

    Raises:
        ValueError: If an argument is out of range.

    Cost: usually about 2 k products and 2 k D floats; 2 m^2 D multiply-adds to orthogonalise m
    vectors twice.

    Warns:
        ConvergenceWarning: If pairs have not converged within `max_matvecs`.

    References:
        Golub, Underwood, "The block Lanczos method for computing eigenvalues" (1977).
        Musco, Musco, "Randomized block Krylov methods", NeurIPS 2015, algorithm 2.
        Wu, Simon, "Thick-restart Lanczos method", SIAM J. Matrix Anal. Appl. 22 (2000).
    """
    run = _BlockKrylov(H, k, tol, max_matvecs, generator, initial, block_size, max_basis, progress)
    with run.progress:
        return run.solve(verify)


class _BlockKrylov:
    """State of a run: [E, P] orthonormal, with ``H E = E T + P R``; T, R are parts of A.

    E are the m expanded vectors, those whose product is known, P the p pending ones, stored after
    them; A = [E, P]^T H E is (m + p, m).
    """

    def __init__(
        self,
        H: LinearOperator,
        k: int,
        tol: float,
        max_matvecs: int | None,
        generator: torch.Generator | None,
        initial: Tensor | None,
        block_size: int | None,
        max_basis: int | None,
        progress: bool,
    ) -> None:
        self.H, self.k, self.tol = H, k, tol
        self.dim = H.shape[0]
        self.max_matvecs = 20 * k + 1000 if max_matvecs is None else max_matvecs
        self.generator = generator or torch.Generator().manual_seed(0)
        self.block = min(block_size or choose_block_size(H, k), self.dim)
        self.start = time.perf_counter()
        known = 0 if initial is None else initial.shape[1]
        self.capacity = basis_capacity(H, max(k, known), self.block, max_basis)
        self.basis = Basis(self.dim, self.capacity, k, max(self.block, k // 4), H.dtype, H.device)
        self.num_expanded = 0
        self.A = torch.zeros(0, 0, dtype=torch.float64)
        self.scale = 0.0  # the largest ||H q|| seen: noise is relative to it
        self.matvecs = 0
        self.next_check = 0
        self.eps = torch.finfo(H.dtype).eps
        self.num_initial = 0
        if initial is not None:
            self.num_initial = self._add_pending(initial.mT.to(H.device, H.dtype, copy=True))
        if self.num_initial < k:
            self._add_random(self.block)
        self.progress = Progress(k, progress)

    # -- the run --------------------------------------------------------------------------------

    def solve(self, verify: bool) -> Eigenpairs:
        """Expand until all pairs have converged, look for missed ones, and return them."""
        while self.num_expanded < self.num_initial and self.matvecs < self.max_matvecs:
            self._expand(self._affordable(min(self.block, self.num_initial - self.num_expanded)))
        count = 1 if self.k < 50 else 2
        inconclusive = 0
        while self._iterate() and verify and self.basis.size < self.dim:
            found = self._found_missed(count)
            if found is False or self._affordable(1) == 0:
                break
            if found:
                count, inconclusive = min(2 * count, self.block), 0
            else:
                inconclusive += 1
                if inconclusive == _MOST_ROUNDS:
                    break
        return self._result()

    def _iterate(self) -> bool:
        """Expand until all k pairs have converged (True) or the products are used up (False)."""
        while True:
            pending = self.basis.size - self.num_expanded
            if self.num_expanded >= self.k and (
                self.num_expanded >= self.next_check or pending == 0
            ):
                values, _, residuals = self._ritz()
                done = int(converged(residuals, values[: self.k], self.tol, self.eps).sum())
                self.progress.update(done, self.matvecs)
                if done == self.k or self.num_expanded == self.dim:
                    return True
                # An eigenproblem of size m costs as much as several blocks: check more and more
                # rarely, but more often near the end.
                step = (0.05 if done > 0.9 * self.k else 0.12) * self.num_expanded
                self.next_check = self.num_expanded + max(self.block, int(step))
            if pending == 0:
                pending = self._add_random(self.block)
            size = self._affordable(pending if pending <= 1.5 * self.block else self.block)
            if size == 0:
                return False
            if self.basis.size + size > self.capacity < self.dim:
                self._restart()
                continue
            self._select(size)
            self._expand(size)
            self.progress.update(None, self.matvecs)

    def _found_missed(self, count: int) -> bool | None:
        """Look outside the basis for an eigenvalue that belongs to the k largest.

        Fresh random vectors, orthogonal to the basis, are expanded by themselves: what the basis
        misses grows out of them, since all else of its magnitude is in the basis. With theta their
        own largest Ritz value after s steps, an eigenvector of size |lambda_k| has grown by the
        Chebyshev polynomial T_s(|lambda_k| / |theta|) relative to the rest, from its share
        sqrt(count / D) of a random start. It is over when it would dominate, and does not; None
        when the basis or the steps ran out before.
        """
        magnitudes = self._ritz()[0][: self.k].abs()
        # What is larger than |lambda_k| by less than a residual may have does not matter.
        bound = float(magnitudes[-1] + self._threshold(magnitudes)[-1])
        if bound == 0:  # only the zero operator has no scale
            return False
        if self.basis.size + count * (_MOST_STEPS // 2) > self.capacity < self.dim:
            self._restart()
        added = self._add_random(count)
        first = self.num_expanded
        for step in range(_MOST_STEPS):
            full = self.basis.size + added > self.capacity < self.dim
            if full or added == 0 or self._affordable(added) < added:
                break
            self._bring_last_forward(added)
            added = self._expand(added)
            columns = self.A[:, first:]
            theta = float(ritz_pairs(columns[first : self.num_expanded])[0][0].abs())
            if theta > bound:
                self.next_check = 0
                return True
            growth = (step + 1) * math.acosh(bound / max(theta, 1e-3 * bound))
            if growth > math.log(2 * _DOMINANT * math.sqrt(self.dim / count)):
                return False
        return False if added == 0 else None

    def _threshold(self, values: Tensor) -> Tensor:
        return convergence_threshold(values, self.tol, self.eps)

    def _affordable(self, size: int) -> int:
        return max(0, min(size, self.max_matvecs - self.matvecs))

    # -- steps ----------------------------------------------------------------------------------

    def _expand(self, size: int) -> int:
        """Multiply the first `size` pending vectors; return how many new directions came of it."""
        m, rows = self.num_expanded, self.basis.size
        S_BD = torch.cat(self.basis.slabs(m, m + size))
        W_BD = (self.H @ S_BD.mT).mT.contiguous()
        self.matvecs += size
        self.scale = max(self.scale, float(torch.linalg.vector_norm(W_BD, dim=1).max()))
        if rows == self.dim:
            C, R = project_out_(W_BD, self.basis.slabs()), torch.zeros(0, size)
        else:
            Q_rD, C, R = orthonormalize_against_(
                W_BD, self.basis.slabs(), floor=self.eps * self.scale
            )
            # Where the whole space is nearly spanned, rounding may look like further directions.
            Q_rD, R = Q_rD[: self.dim - rows], R[: self.dim - rows]
            self.basis.append(Q_rD)
        A = torch.zeros(self.basis.size, m + size, dtype=torch.float64)
        A[:rows, :m] = self.A
        A[:rows, m:] = C
        A[rows:, m:] = R
        self.A, self.num_expanded = A, m + size
        return self.basis.size - rows

    def _select(self, size: int) -> None:
        """Turn the pending vectors so that the first `size` couple most to unconverged pairs."""
        m, pending = self.num_expanded, self.basis.size - self.num_expanded
        if pending <= size or m == 0:
            return
        values, Y, residuals = self._ritz()
        unfinished = ~converged(residuals, values[: self.k], self.tol, self.eps)
        coupling = self.A[m:] @ Y[:, : len(unfinished)][:, unfinished]
        U, _, _ = torch.linalg.svd(coupling, full_matrices=True)
        self.basis.rotate_(m, self.basis.size, U)
        self.A[m:] = U.mT @ self.A[m:]

    def _bring_last_forward(self, count: int) -> None:
        """Put the last `count` pending vectors before the other ones."""
        m, pending = self.num_expanded, self.basis.size - self.num_expanded
        order = torch.arange(pending).roll(count)
        self.basis.rotate_(m, self.basis.size, torch.eye(pending, dtype=torch.float64)[:, order])
        self.A[m:] = self.A[m:][order]

    def _restart(self) -> None:
        """Keep the best Ritz vectors and the pending block; drop the rest of the basis."""
        m, pending = self.num_expanded, self.basis.size - self.num_expanded
        values, Y, _ = self._ritz()
        keep = min(m - 1, self.k + max(self.block, (self.capacity - self.k) // 3))
        room = self.capacity - self.block - pending
        if room < self.k:
            # Too many pending vectors to keep (a far warm start): start from the Ritz vectors anew.
            keep = min(keep, self.capacity - 2 * self.block)
            self.basis.rotate_(0, m, Y[:, :keep])
            self.basis.size = keep
            self.A = torch.zeros(keep, 0, dtype=torch.float64)
            self.num_expanded = 0
        else:
            keep = min(keep, room)
            self.basis.rotate_(0, m, Y[:, :keep])
            self.A = torch.cat([torch.diag(values[:keep]), self.A[m:] @ Y[:, :keep]])
            self.num_expanded = keep
        self.next_check = 0

    def _ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, coefficients, and the residuals of the first k."""
        m = self.num_expanded
        values, Y = ritz_pairs(self.A[:m])
        return values, Y, (self.A[m:] @ Y[:, : self.k]).norm(dim=0)

    def _add_pending(self, block_BD: Tensor) -> int:
        room = min(self.capacity, self.dim) - self.basis.size
        Q_rD, _, _ = orthonormalize_against_(block_BD[:room], self.basis.slabs())
        self.basis.append(Q_rD)
        self.A = torch.cat([self.A, torch.zeros(len(Q_rD), self.A.shape[1], dtype=torch.float64)])
        return len(Q_rD)

    def _add_random(self, count: int) -> int:
        block_BD = torch.randn(
            count, self.dim, generator=self.generator, device=self.generator.device
        )
        return self._add_pending(block_BD.to(self.H.device, self.H.dtype))

    # -- the result -----------------------------------------------------------------------------

    def _result(self) -> Eigenpairs:
        H, k = self.H, self.k
        values, Y, residuals = self._ritz()
        values, residuals = values[:k], residuals[:k]
        self.basis.rotate_(0, self.num_expanded, Y[:, :k])
        V_Dk = self.basis.shrink().mT

        noise = float("nan")
        sample = torch.linspace(0, k - 1, min(self.block, k)).round().long().unique()
        if self._affordable(len(sample)) == len(sample):
            measured = measured_residuals(
                H, values[sample].to(H.dtype), V_Dk[:, sample.to(H.device)]
            ).to("cpu", torch.float64)
            self.matvecs += len(sample)
            noise = float((measured**2 - residuals[sample] ** 2).clamp(min=0).mean().sqrt())
            residuals = (residuals**2 + noise**2).sqrt()
            residuals[sample] = measured
        # The values are rounded to H's dtype, which alone makes a residual of this size.
        residuals = torch.hypot(residuals, self.eps / 2 * values.abs())
        done = converged(residuals, values, self.tol, self.eps)
        self.progress.update(int(done.sum()), self.matvecs)
        if not bool(done.all()):
            self._warn(values, residuals, done, noise)
        return Eigenpairs(
            eigenvalues=values.to(H.device, H.dtype),
            eigenvectors=V_Dk,
            residuals=residuals.to(H.device, H.dtype),
            converged=done.to(H.device),
            num_matvecs=self.matvecs,
            method="block_krylov",
            layout=getattr(H, "layout", None),
            info={
                "tol": self.tol,
                "block_size": self.block,
                "max_basis": self.capacity,
                "noise": noise,
                "seconds": time.perf_counter() - self.start,
            },
        )

    def _warn(self, values: Tensor, residuals: Tensor, done: Tensor, noise: float) -> None:
        worst = int((residuals / values.abs().clamp(min=1e-300)).argmax())
        if self.matvecs >= self.max_matvecs - self.block:
            remedy = f"raise max_matvecs (now {self.max_matvecs}), max_basis or tol"
        else:
            remedy = (
                f"the products' noise is {noise:.2g}: compute them in float64 "
                "(compute_dtype=torch.float64) or raise tol"
            )
        warnings.warn(
            f"{int(done.sum())} of {self.k} eigenpairs have converged to tol={self.tol:g} after "
            f"{self.matvecs} products; pair {worst} has eigenvalue {values[worst]:.3g} and "
            f"residual {residuals[worst]:.2g}; {remedy}. See `converged` and `residuals`",
            ConvergenceWarning,
            stacklevel=4,
        )


def choose_block_size(H: LinearOperator, k: int) -> int:
    """Return the block size with the least predicted time for k pairs, by H's calibration.

    A wider block makes a product cheaper and the space grow slower in degree: about
    ``2 k + 6 b`` products are needed.
    """
    widths = [b for b in (1, 2, 4, 8, 16, 32, 64) if b <= max(4, k // 4)]
    calibrate = getattr(H, "calibrate", None)
    if calibrate is None:
        return min(16, widths[-1], H.shape[0])
    calibration = calibrate()
    best = min(widths[2:], key=lambda b: calibration.seconds_per_vector(b) * (2 * k + 6 * b))
    return min(best, H.shape[0])


def basis_capacity(H: LinearOperator, k: int, block: int, wanted: int | None) -> int:
    """Return how many vectors to store at most.

    Raises:
        ValueError: If `wanted`, or the memory, is less than k pairs need.
    """
    dim = H.shape[0]
    least = min(dim, k + 2 * block)
    if wanted is not None:
        if wanted < least:
            raise ValueError(
                f"expected max_basis >= k + 2 block_size = {least}, got {wanted}; lower k or "
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
    return min(dim, max(least, min(room, 2 * k + 10 * block + _MOST_STEPS)))
