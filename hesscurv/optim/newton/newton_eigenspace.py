"""Top eigenspace that preconditions Newton steps: warm start, storage by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.eigensolvers.tracked_eigenspace import RefreshLimit, refresh_eigenspace
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner

BASIS, EIGENVALUES = "basis", "eigenvalues"

# More matvecs gave no better steps. Rough vectors serve as well: the preconditioner is positive
# definite with any.
_LIMIT = RefreshLimit(cold=2.0, warm=1.3)
_LEAST_NORM = 0.1  # of what is left of a unit vector on fewer parameters


@dataclass(frozen=True)
class NewtonEigenspace:
    """Top eigenpairs of the Hessian of some parameters.

    Args:
        pieces: U, one tensor (*shape, r) for each parameter, in its dtype: as it is saved, so that
            a resumed run computes with the same numbers.
        eigenvalues: Shape (r,), largest magnitude first.
        left: |lambda_{r+1}|, or None where it is not known.
    """

    pieces: list[Tensor]
    eigenvalues: Tensor
    left: float | None

    def preconditioner(self, damping: float, dtype: torch.dtype) -> LowRankPreconditioner:
        """Return the preconditioner of these pairs; a copy of the basis, r D numbers."""
        rank = len(self.eigenvalues)
        # Always a new tensor of one layout: sums may depend on how their terms lie in memory.
        basis_Dr = torch.cat([piece.reshape(-1, rank).to(dtype) for piece in self.pieces])
        values_r = self.eigenvalues.to(dtype)
        return LowRankPreconditioner.inverse(basis_Dr, values_r, damping, self.left)


def read_eigenspace(
    state: dict[Any, Any], params: Sequence[nn.Parameter], rank: int, left: float | None
) -> NewtonEigenspace | None:
    """Return the eigenspace that an optimizer's state holds, if it is of these parameters."""
    holders = [p for p, own in state.items() if BASIS in own]
    if set(holders) != set(params) or any(state[p][BASIS].shape[-1] != rank for p in params):
        return None
    pieces = [state[p][BASIS] for p in params]
    return NewtonEigenspace(pieces, state[params[0]][EIGENVALUES], left)


def write_eigenspace(
    state: dict[Any, Any], params: Sequence[nn.Parameter], space: NewtonEigenspace
) -> None:
    """Put an eigenspace in the place of what an optimizer's state holds."""
    for own in state.values():
        own.pop(BASIS, None)
        own.pop(EIGENVALUES, None)
    for p, piece in zip(params, space.pieces, strict=True):
        state[p] |= {BASIS: piece, EIGENVALUES: space.eigenvalues.to(p.dtype)}


def compute_eigenspace(
    H: LinearOperator,
    params: Sequence[nn.Parameter],
    rank: int,
    state: dict[Any, Any],
    *,
    tol: float,
    max_matvecs: int | None,
    generator: torch.Generator,
) -> NewtonEigenspace:
    """Compute top eigenpairs roughly, from the vectors that an optimizer's state holds.

    One pair more is solved for, to know what is left; its vector is not kept.

    Args:
        H: The Hessian, D x D.
        params: The parameters that its rows stand for.
        rank: r, at most D.
        state: The optimizer's state.
        tol: Relative residual at which all pairs are good enough.
        max_matvecs: The most products; None for 2 r, or 1.3 r where there are vectors to start
            from.
        generator: Of the random starting vectors.

    Raises:
        ValueError: If a product has NaN or inf entries.
    """
    initial = _join(state, params, H.dtype)
    if max_matvecs is None:
        max_matvecs = _LIMIT.matvecs(rank, initial is not None)
    count = min(rank + 1, H.shape[0])
    pairs = refresh_eigenspace(
        H, count, max_matvecs=max_matvecs, tol=tol, generator=generator, initial=initial
    )
    pieces = [
        part.reshape(*p.shape, rank).to(p.dtype, copy=True, memory_format=torch.contiguous_format)
        for part, p in zip(
            pairs.eigenvectors[:, :rank].split([p.numel() for p in params]), params, strict=True
        )
    ]
    # Through the narrowest dtype that they are saved in.
    narrow = min((p.dtype for p in params), key=lambda dtype: torch.finfo(dtype).bits)
    largest = torch.finfo(narrow).max
    values = pairs.eigenvalues.clamp(-largest, largest).to(narrow)
    left = float(values[rank].abs()) if count > rank else None
    return NewtonEigenspace(pieces, values[:rank], left)


def _join(
    state: dict[Any, Any], params: Sequence[nn.Parameter], dtype: torch.dtype
) -> Tensor | None:
    """Return the vectors (D, m) that a state holds of these parameters, zero where it has none."""
    found = {p: own[BASIS] for p, own in state.items() if BASIS in own}
    ranks = {basis.shape[-1] for basis in found.values()}
    if len(ranks) != 1:
        return None
    rank = ranks.pop()
    pieces = [found.get(p, p.new_zeros(*p.shape, rank)) for p in params]
    joined_Dr = torch.cat([piece.reshape(-1, rank).to(dtype) for piece in pieces])
    # What is gone with a parameter, or was laid out as zeros for a checkpoint.
    kept = torch.linalg.vector_norm(joined_Dr, dim=0) > _LEAST_NORM
    joined_Dr = joined_Dr[:, kept][:, : len(joined_Dr)]
    return joined_Dr if joined_Dr.shape[1] else None
