"""Krylov space of a block Lanczos process: its basis, and the steps that change it.

See `ProjectedProblem` for expanded and pending vectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.basis import Basis
from hesscurv.eigensolvers.krylov.projected_problem import ProjectedProblem
from hesscurv.linalg.block_norms import BlockSize, block_size
from hesscurv.linalg.floating_range import SAFE_RANGE, require_range
from hesscurv.linalg.orthogonalization import orthonormalize_against_
from hesscurv.linalg.projections import project_out_
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.storage.placement import Placement


class KrylovSpace(ProjectedProblem):
    """The space and the steps that change it.

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
        stored = placement.dtype
        # Residual due to rounding a stored vector, relative to its eigenvalue: the rms error of an
        # entry is a quarter of eps.
        rounding = 0.0 if stored == H.dtype else torch.finfo(stored).eps / 4
        super().__init__(H, k, tol, which, rounding)
        self.block, self.capacity = block, placement.capacity
        self.num_matvecs = 0
        self.num_restarts = 0
        # Norm of the couplings dropped by restarts, relative to the thresholds: residual estimates
        # do not include them.
        self.lost = 0.0
        # Starting vectors, expanded before all others, whether or not they couple to Ritz pairs.
        self.num_initial = 0
        with H.communicator.together("allocating the basis"):
            self.basis = Basis(placement, k, max(block, k // 2), H.dtype)
        self._generator = generator

    def start(self, initial: Tensor | None) -> None:
        """Make the initial vectors (D, k0) pending, and random ones if these are few."""
        if initial is not None:
            start_mD = initial.mT
            if self.capacity < min(self.dim, 2 * len(start_mD) + 3 * self.block):
                # No room for all of them and their products: start from a random block in their
                # span.
                mix = self._random(self.block, len(start_mD)).to(start_mD)
                start_mD = mix @ start_mD
            for part_BD in start_mD.split(max(self.block, 32)):  # they may not all fit on a device
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
    def is_full(self) -> bool:
        """Whether expanded and pending vectors together span the whole space."""
        return self.basis.size == self.dim

    def fits(self, count: int) -> bool:
        """Whether `count` more vectors, or the whole space, can be stored."""
        return self.basis.size + count <= self.capacity or self.capacity >= self.dim

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
        Y_BD = self._own_entries(self._random(count, self.dim).to(self.H.device))
        project_out_(Y_BD, self.basis.slabs(0, self.num_expanded), across=self.across)
        return Y_BD

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

    # -- pieces ---------------------------------------------------------------------------------

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
