r"""Sample space: the spectrum of :math:`R^T R` from the Gram matrix :math:`R R^T`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hesscurv.interface.descriptions import Words, describe_object
from hesscurv.interface.integers import as_int
from hesscurv.interface.ranges import check_positive
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.sample_space.sample_rows import SampleRows

_NOISE = 30  # roundings of the largest eigenvalue, below which others are noise


class SampleSpace:
    r"""A Gauss-Newton or Fisher matrix as :math:`H = R^T R`, seen from its rows.

    R has one row for each sample and rank of the curvature in a sample's outputs, n in all. Its
    Gram matrix :math:`K = R R^T` has the nonzero eigenvalues of H, and eigenvectors u of K those of
    H, :math:`v = R^T u / \sqrt\lambda`. It is computed layer by layer: a linear layer's share is
    the elementwise product of two small Gram matrices. Nothing here is iterated, and nothing takes
    the (D, k) array of the eigenvectors unless it is asked for.

    The rows are those at the weights of the moment of construction.

    Args:
        H: A `GGNOperator` or an `EmpiricalFisherOperator`, in a single process.

    Attributes:
        eigenvalues: All of K's, shape (n,), float64, largest first; those of H, and D - n zeros.

    Raises:
        NoRowsError: If H is another operator, its loss couples samples or is not convex in the
            outputs, there are more than 20,000 rows, or a layer's factors exceed the memory budget.

    Cost: a forward pass and a backward pass for each row of a sample; at most n^2 D multiply-adds,
    for linear layers n^2 (i + o); 8 n^2 bytes and the layers' inputs and slopes.

    References:
        Dangel, Tatzel, Hennig, "ViViT: curvature access through the generalized Gauss-Newton's
        low-rank structure", TMLR 2022, section 3; for the Gram matrix of a linear layer Goodfellow,
        arXiv 1510.01799.

    Example:
        >>> G = hesscurv.GGNOperator(model, task, batches)
        >>> space = hesscurv.SampleSpace(G)
        >>> pairs = hesscurv.eigsh(G, k=3)
        >>> bool((space.eigenvalues[:3] - pairs.eigenvalues).abs().max() < 1e-3)
        True
        >>> mask = hesscurv.magnitude_mask(model, k=3)
        >>> 0 <= space.overlap(mask, k=3) <= 1
        True
    """

    def __init__(self, H: LinearOperator) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.rows = SampleRows(H)
            values, vectors = torch.linalg.eigh(self.rows.gram())
        self.eigenvalues: Tensor = values.flip(0).clamp(min=0)
        self._vectors_nn = vectors.flip(1)

    def __repr__(self) -> str:
        """Return sizes, and how much of the trace the largest eigenvalue has."""
        return describe_object(
            self,
            rows=self.rows.num_rows,
            D=self.rows.layout.numel,
            rank=self.rank,
            largest=Words(f"{float(self.eigenvalues[:1].sum()):.4g}"),
            trace=Words(f"{self.trace():.4g}"),
        )

    @property
    def rank(self) -> int:
        """The number of eigenvalues above the rounding of the largest one."""
        floor = _NOISE * torch.finfo(self.rows.dtype).eps
        return int((self.eigenvalues > floor * self.eigenvalues[:1]).sum())

    # -- vectors ----------------------------------------------------------------------------------

    def weights(self, k: int) -> Tensor:
        r"""Return :math:`U \Lambda^{-1/2}` of the top k, shape (n, k): V = R^T times that.

        Raises:
            ValueError: If k exceeds the `rank`.
        """
        k = as_int("k", k)
        if not 1 <= k <= self.rank:
            raise ValueError(
                f"expected 1 <= k <= {self.rank}, the number of eigenvalues of the {len(self)} "
                f"rows above the rounding of {self.rows.dtype}, got k={k}; take more samples, "
                "compute_dtype=torch.float64, or method='block_krylov'"
            )
        return self._vectors_nn[:, :k] / self.eigenvalues[:k].sqrt()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.rows.num_rows

    def vectors(self, k: int) -> Tensor:
        """Return the top k eigenvectors, shape (D, k), columns; the transpose of what is stored."""
        with torch.no_grad():
            return self.rows.combine(self.weights(k)).mT

    # -- overlap, without vectors -----------------------------------------------------------------

    def leverage(self, k: int) -> Tensor:
        r"""Return the leverage scores of the top k space, :math:`\sum_{j<k} V_{ij}^2`; (D,)."""
        weights_nk = self.weights(k).to(self.rows.dtype)
        out_D = torch.empty(self.rows.layout.numel, dtype=torch.float64, device=self.rows.device)
        with torch.no_grad():
            for place, parameter in self.rows.parameters():
                vectors_kP = weights_nk.new_empty(k, parameter.numel)
                parameter.combine_into(vectors_kP, weights_nk)
                out_D[place] = vectors_kP.double().square().sum(0)
        return out_D

    def overlap(self, mask_D: Tensor, k: int) -> float:
        """Return the overlap of a mask (D,) with the top k space; as `hesscurv.overlap`."""
        scores_m = self._scores_at(self._index(mask_D), k)
        return float(scores_m.sum()) / math.sqrt(len(scores_m) * k)

    def overlap_by_parameter(self, mask_D: Tensor, k: int) -> dict[str, float]:
        """Return each parameter's contribution to the overlap; they sum to it."""
        index_m = self._index(mask_D)
        scores_m = self._scores_at(index_m, k)
        total = math.sqrt(len(index_m) * k)
        return {
            name: float(scores_m[(index_m >= part.start) & (index_m < part.stop)].sum()) / total
            for name, part in self.rows.layout.slices().items()
        }

    def overlap_by_k(self, scores_D: Tensor, ks: Iterable[int]) -> Tensor:
        """Return the overlap of the k largest scores with the top k space for several k.

        Args:
            scores_D: Such as the magnitudes of the weights, shape (D,).
            ks: The ranks.

        Returns:
            Shape (len(ks),), float64; as `hesscurv.overlap_by_k`.
        """
        ks = [as_int("k in ks", k) for k in ks]
        scores_D = torch.as_tensor(scores_D, device=self.rows.device)
        order = torch.sort(scores_D, descending=True, stable=True).indices[: max(ks)]
        with torch.no_grad():
            V_mk = self.rows.at(order).double().mT @ self.weights(max(ks))
        squares = V_mk.square()
        found = [float(squares[:k, :k].sum()) / k for k in ks]
        return torch.tensor(found, dtype=torch.float64, device=self.rows.device)

    def overlap_with(self, other: SampleSpace, k: int) -> float:
        """Return the overlap of the top k spaces of two matrices, such as at two steps of training.

        Memory: k vectors of the largest parameter.
        """
        if other.rows.layout != self.rows.layout:
            raise ValueError(
                "expected sample spaces of the same parameters, got other names or shapes; build "
                "both operators with the same params="
            )
        mine_nk, theirs_nk = self.weights(k), other.weights(k).to(other.rows.dtype)
        cross_nk = torch.zeros(len(self), k, dtype=torch.float64, device=self.rows.device)
        with torch.no_grad():
            both = zip(self.rows.parameters(), other.rows.parameters(), strict=True)
            for (_, rows), (_, others) in both:
                vectors_kP = theirs_nk.new_empty(k, others.numel)
                others.combine_into(vectors_kP, theirs_nk)
                rows.add_products(cross_nk, vectors_kP.to(self.rows.device, self.rows.dtype))
        return float((mine_nk.mT @ cross_nk).square().sum()) / k

    def _index(self, mask_D: Tensor) -> Tensor:
        dim = self.rows.layout.numel
        if mask_D.dtype != torch.bool or tuple(mask_D.shape) != (dim,) or not bool(mask_D.any()):
            raise ValueError(
                f"expected a bool mask of shape ({dim},) with at least one True, got "
                f"{mask_D.dtype} of shape {tuple(mask_D.shape)}"
            )
        return mask_D.nonzero()[:, 0].to(self.rows.device)

    def _scores_at(self, index_m: Tensor, k: int) -> Tensor:
        """Return leverage scores at some coordinates, shape (m,)."""
        weights_nk = self.weights(k).to(self.rows.dtype)
        out_m = torch.empty(len(index_m), dtype=torch.float64, device=self.rows.device)
        with torch.no_grad():
            for here, rows in self.rows.columns_at(index_m):
                out_m[here] = (rows.mT @ weights_nk).double().square().sum(1)
        return out_m

    # -- functions of the eigenvalues -------------------------------------------------------------

    def trace(self) -> float:
        """Return the trace of H, exact."""
        return float(self.eigenvalues.sum())

    def log_determinant(self, damping: float) -> float:
        r"""Return :math:`\log\det(H + \delta I)`, as in the evidence of a Laplace approximation.

        Args:
            damping: delta > 0, in the unit of the eigenvalues.
        """
        check_positive("damping", damping)
        ratios = torch.log1p(self.eigenvalues / damping)
        return float(ratios.sum()) + self.rows.layout.numel * math.log(damping)

    def effective_dimension(self, damping: float) -> float:
        r"""Return :math:`\sum_i \lambda_i / (\lambda_i + \delta)`.

        The number of directions that the data determine against a prior of precision delta (MacKay,
        "Bayesian interpolation", 1992, equation 4.9).

        Args:
            damping: delta > 0, in the unit of the eigenvalues.
        """
        check_positive("damping", damping)
        return float((self.eigenvalues / (self.eigenvalues + damping)).sum())
