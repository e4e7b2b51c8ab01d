"""Solves with a low-rank plus block-diagonal matrix on subsets of the coordinates (Woodbury).

``H = R^T R + mu K`` with few rows R (n, D) and K positive definite in small blocks. Its inverse on
a subset S of the coordinates follows from Woodbury's identity: with ``B = R_S K_SS^-1`` and
``G = B R_S^T``,

    (R_S^T R_S + mu K_SS)^-1 = (K_SS^-1 - B^T (mu I + G)^-1 B) / mu.

mu enters only an n x n matrix: once B and G are computed, any further mu is cheap.
Shapes: D coordinates, n rows, b blocks; a block has p coordinates, s of them in S; o, i: the rows
and columns of a weight matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

# Multiple of eps below the largest eigenvalue at which a factorisation still has one digit.
_FLOOR = 10
# Bytes of small matrices factored in one batch: far less memory than the rows.
_BYTES_AT_ONCE = 2**26


class Block(ABC):
    """A positive definite matrix K (p, p) whose principal submatrices are cheap to invert."""

    numel: int

    @abstractmethod
    def multiply(self, x_p: Tensor) -> Tensor:
        """Return K x, shape (p,)."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal of K, shape (p,)."""

    @abstractmethod
    def solve(self, mask_p: Tensor, *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return x K_SS^-1 for each x (n, p), and the diagonal of K_SS^-1 (p,), zero outside S."""


class DiagonalBlock(Block):
    """A diagonal matrix.

    Args:
        diagonal_p: Shape (p,), positive.

    Raises:
        ValueError: If an entry is not positive and finite.
    """

    def __init__(self, diagonal_p: Tensor) -> None:
        _require_positive("the diagonal", diagonal_p)
        self._diagonal_p = diagonal_p
        self.numel = diagonal_p.numel()

    def multiply(self, x_p: Tensor) -> Tensor:
        """Return K x, shape (p,)."""
        return self._diagonal_p * x_p

    def diagonal(self) -> Tensor:
        """Return the diagonal of K, shape (p,)."""
        return self._diagonal_p

    def solve(self, mask_p: Tensor, *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return x K_SS^-1 for each x, and the diagonal of K_SS^-1, all zero outside S."""
        inverse_p = mask_p / self._diagonal_p
        return [x_np * inverse_p for x_np in inputs], inverse_p


class KroneckerBlock(Block):
    """``diag(scale) (x) A + damping I``, for a weight matrix (o, i) in row-major order.

    Rows of the weights do not interact; entries within a row interact through the inputs'
    covariance A, which may be block-diagonal itself: c blocks of size i / c.

    Args:
        covariance: A, shape (i, i), or (c, i/c, i/c): symmetric and positive semidefinite.
        scale_o: Shape (o,), not negative.
        damping: Positive; raised to at least `_FLOOR` eps times a bound on the largest eigenvalue.

    Raises:
        ValueError: If a scale is negative, the damping not positive, or a number not finite.
    """

    def __init__(self, covariance: Tensor, scale_o: Tensor, damping: float) -> None:
        if covariance.ndim not in (2, 3) or covariance.shape[-1] != covariance.shape[-2]:
            raise ValueError(
                f"expected a covariance (i, i) or (c, i, i), got {tuple(covariance.shape)}"
            )
        if not all(bool(t.isfinite().all()) for t in (covariance, scale_o)) or scale_o.min() < 0:
            raise ValueError("expected a finite covariance and scales that are not negative")
        if not 0 < damping < float("inf"):
            raise ValueError(f"expected a positive damping, got {damping}")
        self._a_cii = covariance if covariance.ndim == 3 else covariance[None]
        # Constant inputs, or one output with all of the curvature, give an eigenvalue so large
        # relative to the damping that rounding makes K indefinite.
        # The bound is the infinity norm.
        bound = self._a_cii.abs().sum(2).max() * scale_o.max()
        least = _FLOOR * torch.finfo(covariance.dtype).eps * float(bound)
        self._scale_o, self._damping = scale_o, max(damping, least)
        self.numel = scale_o.numel() * self._a_cii.shape[0] * self._a_cii.shape[1]

    def multiply(self, x_p: Tensor) -> Tensor:
        """Return K x, shape (p,)."""
        x_oci = x_p.view(len(self._scale_o), *self._a_cii.shape[:2])
        mixed_oci = torch.einsum("oci,cij->ocj", x_oci, self._a_cii)
        return (mixed_oci * self._scale_o[:, None, None] + self._damping * x_oci).flatten()

    def diagonal(self) -> Tensor:
        """Return the diagonal of K, shape (p,)."""
        inputs_ci = self._a_cii.diagonal(dim1=1, dim2=2)
        return (self._scale_o[:, None] * inputs_ci.reshape(1, -1) + self._damping).flatten()

    def solve(self, mask_p: Tensor, *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return x K_SS^-1 for each x, and the diagonal of K_SS^-1, all zero outside S."""
        c, i, _ = self._a_cii.shape
        mask_mi = mask_p.view(-1, i).to(self._a_cii.dtype)  # m = o c small matrices
        scale_m = self._scale_o.repeat_interleave(c)
        out = [torch.empty_like(x_np) for x_np in inputs]
        diagonal_mi = torch.empty_like(mask_mi)
        at_once = max(1, _BYTES_AT_ONCE // (i * i * mask_mi.element_size()))
        eye_ii = self._damping * torch.eye(i, dtype=mask_mi.dtype, device=mask_mi.device)
        for start in range(0, len(mask_mi), at_once):
            part = slice(start, start + at_once)
            f_mi = mask_mi[part]
            if c == 1:
                a_mii = self._a_cii * scale_m[part, None, None]
            else:
                which = torch.arange(start, start + len(f_mi), device=f_mi.device) % c
                a_mii = self._a_cii[which] * scale_m[part, None, None]
            # The identity outside S: decoupled from S, and the batch keeps one shape.
            a_mii = (a_mii + eye_ii) * f_mi[:, :, None] * f_mi[:, None, :]
            a_mii.diagonal(dim1=1, dim2=2).add_(1 - f_mi)
            inverse_mii = torch.cholesky_inverse(torch.linalg.cholesky(a_mii))
            inverse_mii *= f_mi[:, :, None] * f_mi[:, None, :]
            diagonal_mi[part] = inverse_mii.diagonal(dim1=1, dim2=2)
            for x_np, out_np in zip(inputs, out, strict=True):
                x_mni = x_np.view(len(x_np), -1, i)[:, part].transpose(0, 1)
                out_np.view(len(x_np), -1, i)[:, part] = torch.bmm(x_mni, inverse_mii).transpose(
                    0, 1
                )
        return out, diagonal_mi.flatten()


class PermutedBlock(Block):
    """Another block's matrix for a tensor that is stored with its dimensions in another order.

    Args:
        block: K in the coordinates of the permuted tensor, flattened.
        shape: The shape that the tensor is stored in.
        order: The stored dimensions in the order that `block` has them in.
    """

    def __init__(self, block: Block, shape: Sequence[int], order: Sequence[int]) -> None:
        self._block, self._shape, self._order = block, tuple(shape), tuple(order)
        self._permuted = tuple(self._shape[d] for d in self._order)
        self._back = tuple(self._order.index(d) for d in range(len(self._order)))
        self.numel = block.numel

    def multiply(self, x_p: Tensor) -> Tensor:
        """Return K x, shape (p,)."""
        return self._stored(self._block.multiply(self._to_block(x_p)))

    def diagonal(self) -> Tensor:
        """Return the diagonal of K, shape (p,)."""
        return self._stored(self._block.diagonal())

    def solve(self, mask_p: Tensor, *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return x K_SS^-1 for each x, and the diagonal of K_SS^-1, all zero outside S."""
        permuted = [self._to_block(x_np) for x_np in inputs]
        out, diagonal_p = self._block.solve(self._to_block(mask_p), *permuted)
        # Free the permuted copies now, and each result as it is permuted back: the rows are large.
        permuted.clear()
        return [self._stored(out.pop(0)) for _ in inputs], self._stored(diagonal_p)

    def _to_block(self, x: Tensor) -> Tensor:
        return _permuted(x, self._shape, self._order)

    def _stored(self, x: Tensor) -> Tensor:
        return _permuted(x, self._permuted, self._back)


def _permuted(x: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """Permute the dimensions of tensors that are flattened along the last dimension of x."""
    lead = x.shape[:-1]
    dims = (*range(len(lead)), *(len(lead) + d for d in order))
    return x.reshape(*lead, *shape).permute(dims).reshape(x.shape)


class LowRankPlusBlocks:
    """``H = R^T R + mu K``: few rows plus a block-diagonal matrix.

    Args:
        rows: R by block of columns, (n, p) each.
        blocks: K, one block for each block of columns.

    Raises:
        ValueError: If rows and blocks do not fit each other, or a row is not finite.
    """

    def __init__(self, rows: Sequence[Tensor], blocks: Sequence[Block]) -> None:
        sizes = [(block.numel, len(rows[0])) for block in blocks]
        if [(part.shape[1], part.shape[0]) for part in rows] != sizes:
            raise ValueError(
                "expected rows (n, p) for each block of p coordinates, got "
                f"{[tuple(part.shape) for part in rows]} for blocks of {[n for n, _ in sizes]}"
            )
        if not all(  # aminmax propagates NaN, without a mask of the rows' size
            bool(torch.stack(part.aminmax()).isfinite().all()) for part in rows if len(part)
        ):
            raise ValueError("expected finite rows, got NaN or inf; look at the model's gradients")
        self.rows, self.blocks = list(rows), list(blocks)
        self._sizes = [block.numel for block in blocks]
        self.shape = (sum(self._sizes), sum(self._sizes))

    def multiply(self, x_D: Tensor, mu: float) -> Tensor:
        """Return H x, shape (D,)."""
        parts = x_D.split(self._sizes)
        y_n = self.rows_times(x_D)
        return torch.cat(
            [
                r_np.mT @ y_n + mu * block.multiply(part)
                for r_np, block, part in zip(self.rows, self.blocks, parts, strict=True)
            ]
        )

    def rows_times(self, x_D: Tensor) -> Tensor:
        """Return R x, shape (n,)."""
        parts = zip(self.rows, x_D.split(self._sizes), strict=True)
        return torch.stack([r_np @ part for r_np, part in parts]).sum(0)

    def diagonal(self, mu: float) -> Tensor:
        """Return the diagonal of H, shape (D,)."""
        return torch.cat(
            [
                torch.linalg.vector_norm(r_np, dim=0).square() + mu * block.diagonal()
                for r_np, block in zip(self.rows, self.blocks, strict=True)
            ]
        )

    def restrict(self, mask_D: Tensor, fixed_D: Tensor | None = None) -> SupportSystem:
        """Factor H on a subset of the coordinates, for any mu.

        Args:
            mask_D: S, shape (D,), bool.
            fixed_D: Shape (D,), the values outside S in what `SupportSystem.solve` returns; its
                entries in S are not used. Zeros by default.

        Cost:
            About 2 n s (n + i) operations for s coordinates in S, and memory for n (s + n) numbers
            in addition to the rows.
        """
        return SupportSystem(self, mask_D, fixed_D)


class SupportSystem:
    """H on a subset S of the coordinates, factored; made by `LowRankPlusBlocks.restrict`."""

    def __init__(self, H: LowRankPlusBlocks, mask_D: Tensor, fixed_D: Tensor | None) -> None:
        n = len(H.rows[0])
        self._mask_D = mask_D
        outside_D = mask_D.new_zeros(mask_D.shape, dtype=H.rows[0].dtype)
        if fixed_D is not None:
            outside_D = torch.where(mask_D, outside_D, fixed_D)
        self._outside_D, self._outside_n = outside_D, H.rows_times(outside_D)
        self._G_nn = H.rows[0].new_zeros(n, n, dtype=torch.float64)
        self._B: list[Tensor] = []
        self._rows = H.rows
        self._sizes = [block.numel for block in H.blocks]
        self._blocks = H.blocks
        self._columns: list[Tensor | slice] = []
        diagonals, fixed = [], []
        parts = zip(
            H.rows, H.blocks, mask_D.split(self._sizes), outside_D.split(self._sizes), strict=True
        )
        for r_np, block, mask_p, x_p in parts:
            # The right-hand side from the fixed values outside S, solved along with the rows.
            coupled_p = torch.where(mask_p, block.multiply(x_p), 0)
            (b_np, fixed_1p), diagonal_p = block.solve(mask_p, r_np, coupled_p[None])
            diagonals.append(diagonal_p)
            fixed.append(fixed_1p[0])
            columns = slice(None) if bool(mask_p.all()) else mask_p.nonzero()[:, 0]
            if isinstance(columns, slice) or 2 * len(columns) > len(mask_p):
                # B is zero outside S: multiplying zeros is cheaper than copying most of R.
                self._G_nn += b_np @ r_np.mT
                b_ns = b_np[:, columns]
            else:
                b_ns = b_np[:, columns]
                self._G_nn += b_ns @ r_np[:, columns].mT
            del b_np
            self._B.append(b_ns)
            self._columns.append(columns)
        # Rounding makes G asymmetric; Cholesky reads one triangle.
        self._G_nn = (self._G_nn + self._G_nn.mT) / 2
        self._y_D = torch.cat(fixed)
        self._diagonal_D = torch.cat(diagonals)

    def solve(
        self, mu: float, residual_n: Tensor | None = None, gradient_D: Tensor | None = None
    ) -> Tensor:
        """Return the minimiser of a quadratic function, with the values outside S fixed.

        ``1/2 |R x + residual|^2 + mu/2 x^T K x + gradient^T x``

        Args:
            mu: Positive.
            residual_n: Shape (n,); zeros by default.
            gradient_D: Shape (D,); zeros by default.

        Returns:
            Shape (D,), the fixed values outside S.
        """
        y_D, r_n = self._y_D, self._outside_n
        if gradient_D is not None:
            y_D = y_D + self._solve_blocks(gradient_D) / mu
        if residual_n is not None:
            r_n = r_n + residual_n
        # Inside S: -y - B^T (mu I + G)^-1 (r - R y), with y = K_SS^-1 (K_SP x_P + gradient / mu).
        left_n = r_n - sum(
            r_np @ y_p for r_np, y_p in zip(self._rows, y_D.split(self._sizes), strict=True)
        )
        z_n = torch.cholesky_solve(left_n.double()[:, None], self._factor(mu))[:, 0]
        inside_D = y_D + self._spread([b_ns.mT @ z_n.to(b_ns.dtype) for b_ns in self._B])
        return self._outside_D - inside_D

    def inverse_diagonal(self, mu: float) -> Tensor:
        """Return the diagonal of H_SS^-1, shape (D,), zero outside S."""
        # diag(B^T (L L^T)^-1 B) as column norms of L^-1 B: n numbers per entry, never B^T (...) B.
        factor_nn = self._factor(mu).to(self._B[0].dtype)
        parts = [
            torch.linalg.solve_triangular(factor_nn, b_ns, upper=False).square_().sum(0)
            for b_ns in self._B
        ]
        # For a coordinate determined by the rows, the difference cancels to rounding noise.
        least_D = self._diagonal_D * torch.finfo(self._diagonal_D.dtype).eps
        return torch.maximum(self._diagonal_D - self._spread(parts), least_D) / mu

    def _factor(self, mu: float) -> Tensor:
        return torch.linalg.cholesky(
            self._G_nn
            + mu * torch.eye(len(self._G_nn), dtype=self._G_nn.dtype, device=self._G_nn.device)
        )

    def _solve_blocks(self, x_D: Tensor) -> Tensor:
        parts = zip(
            self._blocks, self._mask_D.split(self._sizes), x_D.split(self._sizes), strict=True
        )
        return torch.cat([block.solve(mask_p, x_p[None])[0][0][0] for block, mask_p, x_p in parts])

    def _spread(self, parts: list[Tensor]) -> Tensor:
        out_D = self._diagonal_D.new_zeros(self._diagonal_D.shape)
        for out_p, columns, part in zip(
            out_D.split(self._sizes), self._columns, parts, strict=True
        ):
            out_p[columns] = part
        return out_D


def _require_positive(what: str, x: Tensor) -> None:
    if not bool(((x > 0) & x.isfinite()).all()):
        raise ValueError(f"expected {what} to be positive and finite, got a minimum of {x.min()}")
