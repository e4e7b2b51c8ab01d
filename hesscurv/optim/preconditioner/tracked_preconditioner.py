"""The preconditioner of parameters in training: refreshed, checked, kept in a state dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed.sharded import is_sharded, own_shard
from hesscurv.optim.flat_parameters import FlatParameters
from hesscurv.optim.preconditioner.eigenspace_tracker import EigenspaceTracker
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner

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

    def has_other_rank(self, rank: int) -> bool:
        """Whether there is an eigenspace, with other than so many pairs."""
        return self.current is not None and len(self.current.basis_mD) != self._count(rank)

    def allocate(self, rank: int) -> None:
        """Take the memory of the eigenspace, with zeros, which precondition nothing."""
        if self.current is None:
            zeros = torch.zeros(self._count(rank), dtype=torch.float32, device="cpu")
            self._install(self.flat.new_basis(len(zeros)), zeros, zeros, rank, None)

    def forget(self, rank: int) -> None:
        """Put zeros in the eigenspace's place, which precondition nothing."""
        self.current = None
        self.allocate(rank)

    def solve(self, rank: int, damping: float | None, generator: torch.Generator) -> None:
        """Compute the eigenspace at the present weights, from the last one if there is one.

        Raises:
            ValueError: If the curvature is not finite; and what else the operator raises.
        """
        initial = None
        if self.current is not None and not self.current.is_identity:
            initial = self.flat.whole_basis(self.current.basis_mD)
        # One pair more than is damped, to know what is left.
        pairs = self.tracker.solve(self._count(rank), generator, initial)
        basis_mD = self.flat.basis_of(pairs.eigenvectors)
        self._install(basis_mD, pairs.eigenvalues, pairs.residuals, rank, damping)

    def drift(self, generator: torch.Generator) -> float:
        """Return ||H v - U Lambda U^T v|| / ||U Lambda U^T v|| for a random v of the eigenspace."""
        P = self._known()
        signs = 2.0 * torch.randint(2, (P.rank,), generator=generator, device="cpu") - 1
        c = signs.to(P.basis_mD)
        values = _numbers(P.eigenvalues[: P.rank]).to(c)
        vectors_Dr = self.flat.whole_basis(P.basis_mD)[:, : P.rank]
        return self.tracker.drift(vectors_Dr @ c, vectors_Dr @ (values * c))

    def largest_curvature(self, generator: torch.Generator) -> float:
        """Return the largest |eigenvalue| of the second batch's curvature, preconditioned."""
        P = self._known()
        whole = P.over(self.flat.whole_basis(P.basis_mD).mT)
        return self.tracker.largest_preconditioned(whole.root, generator)

    # -- state ----------------------------------------------------------------------------------

    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Return each parameter's part of the eigenspace; views where memory allows."""
        if self.current is None:
            return {}
        P = self.current
        values, residuals = torch.tensor(
            [P.eigenvalues, P.residuals], dtype=torch.float64, device="cpu"
        ).to(self.flat.device)
        parts = zip(self.flat.parameters, self.flat.stored_parts(P.basis_mD), strict=True)
        return {p: {BASIS: part, VALUES: values, RESIDUALS: residuals} for p, part in parts}

    def read(
        self, entries: Sequence[dict[str, Any] | None]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return basis, eigenvalues and residuals of entries of `state`, one a parameter.

        None where a parameter has no entry: the eigenspace is then another's, or not known.

        Raises:
            ValueError: If one is of another shape than its parameter, or not finite.
        """
        if any(entry is None for entry in entries):
            return None
        given: list[Any] = list(entries)
        for p, entry in zip(self.flat.parameters, given, strict=True):
            self._check(p, entry, given[0])
        basis_mD = self.flat.new_basis(len(given[0][VALUES]))
        for part, entry in zip(self.flat.parts(basis_mD), given, strict=True):
            part.copy_(own_shard(entry[BASIS]))
        values, residuals = given[0][VALUES].double(), given[0][RESIDUALS].double()
        if not bool(torch.cat([values, residuals]).isfinite().all()):
            raise ValueError(f"expected finite {VALUES} and {RESIDUALS}, got NaN or inf")
        return basis_mD, values, residuals

    def take(
        self, read: tuple[Tensor, Tensor, Tensor] | None, rank: int, damping: float | None
    ) -> None:
        """Take what `read` returned as the eigenspace."""
        self.current = None
        if read is not None:
            self._install(*read, rank, damping)

    # -- details --------------------------------------------------------------------------------

    def _check(self, p: nn.Parameter, entry: dict[str, Any], first: dict[str, Any]) -> None:
        if any(not isinstance(entry.get(key), Tensor) for key in OWN_STATE):
            raise ValueError(f"expected tensors {OWN_STATE} in a state, got {sorted(entry)}")
        (m, *_), basis = first[VALUES].shape or (0,), entry[BASIS]
        expected = {BASIS: (*p.shape, m), VALUES: (m,), RESIDUALS: (m,)}
        for key, shape in expected.items():
            if tuple(entry[key].shape) != shape or m == 0:
                raise ValueError(
                    f"expected {key} of shape {shape} for a parameter of shape {tuple(p.shape)}, "
                    f"got {tuple(entry[key].shape)}; load a state dict of the same model"
                )
        like: Any = p
        if is_sharded(basis) != is_sharded(p) or (
            is_sharded(p) and basis.placements != like.placements
        ):
            raise ValueError(
                f"expected {BASIS} sharded as the parameters are, got one that is not; load it "
                "with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )

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


def _numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
