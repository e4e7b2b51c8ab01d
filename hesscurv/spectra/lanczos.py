"""Simultaneous Lanczos processes: one tridiagonal matrix per starting vector.

Not block Lanczos: the processes only share the blocks of matvecs. Vectors lie in rows: b processes,
n steps, (b, D) and (b, n, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscurv.interface.descriptions import Described
from hesscurv.linalg.block_norms import column_norms, norms_on_device
from hesscurv.linalg.projections import project_out_
from hesscurv.linalg.transfers import to_device_of
from hesscurv.operators.linear_operator import LinearOperator


@dataclass(frozen=True, eq=False, repr=False)
class Tridiagonal(Described):
    """The symmetric tridiagonal matrix T = Q^T H Q of one process.

    Args:
        diagonal: Shape (n,), float64 on the CPU.
        off_diagonal: Shape (n - 1,), float64 on the CPU, positive.
    """

    diagonal: Tensor
    off_diagonal: Tensor

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Return the nodes (n,), ascending, and weights (n,), which sum to 1.

        ``q_1^T f(H) q_1 ~ sum_j weight_j f(node_j)``: the eigenvalues of T and the squared first
        entries of its eigenvectors (Golub, Welsch 1969). Exact for polynomials of degree 2 n - 1.
        """
        T = torch.diag(self.diagonal)
        T += torch.diag(self.off_diagonal, 1) + torch.diag(self.off_diagonal, -1)
        nodes, vectors = torch.linalg.eigh(T)
        return nodes, vectors[0] ** 2


def lanczos(
    H: LinearOperator,
    start_BD: Tensor,
    num_steps: int,
    *,
    basis_bnD: Tensor | None = None,
    deflated: Sequence[Tensor] = (),
) -> list[Tridiagonal]:
    """Run b Lanczos processes side by side.

    ``beta_j q_{j+1} = H q_j - alpha_j q_j - beta_{j-1} q_{j-1}``, for each starting vector q_1. A
    process ends when beta_j is rounding error: its vectors span an invariant subspace, and its
    quadrature is exact for every function.

    Args:
        H: The symmetric operator, D x D.
        start_BD: Shape (b, D), row-contiguous, float32 or float64: nonzero vectors, one per row.
            Overwritten.
        num_steps: n, the maximal number of steps, at least 1.
        basis_bnD: Shape (at least b, n, D), storage for all vectors, against which each new one is
            reorthogonalised. None keeps only the last two: rounding then makes the processes find
            converged eigenvalues again (ghosts), whose weights sum to the right one, so densities
            and traces suffer little; resolving the rest takes more steps.
        deflated: Orthonormal vectors in slabs (k_i, D), row-contiguous. They are projected out of
            the start and of each product: H is replaced by ``(I - V V^T) H (I - V V^T)``.

    Returns:
        The b tridiagonal matrices.

    Raises:
        ValueError: If a starting vector is zero, or lies in the span of the deflated ones.

    Cost: at most b n matvecs; n^2 D multiply-adds for each process (2 n D without a basis), and
    2 k D for each matvec with k deflated vectors.

    References:
        Lanczos (1950); full reorthogonalisation as in Golub, Van Loan, "Matrix computations",
        section 10.3; Cullum, Willoughby (1985) on ghosts.
    """
    eps = torch.finfo(start_BD.dtype).eps
    current_BD = start_BD
    before = column_norms(current_BD)
    project_out_(current_BD, deflated)
    lengths = column_norms(current_BD)
    # A vector inside the deflated span leaves rounding errors, not zero.
    if not (lengths > 100 * eps * before).all():
        raise ValueError(
            "expected starting vectors outside of the span of the deflated ones, got one inside; "
            "deflate fewer, or start from Gaussian vectors"
        )
    current_BD /= to_device_of(lengths, current_BD)[:, None]
    previous_BD = torch.zeros_like(current_BD)
    active = list(range(len(current_BD)))
    alphas: list[list[float]] = [[] for _ in active]
    betas: list[list[float]] = [[] for _ in active]
    scales = [0.0] * len(active)  # largest norm of a product so far: the unit for a negligible beta
    for step in range(num_steps):
        if basis_bnD is not None:
            # Indexing by a list copies it to the device, which synchronises.
            rows_active = slice(None) if len(active) == len(basis_bnD) else active
            basis_bnD[rows_active, step] = current_BD
        # A copy, since it is modified: an operator may return its own storage.
        W_BD = (H @ current_BD.mT).mT.clone(memory_format=torch.contiguous_format)
        norms_b = norms_on_device(W_BD)
        project_out_(W_BD, deflated, passes=1)
        if step > 0:
            last = torch.tensor([betas[i][-1] for i in active], dtype=torch.float64, device="cpu")
            W_BD.addcmul_(previous_BD, to_device_of(last, W_BD)[:, None], value=-1)
        first = _project_out_rows_(W_BD, current_BD)
        # The second pass removes rounding residue and, with a basis, all earlier vectors.
        if basis_bnD is None:
            second = _project_out_rows_(W_BD, current_BD)
        else:
            slabs = [basis_bnD[i, : step + 1] for i in active]
            rows = zip(W_BD.split(1), slabs, strict=True)
            second = torch.cat([project_out_(w, [slab], passes=1)[-1] for w, slab in rows])
        project_out_(W_BD, deflated, passes=1)
        # All numbers of a step in one transfer, so that a GPU is synchronised once.
        numbers = torch.stack([first, second, norms_b, norms_on_device(W_BD)]).cpu().T.tolist()
        for i, (once, again, norm, _) in zip(active, numbers, strict=True):
            # The second pass found a part of alpha that rounding left in the first.
            alphas[i].append(once + again)
            scales[i] = max(scales[i], norm)
        if step + 1 == num_steps:  # T has no beta after its last alpha
            break
        found = [left for *_, left in numbers]
        # A beta at rounding level: normalising the rest would continue with noise.
        going = [row for row, i in enumerate(active) if found[row] > 4 * eps * scales[i]]
        for row in going:
            betas[active[row]].append(found[row])
        if not going:
            break
        if len(going) < len(active):
            W_BD, current_BD = W_BD[going], current_BD[going]
            active = [active[row] for row in going]
        lengths_b1 = torch.tensor(
            [[betas[i][-1]] for i in active], dtype=torch.float64, device="cpu"
        )
        previous_BD, current_BD = current_BD, W_BD.div_(to_device_of(lengths_b1, W_BD))
    return [
        Tridiagonal(
            torch.tensor(alpha, dtype=torch.float64, device="cpu"),
            torch.tensor(beta, dtype=torch.float64, device="cpu"),
        )
        for alpha, beta in zip(alphas, betas, strict=True)
    ]


def _project_out_rows_(W_BD: Tensor, Q_BD: Tensor) -> Tensor:
    """Project the unit vector in each row of Q out of that row of W; return coefficients (b,)."""
    coefficients = (W_BD * Q_BD).sum(dim=1, dtype=torch.float64)
    W_BD.addcmul_(Q_BD, coefficients.to(W_BD)[:, None], value=-1)
    return coefficients
