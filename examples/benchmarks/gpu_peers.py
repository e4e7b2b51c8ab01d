"""The other libraries on a GPU: Hessian operators and eigensolvers by their public functions.

Import it; it is not run. Every function imports its library when it is called, so that one that is
missing, or fails, is left out with its reason (`why_not`), and the others are measured.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from contenders import Counted, curvlinops_hessian, fastest_width, scipy_eigenpairs
from models import Problem
from torch import Tensor

import hesscurv

LEAST_SECONDS, AGAIN = 2.0, 30.0  # of a time limit


class TimeUpError(Exception):
    """The time limit of a piece of work has passed."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the work within by `TimeUpError` when so many seconds have passed; for the main thread.

    The error comes between two instructions of Python, so that a long kernel ends first; and again
    half a minute later, should a place that swallows errors have met the first.
    """

    def end(*_: object) -> None:
        raise TimeUpError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, LEAST_SECONDS), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def why_not(error: BaseException) -> str:
    """Return the first line of what went wrong, short."""
    if isinstance(error, ImportError):
        return f"not installed ({error}); see the extra hesscurv[bench]"
    lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


# -- operators --------------------------------------------------------------------------------


class CompiledCurvlinops:
    """curvlinops' product on the one batch of a problem, by `torch.compile`.

    The library has no switch for it; its `make_batch_hessian_matrix_product` is what it suggests to
    compile.
    """

    def __init__(self, problem: Problem) -> None:
        from curvlinops.hessian import make_batch_hessian_matrix_product

        ((self._inputs, self._targets),) = problem.batches
        self._params = problem.params
        self.shape = (problem.size, problem.size)
        self.dtype, self.device = self._params[0].dtype, self._params[0].device
        product = make_batch_hessian_matrix_product(
            problem.model, problem.loss_fn, tuple(self._params)
        )
        self._product = torch.compile(product)

    def __matmul__(self, V: Tensor) -> Tensor:
        columns = V if V.ndim == 2 else V[:, None]
        parts = columns.split([p.numel() for p in self._params])
        pieces = [
            part.reshape(*p.shape, columns.shape[1])
            for part, p in zip(parts, self._params, strict=True)
        ]
        product = self._product(self._inputs, self._targets, *pieces)
        flat = torch.cat([piece.reshape(-1, columns.shape[1]) for piece in product])
        return flat if V.ndim == 2 else flat[:, 0]


class ByColumns:
    """An operator that multiplies one vector at a time, on blocks."""

    def __init__(self, operator: Any) -> None:
        self.shape = (operator.size, operator.size)
        self.dtype, self.device = operator.dtype, operator.device
        self._operator = operator

    def __matmul__(self, V: Tensor) -> Tensor:
        if V.ndim == 1:
            return self._operator @ V
        return torch.stack([self._operator @ v for v in V.mT.contiguous()]).mT


def raw_eigenthings_hessian(problem: Problem) -> Any:
    """Return hessian-eigenthings' operator; its mean over batches needs batches of one size."""
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(problem.model, problem.batches, supervised_loss(problem.loss_fn))


def eigenthings_hessian(problem: Problem) -> ByColumns:
    """Return hessian-eigenthings' operator, which blocks of vectors can be multiplied with."""
    return ByColumns(raw_eigenthings_hessian(problem))


# -- eigensolvers -----------------------------------------------------------------------------


@dataclass
class Pairs:
    """Eigenvalues (k,), vectors (D, k) wherever they are, the products used, and what converged."""

    eigenvalues: Tensor
    vectors: Tensor
    products: int
    converged: int | None = None


def with_scipy(problem: Problem, k: int) -> Pairs:
    """Solve by SciPy's eigsh, float32, on the host; products by curvlinops on the device."""
    import numpy as np

    return Pairs(*scipy_eigenpairs(problem, k, np.float32, int(1.6 * k) + 2))


def with_eigenthings(problem: Problem, k: int) -> Pairs:
    """Solve by hessian-eigenthings' Lanczos, twice k steps, with reorthogonalisation."""
    from hessian_eigenthings import lanczos

    result = lanczos(raw_eigenthings_hessian(problem), k=k, reorthogonalize=True, seed=0)
    converged = int(result.converged.sum())
    return Pairs(result.eigenvalues, result.eigenvectors.mT, result.iterations, converged)


def with_skerch(problem: Problem, k: int) -> Pairs:
    """Run skerch's seigh by the recovery "hmt" from 2 k measurements of curvlinops' operator."""
    from skerch.algorithms import seigh

    peer = curvlinops_hessian(problem)
    operator = Counted(peer, fastest_width(peer, 64))
    values, vectors = seigh(operator, operator.device, operator.dtype, 2 * k, recovery_type="hmt")
    return Pairs(values[:k], vectors[:, :k], operator.num_matvecs)


def with_hesscurv(problem: Problem, k: int, tol: float) -> Pairs:
    """Run our own eigsh as it comes, operator and calibration included."""
    task = hesscurv.supervised(problem.loss_fn)
    H = hesscurv.HessianOperator(problem.model, task, problem.batches)
    pairs = hesscurv.eigsh(H, k, tol=tol)
    converged = int(pairs.converged.sum())
    return Pairs(pairs.eigenvalues, pairs.eigenvectors, pairs.num_matvecs, converged)


SOLVERS: dict[str, Callable[[Problem, int], Pairs]] = {
    "hesscurv, tol=1e-2": lambda problem, k: with_hesscurv(problem, k, 1e-2),
    "hesscurv, tol=1e-3": lambda problem, k: with_hesscurv(problem, k, 1e-3),
    "skerch hmt, 2 k": with_skerch,
    "eigenthings Lanczos, 2 k": with_eigenthings,
    "SciPy eigsh, tol=1e-3": with_scipy,
}
