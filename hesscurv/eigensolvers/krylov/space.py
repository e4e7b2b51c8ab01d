r"""Krylov space with its exact projection: the state of a block Lanczos process.

[E, P] is orthonormal. E are the m *expanded* vectors, whose products with H are known; P are the p
*pending* ones, stored after them. With A = [E, P]^T H E, of shape (m + p, m),

.. math:: H E = E T + P R, \qquad T = A_{1..m}, \quad R = A_{m+1..m+p},

so a Ritz pair (theta, E y) of T has the residual norm ||R y||, without another matvec. Any
orthonormal vectors may join P at any time: their rows in R are zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.basis import Basis
from hesscurv.eigensolvers.krylov.eigenvalue_bounds import schur_complement
from hesscurv.eigensolvers.residuals import convergence_threshold
from hesscurv.linalg.block_norms import BlockSize, block_size
from hesscurv.linalg.floating_range import SAFE_RANGE, require_range
from hesscurv.linalg.orthogonalization import orthonormalize_against_
from hesscurv.linalg.projections import project_out_
from hesscurv.linalg.ritz import sides_of, wanted_first
from hesscurv.linalg.small_eigenproblems import eigh
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.storage.placement import Placement


class KrylovSpace:
    """The space, the steps that change it, and its Ritz pairs.

    Args:
        H: The operator, D x D.
        k: Number of wanted pairs.
        tol: Their relative tolerance.
        block: Usual number of vectors per step.
        placement: Location and maximal number of the vectors, at least min(D, k + 3 block).
        generator: Source of random vectors.
        which: The wanted pairs, "LM", "LA" or "SA".

    For a distributed H each process holds some rows of all vectors. Small matrices, and with them
    all decisions, agree between processes: sums are reduced, and eigenvectors broadcast from the
    first process.
    """

    def __init__(
        self,
        H: LinearOperator,
        k: int,
        tol: float,
        block: int,
        placement: Placement,
        generator: torch.Generator,
        which: str = "LM",
    ) -> None:
        self.which, self.sides = which, sides_of(which)
        self.H, self.k, self.tol, self.block = H, k, tol, block
        self.dim, self.capacity = H.shape[0], placement.capacity
        self.eps = torch.finfo(H.dtype).eps
        self.across = H.communicator if H.communicator.size > 1 else None
        # Residual due to rounding a stored vector, relative to its eigenvalue: the rms error of an
        # entry is a quarter of eps.
        stored = placement.dtype
        self.rounding = 0.0 if stored == H.dtype else torch.finfo(stored).eps / 4
        self.num_matvecs = 0
        self.num_restarts = 0
        # Norm of the couplings dropped by restarts, relative to the thresholds: residual estimates
        # do not include them.
        self.lost = 0.0
        self.num_expanded = 0
        # Starting vectors, expanded before all others, whether or not they couple to Ritz pairs.
        self.num_initial = 0
        with H.communicator.together("allocating the basis"):
            self.basis = Basis(placement, k, max(block, k // 2), H.dtype)
        self.A = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self._ritz: dict[torch.dtype, tuple[Tensor, ...]] = {}  # cached Ritz pairs of the last T
        self._asymmetries: list[float] = []
        self._asymmetry = 0.0
        self._scale = 0.0  # the largest ||H q|| so far: rounding is relative to it
        self._generator = generator

    def start(self, initial: Tensor | None) -> None:
        """Make the initial vectors (D, k0) pending, and random ones if these are few."""
        if initial is not None:
            start_KD = initial.mT
            if self.capacity < min(self.dim, 2 * len(start_KD) + 3 * self.block):
                # No room for all of them and their products: start from a random block in their
                # span.
                mix = self._random(self.block, len(start_KD)).to(start_KD)
                start_KD = mix @ start_KD
            for part_BD in start_KD.split(max(self.block, 32)):  # they may not all fit on a device
                part_BD = part_BD.to(self.H.device, self.H.dtype, copy=True)
                self.num_initial += self.add_pending(part_BD)
        if self.num_initial < self.k:
            self.add_random(self.block)

    def state(self) -> dict[str, Any]:
        """Return the state of the space, without the basis."""
        return {
            "A": self.A,
            "size": self.basis.size,
            "num_matvecs": self.num_matvecs,
            "num_restarts": self.num_restarts,
            "lost": self.lost,
            "num_expanded": self.num_expanded,
            "num_initial": self.num_initial,
            "asymmetries": list(self._asymmetries),
            "asymmetry": self._asymmetry,
            "scale": self._scale,
            "generator": self._generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state; the basis has been restored already.

        Raises:
            ValueError: If the basis has a different number of vectors.
        """
        if state["size"] != self.basis.size:
            raise ValueError(
                f"expected a basis of {state['size']} vectors, got {self.basis.size}: the "
                "checkpoint's journal does not belong to its state; start over"
            )
        for name in ("A", "num_matvecs", "num_restarts", "num_expanded", "num_initial"):
            setattr(self, name, state[name])
        self._asymmetries, self._scale = list(state["asymmetries"]), state["scale"]
        self._asymmetry, self.lost = state.get("asymmetry", 0.0), state.get("lost", 0.0)
        self._generator.set_state(state["generator"])

    @property
    def num_pending(self) -> int:
        """The number p of pending vectors."""
        return self.basis.size - self.num_expanded

    @property
    def is_full(self) -> bool:
        """Whether expanded and pending vectors together span the whole space."""
        return self.basis.size == self.dim

    def fits(self, count: int) -> bool:
        """Whether `count` more vectors, or the whole space, can be stored."""
        return self.basis.size + count <= self.capacity or self.capacity >= self.dim

    # -- Ritz pairs -----------------------------------------------------------------------------

    def ritz(
        self,
        dtype: torch.dtype = torch.float64,
        count: int | None = None,
        expanded: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all Ritz values (m,), the leading coefficients, and the residuals of the first k.

        T is read from the upper triangle: when a column was computed, all earlier vectors were in
        the basis, while parts of earlier columns may have been dropped since.

        Args:
            dtype: Dtype of the eigenproblem: float32 takes half the time, with an error of some eps
                |theta_1| in values and residuals.
            count: Number of coefficient vectors, (m, count); default k.
            expanded: m, the number of expanded vectors used; default all.
        """
        m = self.num_expanded if expanded is None else expanded
        if dtype not in self._ritz or len(self._ritz[dtype][0]) != m:
            values, vectors = self._from_first(eigh(self.A[:m, :m].to(dtype), self.H.device))
            order = wanted_first(values, self.which)
            leading = vectors[:, order[: self.k]].double()
            self._ritz[dtype] = values[order].double(), leading, vectors, order
        values, leading, vectors, order = self._ritz[dtype]
        residuals = (self.A[m:, :m] @ leading).norm(dim=0)
        if count is None or count == self.k:
            return values, leading, residuals
        return values, vectors[:, order[:count]].double(), residuals

    def thresholds(self, values: Tensor) -> Tensor:
        """Return the convergence thresholds of pairs with these values."""
        # The largest known magnitude, which need not belong to a wanted pair.
        known = self._ritz.get(torch.float64) or self._ritz.get(torch.float32)
        largest = float(known[0].abs().max()) if known and len(known[0]) else 0.0
        return convergence_threshold(values, self.tol, self.eps, largest)

    def converged(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return which of the first k Ritz pairs have converged, bool.

        The true residual combines the estimate and the products' noise, at right angles. Noise near
        or beyond the tolerance tightens the requirement by a factor of about two at most.
        """
        values, _, residuals = self.ritz(dtype)
        thresholds = self.thresholds(values[: self.k])
        noise = torch.hypot(
            torch.tensor(self.noise, dtype=torch.float64, device="cpu"),
            self.rounding * values[: self.k].abs(),
        )
        noise = torch.minimum(noise, 0.9 * thresholds)
        return residuals <= (thresholds**2 - noise**2).sqrt()

    def bound(self, index: int, first: int | None = None) -> float:
        """Return the bound that a missed eigenvalue before wanted pair `index` would exceed.

        On the side of the wanted ones: a magnitude, or for "SA" the negative of a value. Excesses
        over the Ritz value below the convergence threshold do not matter.
        """
        values = self.ritz(expanded=first)[0][: self.k]
        value = values[index].abs() if len(self.sides) == 2 else self.sides[0] * values[index]
        return float(value + self.thresholds(values)[index])

    def schur_complement(self, side: int, index: int, first: int | None = None) -> Tensor:
        """Return S(x) for x = `bound(index)`, (q, q), in the vectors after the first expanded ones.

        See `krylov.eigenvalue_bounds`.

        Args:
            side: +1 or -1.
            index: Index of the last wanted pair.
            first: Number of expanded vectors used; default all.
        """
        first = self.num_expanded if first is None else first
        values, Y, _ = self.ritz(count=first, expanded=first)
        x = self.bound(index, first)
        near = float(self.thresholds(values[: self.k])[index])
        return schur_complement(values, self.A[first:, :first] @ Y, index + 1, x, side, near)

    def limit(self, index: int) -> float:
        """Return how large H outside may be without a missed eigenvalue beyond `bound(index)`.

        Negative if the singular values of [T; R] prove that a pair was missed, which needs no
        matvec.
        """
        largest = (
            float(torch.linalg.eigvalsh(self.schur_complement(side, index))[-1])
            for side in (self.sides if self.num_pending else ())
        )
        return self.bound(index) - max([0.0, *largest])

    def limiting(self, eta: float) -> Tensor:
        """Return the pending directions, (p, r), that keep `limit` of the last pair below eta."""
        x, last = self.bound(self.k - 1), self.k - 1
        S = sum(self.schur_complement(side, last) for side in self.sides)
        values, U = torch.linalg.eigh(S)
        return U[:, values > x - eta].flip(1)

    # -- steps ----------------------------------------------------------------------------------

    def multiply(self, block_bD: Tensor) -> tuple[Tensor, BlockSize]:
        """Return H times vectors (b, D), this process's entries, and count the matvecs.

        The caller passes the size of the products to `require_usable` once it has been read.
        """
        W_bD = self.product(block_bD)
        self.num_matvecs += len(block_bD)
        return W_bD, block_size(W_bD, self.across)

    def product(self, block_bD: Tensor) -> Tensor:
        """Return H times vectors (b, D), this process's entries, uncounted."""
        return self.H.product_rows(block_bD.mT).mT.contiguous()

    def require_usable(self, size: BlockSize, scale: float) -> None:
        """Refuse products with NaN or inf entries, or with squares out of range.

        Args:
            size: Size of the last products.
            scale: Largest norm of an earlier product: if it is within range, the last ones may have
                any.

        Raises:
            ValueError: If they have NaN or inf entries.
            RangeError: If their squares leave the range of the dtype.
        """
        if not math.isfinite(size.largest):
            last = self.num_matvecs
            raise ValueError(
                f"products {last - len(size.norms)} to {last} with the operator have NaN or inf "
                "entries; check the operator's products (overflow, sqrt or norm at zero in a "
                "loss), or compute in float64"
            )
        if not SAFE_RANGE[0] < max(scale, *size.norms) < SAFE_RANGE[1]:
            require_range(size.largest)

    def expand(self, size: int) -> int:
        """Multiply the first `size` pending vectors; return the number of new directions.

        Raises:
            ValueError: If fewer are pending, or size is below 1.
        """
        m, rows = self.num_expanded, self.basis.size
        if not 1 <= size <= rows - m:
            raise ValueError(f"expected 1 <= size <= {rows - m} pending vectors, got {size}")
        W_BD, found = self.multiply(self.basis.block(m, m + size))
        if found.is_read or self.is_full:
            self.require_usable(found, self._scale)
        if self.is_full:  # H S lies in the span: there is nothing to orthonormalise
            C, R = (
                project_out_(W_BD, self.basis.slabs(), across=self.across).cpu(),
                torch.zeros(0, size, dtype=torch.float64, device="cpu"),
            )
        else:
            # Of the norms before; these vectors' own count in the orthonormalisation.
            floor = self.eps * self._scale
            # By symmetry E^T H S = (S^T H E)^T, which is part of A: no projection is computed.
            known = self.A[m : m + size].mT
            try:
                Q_rD, C, R = orthonormalize_against_(
                    W_BD,
                    self.basis.slabs(),
                    floor=floor,
                    known_nb=known,
                    size=found,
                    across=self.across,
                )
            except ValueError:
                self.require_usable(found, self._scale)
                raise
            self.require_usable(found, self._scale)
            # Once the space is nearly complete, rounding may pass for further directions.
            Q_rD, R = Q_rD[: self.dim - rows], R[: self.dim - rows]
            self._append(Q_rD)
        self._scale = max(self._scale, *found.norms)
        self._note_asymmetry(C[:m], self.A[m : m + size])
        # Rows of the new vectors are zero in old columns: H E was in the span of the old basis.
        A = torch.zeros(self.basis.size, m + size, dtype=torch.float64, device="cpu")
        A[:rows, :m] = self.A
        A[:rows, m:] = C
        A[rows:, m:] = R
        self.A, self.num_expanded = A, m + size
        return self.basis.size - rows

    def add_pending(self, block_BD: Tensor) -> int:
        """Orthonormalise vectors (b, D), whole on every process, and make them pending.

        Returns the number of independent ones.
        """
        room = min(self.capacity, self.dim) - self.basis.size
        mine_BD = self._own_entries(block_BD[:room])
        Q_rD, _, _ = orthonormalize_against_(mine_BD, self.basis.slabs(), across=self.across)
        self._append(Q_rD)
        self.A = torch.cat(
            [self.A, torch.zeros(len(Q_rD), self.A.shape[1], dtype=torch.float64, device="cpu")]
        )
        return len(Q_rD)

    def add_random(self, count: int) -> int:
        """Add random pending vectors, as far as there is room; return their number."""
        return self.add_pending(self._random(count, self.dim).to(self.H.device))

    def outside(self, count: int) -> Tensor:
        """Return random vectors (count, D) orthogonal to the expanded ones, own entries."""
        Y_bD = self._own_entries(self._random(count, self.dim).to(self.H.device))
        project_out_(Y_bD, self.basis.slabs(0, self.num_expanded), across=self.across)
        return Y_bD

    def select(self, size: int, directions: Tensor | None = None) -> None:
        """Rotate the pending vectors so that the first `size` couple most to unconverged pairs.

        Args:
            size: Number of leading vectors.
            directions: Directions in the pending vectors, (p, r), to put first instead.
        """
        if self.num_pending <= size:
            return
        coupling = directions
        if coupling is None:
            _, Y, _ = self.ritz(self.H.dtype)
            coupling = self.A[self.num_expanded :] @ Y[:, ~self.converged(self.H.dtype)]
        U, _ = self._from_first(torch.linalg.svd(coupling, full_matrices=True)[:2])
        self._turn_pending(U)

    def begin_search(self, count: int) -> int:
        """Put random vectors of the complement of E first among the pending ones.

        Vectors outside the basis are added and mixed with the pending ones, so that the result is
        distributed as Gaussian vectors of the complement: an eigenvector may lie in either part.

        Returns:
            Their number.
        """
        pending = self.num_pending
        added = self.add_random(count)
        # The norm of a Gaussian vector of the part outside [E, P], of this dimension, is about its
        # square root.
        outside = self.dim - self.num_expanded - pending
        gaussian = torch.cat(
            [
                self._random(pending, added).to("cpu", torch.float64),
                math.sqrt(outside) * torch.eye(added, dtype=torch.float64, device="cpu"),
            ]
        )
        (U,) = self._from_first([torch.linalg.qr(gaussian, mode="complete").Q])
        self._turn_pending(U)
        return added

    def follow_search(self, coupling: Tensor) -> int:
        """Put the directions of a coupling, (p, c), first among the pending vectors.

        Returns:
            Their number, beyond rounding.
        """
        U, sigma = self._from_first(torch.linalg.svd(coupling, full_matrices=True)[:2])
        self._turn_pending(U)
        return int((sigma > self.eps * self._scale).sum())

    def step_back(self, num_expanded: int) -> None:
        """Drop the vectors expanded last and their products, after a search that found nothing.

        The earlier Ritz pairs and their residuals remain: what they couple to is pending.
        """
        self.A, self.num_expanded = self.A[:, :num_expanded], num_expanded
        coupled = self.follow_search(self.A[num_expanded:])
        self.basis.truncate(num_expanded + coupled)
        self.A = self.A[: num_expanded + coupled]

    def restart(self, spare: int = 0) -> None:
        """Keep the best Ritz vectors and the pending ones; drop the rest (thick restart).

        Args:
            spare: Number of vectors that must fit afterwards, for a search. As many Ritz vectors as
                leave that room are kept, and all pending ones, which the search does not use.
        """
        self.num_restarts += 1
        dropped = self._drop_pending() if spare == 0 else False
        m = self.num_expanded
        values, Y, _ = self.ritz(count=m)
        self._ritz.clear()
        room = self.capacity - self.block - self.num_pending
        if room >= self.k:
            # Dropped couplings are negligible for the wanted pairs only: keep no others then.
            extra = 0 if dropped else max(self.block, (self.capacity - self.k) // 3)
            if spare > 0:
                extra = self.capacity - self.num_pending - spare - self.k
            keep = min(m - 1, room, self.k + max(0, extra))
            # In the basis of Ritz vectors T is diagonal; the couplings R rotate with them.
            self.A = torch.cat([torch.diag(values[:keep]), self.A[m:] @ Y[:, :keep]])
            self.num_expanded = keep
            self._rotate(0, m, Y[:, :keep])
        else:
            # Too many pending vectors matter, as after a poor warm start: restart from the Ritz
            # vectors alone.
            keep = self.num_initial = min(m, self.k)
            self.A = torch.zeros(keep, 0, dtype=torch.float64, device="cpu")
            self.num_expanded = 0
            self._rotate(0, m, Y[:, :keep])
            self.basis.truncate(keep)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Form the k Ritz vectors in place and free the rest; the space is unusable afterwards.

        Returns:
            Ritz values (k,) and residuals (k,), float64 on the CPU, and the vectors (D, k).
        """
        values, Y, residuals = self.ritz()
        self.basis.journal = None  # no state will refer to this
        self._rotate(0, self.num_expanded, Y)
        return values[: self.k], residuals, self.basis.shrink().mT

    @property
    def scale(self) -> float:
        """The largest norm of a product with a unit vector so far, a lower bound on ||H||."""
        return max(self._scale, 1e-300)

    @property
    def asymmetry(self) -> float:
        """The largest difference of v^T (H E) and (H v)^T E so far, relative to ||H||."""
        return self._asymmetry / self.scale

    @property
    def noise(self) -> float:
        """The norm of a product's error, estimated from the asymmetry of the projection.

        Both E^T (H S) and (S^T H E)^T are computed. With errors of norm s in random directions,
        their entries differ by sqrt(2 / D) s.
        """
        return statistics.median_low(self._asymmetries) if self._asymmetries else 0.0

    def _own_entries(self, block_BD: Tensor) -> Tensor:
        if self.across is None:
            return block_BD
        return block_BD[:, slice(*self.across.rows(self.dim))].clone()

    def _append(self, Q_rD: Tensor) -> None:
        # A full disk may affect one process only.
        with self.H.communicator.together("storing vectors"):
            self.basis.append(Q_rD)

    def _random(self, *shape: int) -> Tensor:
        generator = self._generator
        return torch.randn(shape, generator=generator, device=generator.device, dtype=self.H.dtype)

    def _rotate(self, start: int, stop: int, Y: Tensor) -> None:
        with self.H.communicator.together("rotating the basis"):
            self.basis.rotate_(start, stop, Y)

    def _from_first(self, factors: Iterable[Tensor]) -> list[Tensor]:
        """Broadcast factors from the first process: processors may return different ones."""
        if self.across is None:
            return list(factors)
        return [self.across.broadcast_(factor.contiguous()) for factor in factors]

    # -- pieces ---------------------------------------------------------------------------------

    def _note_asymmetry(self, upper_ms: Tensor, lower_sm: Tensor) -> None:
        if upper_ms.numel() > 0:
            gap_ms = upper_ms - lower_sm.mT
            rms = float(gap_ms.square().mean().sqrt())
            self._asymmetries.append(rms * math.sqrt(self.dim / 2))
            self._asymmetry = max(self._asymmetry, rms * math.sqrt(len(gap_ms)))

    def _turn_pending(self, U: Tensor) -> None:
        m = self.num_expanded
        if len(U) == 0:
            return
        self._rotate(m, self.basis.size, U)
        self.A = torch.cat([self.A[:m], U.mT @ self.A[m:]])

    def _drop_pending(self) -> bool:
        """Drop pending vectors beyond a block that are negligible for all wanted residuals."""
        m = self.num_expanded
        if self.num_pending <= self.block:
            return False
        values, Y, _ = self.ritz()
        thresholds = self.thresholds(values[: self.k])
        coupling = self.A[m:] @ (Y / thresholds.clamp(min=1e-300))
        U, sigma = self._from_first(torch.linalg.svd(coupling, full_matrices=True)[:2])
        # Norm of the dropped tail, relative to the thresholds; restarts add up.
        rest = sigma.flip(0).square().cumsum(0).sqrt().flip(0)
        keep = max(self.block, int((rest > 0.02).sum()))
        if self.capacity < 2 * self.k + 3 * self.block:  # too little room to keep more
            keep = self.block
        self.lost += float(rest[keep]) if keep < len(rest) else 0.0
        self._turn_pending(U)
        self.basis.truncate(m + keep)
        self.A = self.A[: m + keep]
        return True
