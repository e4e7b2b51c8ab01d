"""Eigenspace kept up to date while the operator changes: warm start, limited matvecs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.eigsh import eigsh
from hesscurv.eigensolvers.residuals import ConvergenceWarning
from hesscurv.operators.linear_operator import LinearOperator


@dataclass(frozen=True)
class RefreshLimit:
    """Limit on the matvecs of one refresh, relative to the number of pairs.

    Training waits for a refresh, and the next one goes on from where it stopped, so it ends there
    whether pairs have converged or not.

    Args:
        cold: Matvecs for each pair from random vectors.
        warm: Matvecs for each pair from the last eigenvectors; each is multiplied once.
        least: Matvecs that every refresh may take.
    """

    cold: float
    warm: float
    least: int = 1

    def matvecs(self, count: int, is_warm: bool) -> int:
        """Return the limit for `count` pairs."""
        return max(self.least, math.ceil((self.warm if is_warm else self.cold) * count))


def refresh_eigenspace(
    H: LinearOperator,
    count: int,
    *,
    max_matvecs: int,
    tol: float,
    generator: torch.Generator,
    initial: Tensor | None = None,
    which: str = "LM",
    block_size: int | None = None,
    verify_cold: bool = False,
) -> Eigenpairs:
    """Compute top eigenpairs of an operator that has changed little since they were known.

    Args:
        H: The operator at the present weights, D x D.
        count: Number of pairs, at most D.
        max_matvecs: Limit on the matvecs, see `RefreshLimit`; raised to `count`.
        tol: Relative tolerance of the residuals.
        generator: Source of the random starting block.
        initial: The last eigenvectors (D, m), columns, or None for a cold start.
        which: As in `eigsh`.
        block_size: As in `block_krylov`; None chooses.
        verify_cold: Whether a cold start is searched for missed pairs. A warm one is not: what the
            last search found is in the starting space.

    Returns:
        The eigenpairs, whole on every rank; the caller reads from the residuals how rough they are,
        so there is no `ConvergenceWarning`.

    Raises:
        ValueError: If a product is not finite.

    Cost: `count` matvecs and a block where the space is still within `tol`; `max_matvecs` at most.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return eigsh(
            H,
            count,
            which=which,
            tol=tol,
            max_matvecs=max(count, max_matvecs),
            generator=generator,
            initial=initial,
            block_size=block_size,
            verify=verify_cold and initial is None,
        ).gather()
