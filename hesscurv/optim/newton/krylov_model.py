"""Quadratic model of the loss on a Krylov space: one space has the steps of all dampings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.optim.newton.conjugate_gradients import require_finite
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner

_FIRST_ROOM = 16


class StepModel(Protocol):
    """A quadratic model of the loss that has the step of any damping."""

    def direction(self, damping: float) -> Tensor:
        """Return d(mu), shape (D,)."""

    def decrease(self, damping: float, length: float = 1.0) -> float:
        """Return what the model promises of a step of this length along d(mu)."""


@dataclass(frozen=True)
class KrylovModel:
    r"""The loss near w on the Krylov space of :math:`A = P^{1/2} H P^{1/2}` and the gradient.

    With :math:`V^T A V = S \Theta S^T` the step of a damping is

    .. math:: d(\mu) = -P^{1/2} V S (|\Theta| + \mu I)^{-1} S^T V^T P^{1/2} g,

    so that, once V is there, another damping costs k D operations and no product. As in conjugate
    gradients, d(mu) minimises the damped model over the whole space, if H is positive; magnitudes
    make it a descent direction for any H. The damping is mu P^{-1}: mu in the bulk, mu over
    the preconditioner's gain on the eigenspace.

    Args:
        basis: V, shape (k, D), a vector a row.
        values: Theta, shape (k,), float64 on the CPU, as what follows.
        vectors: S, shape (k, k).
        gradient: S^T V^T P^{1/2} g, shape (k,).
        precondition: P.
        converged: Whether ``||(A + mu I) y + P^{1/2} g|| <= tol ||P^{1/2} g||`` at the damping
            that was asked for.
    """

    basis: Tensor
    values: Tensor
    vectors: Tensor
    gradient: Tensor
    precondition: LowRankPreconditioner
    converged: bool

    @property
    def num_matvecs(self) -> int:
        """Products that it took, one a vector."""
        return len(self.basis)

    @property
    def num_negative(self) -> int:
        """Negative eigenvalues of A on the space, by more than rounding."""
        eps = torch.finfo(self.basis.dtype).eps
        return int((self.values < -10 * eps * self.values.abs().max()).sum())

    def direction(self, damping: float) -> Tensor:
        """Return d(mu), shape (D,)."""
        along = self.vectors @ self._coordinates(damping)
        return self.precondition.root(self.basis.mT @ along.to(self.basis))

    def decrease(self, damping: float, length: float = 1.0) -> float:
        """Return what the quadratic model promises of a step of this length along d(mu)."""
        s = length * self._coordinates(damping)
        return -float(self.gradient @ s + (self.values * s * s).sum() / 2)

    def _coordinates(self, damping: float) -> Tensor:
        return -self.gradient / _damped(self.values, damping)


def krylov_model(
    H: LinearOperator,
    gradient_D: Tensor,
    damping: float,
    precondition: LowRankPreconditioner,
    *,
    tol: float,
    max_iterations: int,
) -> KrylovModel:
    """Build the model by Lanczos' method, kept orthogonal.

    Args:
        H: The Hessian or its Gauss-Newton part, D x D.
        gradient_D: g, shape (D,), not zero.
        damping: The least mu of interest: the space grows until its step has converged.
        precondition: P.
        tol: On that step's residual, relative to the gradient's norm.
        max_iterations: The most products.

    Raises:
        ValueError: If a product has NaN or inf entries.

    Cost: a product, two preconditionings and 4 k D operations for each vector; k D numbers, twice
    that while the room for them grows.

    References:
        Gould, Lucidi, Roma, Toint, "Solving the trust-region subproblem using the Lanczos method",
        SIAM J. Optim. 9 (1999). Dauphin et al., "Identifying and attacking the saddle point
        problem", NeurIPS 2014 (magnitudes, in a Krylov space).
    """
    start_D = precondition.root(gradient_D)
    norm = float(torch.linalg.vector_norm(start_D))
    most = min(max_iterations, len(gradient_D))
    basis_kD = start_D.new_empty(min(_FIRST_ROOM, most), len(start_D))
    basis_kD[0] = start_D / norm
    diagonal: list[float] = []
    beside: list[float] = []
    eps = torch.finfo(start_D.dtype).eps
    test_at = 1
    while True:
        k = len(diagonal)
        image_D = precondition.root(H @ precondition.root(basis_kD[k]))
        kept_kD = basis_kD[: k + 1]
        inside_k = kept_kD @ image_D
        image_D = image_D - kept_kD.mT @ inside_k
        size = float(torch.linalg.vector_norm(inside_k))
        image_D -= kept_kD.mT @ (kept_kD @ image_D)  # once more, for what rounding has left
        rest = float(torch.linalg.vector_norm(image_D))
        require_finite(rest + size, k + 1)
        diagonal.append(float(inside_k[k]))
        k += 1
        exhausted = rest <= 10 * eps * max(size, rest) or rest == 0
        if k in (test_at, most) or exhausted:
            test_at = k + 1 + k // 8
            values, vectors = _eigenpairs(diagonal, beside)
            last = float(vectors[-1] @ (vectors[0] / _damped(values, damping)))
            converged = exhausted or abs(rest * last) <= tol
            if converged or k == most:
                break
        if k == len(basis_kD):
            room = start_D.new_empty(min(2 * k, most) - k, len(start_D))
            basis_kD = torch.cat([basis_kD, room])
        basis_kD[k] = image_D / rest
        beside.append(rest)
    return KrylovModel(
        basis_kD[:k], values, vectors, norm * vectors[0], precondition, bool(converged)
    )


@dataclass(frozen=True)
class DampedStep:
    """A damping whose step decreases the loss.

    Args:
        damping: mu.
        loss: The loss after it.
        predicted: The decrease that the model promised.
    """

    damping: float
    loss: float
    predicted: float


def search_damping(
    evaluate: Callable[[Tensor, float], float],
    loss: float,
    model: StepModel,
    damping: float,
    *,
    length: float,
    decrease: float,
    factor: float,
    max_evaluations: int,
    bounds: tuple[float, float],
) -> DampedStep | None:
    r"""Look for the damping with the smallest loss, by factors, from the last step's.

    Less damping is tried first, then more, and on in the same way for as long as the loss falls. A
    damping whose step does not decrease the loss by ``decrease`` times what the model promises is
    no candidate; where the first is none, it grows by the factor squared.

    Args:
        evaluate: The loss after a direction (D,) times a length; NaN and infinity count as no
            decrease.
        loss: The loss before it.
        model: The steps.
        damping: The first mu.
        length: The factor on every step.
        decrease: The share of the promise, between 0 and 1.
        factor: Between one mu and the next, above 1.
        max_evaluations: The most losses.
        bounds: The least and the largest mu.

    Returns:
        None if no step decreases the loss enough.

    Cost: an evaluation and a direction for each mu; 3 to 5 in practice.

    References:
        Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", J. SIAM 11
        (1963), who tries mu and mu over a factor in every step.
    """
    tried: dict[float, DampedStep | None] = {}

    def attempt(mu: float) -> DampedStep | None:
        if mu not in tried:
            value = evaluate(model.direction(mu), length)
            promise = model.decrease(mu, length)
            enough = value < loss and value <= loss - decrease * promise
            tried[mu] = DampedStep(mu, value, promise) if math.isfinite(value) and enough else None
        return tried[mu]

    def go_on(best: DampedStep, ratio: float) -> DampedStep:
        while len(tried) < max_evaluations:
            mu = min(max(best.damping * ratio, bounds[0]), bounds[1])
            found = None if mu == best.damping else attempt(mu)
            if found is None or found.loss >= best.loss:
                break
            best = found
        return best

    mu = min(max(damping, bounds[0]), bounds[1])
    first = attempt(mu)
    while first is None and len(tried) < max_evaluations and mu < bounds[1]:
        mu = min(max(mu, torch.finfo(torch.float64).tiny) * factor**2, bounds[1])
        first = attempt(mu)
    if first is None:
        return None
    best = go_on(first, 1 / factor)
    return best if best is not first else go_on(first, factor)


def _damped(values: Tensor, damping: float) -> Tensor:
    """Return |Theta| + mu, where that is no more than rounding the least that is more."""
    out = values.abs() + damping
    floor = torch.finfo(out.dtype).eps * float(out.max())
    return out.clamp(min=floor) if floor > 0 else torch.ones_like(out)


def _eigenpairs(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Return the eigenpairs of a symmetric tridiagonal matrix, in float64 on the CPU."""
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64, device="cpu")
        T += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(T)
    return values, vectors
