"""The preconditioner of parameters in training: refreshed, checked, kept in a state dict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed.sharded import own_shard
from hesscurv.optim.eigenspace_tracker import EigenspaceTracker
from hesscurv.optim.flat_parameters import FlatParameters
from hesscurv.optim.low_rank_preconditioner import LowRankPreconditioner

# The state of each parameter: shapes (*p.shape, m), (m,) and (m,).
BASIS, VALUES, RESIDUALS = "curvature_basis", "curvature_eigenvalues", "curvature_residuals"
OWN_STATE = (BASIS, VALUES, RESIDUALS)


class TrackedPreconditioner:
    """A `LowRankPreconditioner` of some parameters, and what it takes to keep it up to date.

    Args:
        parameters: In the order of the tracker's names.
        tracker: Solves for the eigenspace.

    Attributes:
        flat: The parameters as one vector.
        current: The preconditioner, or None before the first solve.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], tracker: EigenspaceTracker) -> None:
        self.flat = FlatParameters(parameters)
        self.tracker = tracker
        self.current: LowRankPreconditioner | None = None

    @property
    def is_identity(self) -> bool:
        """Whether there is no eigenspace."""
        return self.current is None or self.current.is_identity

    def set_damping(self, damping: float | None) -> None:
        """Damp with another mu_0 from here on, where it is another."""
        if self.current is not None and self.current.asked_damping != damping:
            self.current.set_damping(damping)

    def allocate(self, rank: int) -> None:
        """Take the memory of the eigenspace, with zeros, which precondition nothing."""
        if self.current is None:
            zeros = torch.zeros(self._count(rank))
            self._install(self.flat.new_basis(len(zeros)), zeros, zeros, rank, None)

    def solve(self, rank: int, damping: float | None, seed: int) -> None:
        """Compute the eigenspace at the present weights, from the last one if there is one.

        Raises:
            ValueError: If the curvature is not finite; and what else the operator raises.
        """
        initial = None
        if self.current is not None and not self.current.is_identity:
            initial = self.flat.whole_basis(self.current.basis_mD)
        # One pair more than is damped, to know what is left.
        pairs = self.tracker.solve(self._count(rank), seed, initial)
        basis_mD = self.flat.basis_of(pairs.eigenvectors)
        self._install(basis_mD, pairs.eigenvalues, pairs.residuals, rank, damping)

    def drift(self, seed: int) -> float:
        """Return ||H v - U Lambda U^T v|| / ||U Lambda U^T v|| for a random v of the eigenspace."""
        P = self._known()
        signs = torch.Generator().manual_seed(seed)
        c = (2.0 * torch.randint(2, (P.rank,), generator=signs) - 1).to(P.basis_mD)
        values = torch.tensor(P.eigenvalues[: P.rank]).to(c)
        vectors_Dr = self.flat.whole_basis(P.basis_mD)[:, : P.rank]
        return self.tracker.drift(vectors_Dr @ c, vectors_Dr @ (values * c))

    def largest_curvature(self, seed: int) -> float:
        """Return the largest |eigenvalue| of the second batch's curvature, preconditioned."""
        P = self._known()
        basis_rD = self.flat.whole_basis(P.basis_mD)[:, : P.rank].mT
        less_r = torch.tensor([math.sqrt(gain) - 1 for gain in P.gains]).to(basis_rD)

        def root(vectors_DB: Tensor) -> Tensor:
            inside_rB = less_r[:, None] * (basis_rD @ vectors_DB.to(basis_rD.dtype))
            return vectors_DB + (basis_rD.mT @ inside_rB).to(vectors_DB.dtype)

        return self.tracker.largest_preconditioned(root, seed)

    # -- state ----------------------------------------------------------------------------------

    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Return each parameter's part of the eigenspace; views where memory allows."""
        if self.current is None:
            return {}
        P = self.current
        values, residuals = torch.tensor([P.eigenvalues, P.residuals], dtype=torch.float64).to(
            self.flat.device
        )
        parts = zip(self.flat.parameters, self.flat.stored_parts(P.basis_mD), strict=True)
        return {p: {BASIS: part, VALUES: values, RESIDUALS: residuals} for p, part in parts}

    def check(self, entries: Sequence[dict[str, Any] | None]) -> None:
        """Refuse what `load` cannot take.

        Raises:
            ValueError: If entries are missing or of wrong shapes.
        """
        if all(entry is None for entry in entries):
            return
        for p, entry in zip(self.flat.parameters, entries, strict=True):
            if entry is None or any(not isinstance(entry.get(key), Tensor) for key in OWN_STATE):
                raise ValueError(
                    f"expected {', '.join(OWN_STATE)} of every parameter in the state dict, got "
                    f"{'none' if entry is None else sorted(entry)} for one of shape "
                    f"{tuple(p.shape)}; load a state dict of the same model and params="
                )
            m = len(entry[VALUES])
            if tuple(entry[BASIS].shape) != (*p.shape, m) or len(entry[RESIDUALS]) != m:
                raise ValueError(
                    f"expected {BASIS} of shape {(*p.shape, m)}, got {tuple(entry[BASIS].shape)}; "
                    "load a state dict of the same model"
                )

    def load(
        self, entries: Sequence[dict[str, Any] | None], rank: int, damping: float | None
    ) -> None:
        """Take the eigenspace of `state`, checked before: one entry a parameter, or None."""
        self.current = None
        if any(entry is None for entry in entries):
            return
        given: list[Any] = list(entries)
        basis_mD = self.flat.new_basis(len(given[0][VALUES]))
        for part, entry in zip(self.flat.parts(basis_mD), given, strict=True):
            part.copy_(own_shard(entry[BASIS]))
        rank = min(rank, len(basis_mD))
        self._install(basis_mD, given[0][VALUES], given[0][RESIDUALS], rank, damping)

    # -- details --------------------------------------------------------------------------------

    def _install(
        self, basis_mD: Tensor, values: Tensor, residuals: Tensor, rank: int, damping: float | None
    ) -> None:
        rank, sum_ = min(rank, len(values)), self.flat.sum_ if self.flat.is_sharded else None
        self.current = LowRankPreconditioner(basis_mD, values, residuals, rank, damping, sum_)

    def _count(self, rank: int) -> int:
        return min(rank + 1, sum(p.numel() for p in self.flat.parameters))

    def _known(self) -> LowRankPreconditioner:
        if self.current is None:
            raise RuntimeError("expected an eigenspace, got none yet; call solve first")
        return self.current
