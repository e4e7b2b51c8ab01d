r"""Bounds on the eigenvalues that a Krylov space has missed, from small matrices.

With orthonormal [E, P] and H E = E T + P R (E expanded, P pending vectors), a symmetric H is, in a
basis that begins with the Ritz vectors of E,

.. math:: H = \begin{pmatrix} \Theta & K^T \\ K & H' \end{pmatrix},

where K holds the couplings and H' is H compressed to the complement of E. By Haynsworth's theorem,
the number of eigenvalues of H above x is the number of Ritz values above x plus that of eigenvalues
of :math:`H' + S(x)` above x, with :math:`S(x) = K (x I - \Theta)^{-1} K^T`. The space therefore
holds all eigenvectors beyond x if the largest eigenvalue of :math:`H' + S` is at most x, for which
matvecs with random vectors give a probabilistic bound. A *side* is +1 or -1: eigenvalues above x,
or below -x.

Shapes: m expanded vectors, q others; n vectors of a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def schur_complement(
    values_m: Tensor, coupling_qm: Tensor, k: int, x: float, side: int, near: float
) -> Tensor:
    r"""Return :math:`S = K (x I - \sigma \Theta)^{-1} K^T`, the coupling of H' to the Ritz pairs.

    Args:
        values_m: Ritz values Theta, the k wanted ones first; no other one beyond x.
        coupling_qm: K, the residuals of the Ritz pairs in the vectors outside.
        k: The number of wanted pairs.
        x: The bound.
        side: :math:`\sigma`.
        near: Wanted pairs closer to x than this have converged and count as decoupled: their
            residuals are equally small.

    Returns:
        Shape (q, q), symmetric.
    """
    gaps_m = x - side * values_m
    decoupled = (gaps_m.abs() <= near) | (gaps_m == 0)
    decoupled[k:] = False
    # The inner where avoids 1 / 0 = inf, whose product with a zero coupling would be NaN.
    weights_m = torch.where(decoupled, 0.0, 1 / torch.where(gaps_m == 0, 1.0, gaps_m))
    S = (coupling_qm * weights_m) @ coupling_qm.mT
    return (S + S.mT) / 2  # exactly symmetric: eigvalsh reads one triangle


def least_share(count: int, dim: int, probability: float) -> float:
    r"""Return a lower bound, up to a failure probability, on a vector's share in a random subspace.

    The squared share of a fixed unit vector of length n in a random subspace of c dimensions has a
    Beta(c/2, (n-c)/2) distribution, and
    :math:`P(\text{share} < \tau) \le (n \tau^2 / 2)^{c/2} / \Gamma(c/2 + 1)`.

    Args:
        count: c.
        dim: n.
        probability: Bound on the probability of a smaller share.

    Returns:
        :math:`\tau`, in [0, 1].
    """
    half = count / 2
    # In logarithms: Gamma(c/2 + 1) overflows for large c.
    log_square = math.log(2 / dim) + (math.log(probability) + math.lgamma(half + 1)) / half
    return min(1.0, math.exp(log_square / 2))


def is_bounded(
    T_nn: Tensor, R_qn: Tensor, count: int, share: float, eta: float, sides: Sequence[int]
) -> bool:
    r"""Whether a matrix B has no eigenvalue >= eta, up to the failure probability of `share`.

    A block Krylov process of B from `count` random vectors has the relation ``B Q = Q T + N R``. An
    eigenvector of :math:`\mu` has coefficients z in Q and u in N with
    :math:`(T - \mu) z + R^T u = 0` and :math:`\|z\|^2 + \|u\|^2 \le 1`. Among all such z, the
    largest norm in the first block is computed. If it is below `share`, :math:`\mu` is not an
    eigenvalue: its vector would be nearly orthogonal to the random ones. For one vector this is
    Christoffel's bound :math:`1 / \sum_j p_j(\mu)^2` on the mass of a measure at :math:`\mu`, the
    best that its moments allow; it falls as :math:`\mu` moves away from the Ritz values.

    Args:
        T_nn: The projection of B.
        R_qn: Its coupling to all other known vectors.
        count: Vectors in the first block.
        share: Least share of an eigenvector in the first block: see `least_share`.
        eta: The bound, on every side.
        sides: Subset of +1 and -1.
    """
    values = torch.linalg.eigvalsh(T_nn)
    eye_nn = torch.eye(len(T_nn), dtype=T_nn.dtype, device=T_nn.device)
    # Only R^T R enters: a triangular factor bounds the solves below by n rows.
    R_rn = torch.linalg.qr(R_qn).R if len(R_qn) > len(T_nn) else R_qn
    for side in sides:
        if float((side * values).max()) >= eta:
            return False
        # The bound falls as mu moves away from the Ritz values: eta and two points beyond suffice.
        for factor in (0.0, 0.3, 2.0):
            mu = side * (eta + factor * abs(eta))
            G_nr = torch.linalg.solve(T_nn - mu * eye_nn, R_rn.mT)
            # z = -G u with |z|^2 + |u|^2 <= 1: u is bounded in the metric I + G^T G.
            gram_rr = G_nr.mT @ G_nr
            gram_rr.diagonal().add_(1)
            first_rc = torch.linalg.solve_triangular(
                torch.linalg.cholesky(gram_rr), G_nr[:count].mT, upper=False
            )
            if float(torch.linalg.matrix_norm(first_rc, 2)) >= share:
                return False
    return True


def least_bound(
    T_nn: Tensor,
    R_qn: Tensor,
    count: int,
    share: float,
    most: float,
    sides: Sequence[int],
    steps: int = 10,
) -> float:
    """Return the least eta for which `is_bounded` holds, or inf if it exceeds `most`.

    Args:
        T_nn: See `is_bounded`.
        R_qn: See `is_bounded`.
        count: See `is_bounded`.
        share: See `is_bounded`.
        most: The largest useful bound.
        sides: See `is_bounded`.
        steps: Bisections between the largest Ritz value and `most`.
    """
    if not is_bounded(T_nn, R_qn, count, share, most, sides):
        return math.inf
    values = torch.linalg.eigvalsh(T_nn)
    low, high = max(float((side * values).max()) for side in sides), most
    for _ in range(steps):
        middle = (low + high) / 2
        if is_bounded(T_nn, R_qn, count, share, middle, sides):
            high = middle
        else:
            low = middle
    return high
