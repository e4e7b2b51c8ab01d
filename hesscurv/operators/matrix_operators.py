"""Matrices and other libraries' operators as `LinearOperator`."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hesscurv.interface.descriptions import Words
from hesscurv.linalg.precision import full_precision
from hesscurv.operators.linear_operator import LinearOperator


@runtime_checkable
class SymmetricOperator(Protocol):
    """What an eigensolver needs of an operator, whatever library it is from.

    ``isinstance(A, SymmetricOperator)`` tells whether it has all of it. It must be symmetric, and
    multiply tensors of its dtype on its device: vectors (D,) and blocks (D, b), vectors as columns.

    Attributes:
        shape: (D, D).
        dtype: Of the vectors, torch.float32 or torch.float64.
        device: Of the vectors.

    Example:
        >>> isinstance(H, hesscurv.SymmetricOperator)
        True
        >>> isinstance("H", hesscurv.SymmetricOperator)
        False
    """

    @property
    def shape(self) -> Any:
        """Return (D, D)."""

    @property
    def dtype(self) -> Any:
        """Return the vectors' dtype."""

    @property
    def device(self) -> Any:
        """Return the vectors' device."""

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """Return the product with a vector (D,) or a block (D, b)."""


class DenseOperator(LinearOperator):
    """A symmetric matrix as an operator.

    Args:
        matrix: Shape (D, D), floating, symmetric to rounding.

    Raises:
        TypeError: If it is not a floating tensor.
        ValueError: If it is not square, finite and symmetric.

    Example:
        >>> A = hesscurv.operators.DenseOperator(torch.diag(torch.tensor([1.0, 2.0])))
        >>> A @ torch.ones(2)
        tensor([1., 2.])
    """

    def __init__(self, matrix: Tensor) -> None:
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
            raise TypeError(f"expected a real floating matrix, got {_kind(matrix)}")
        _check_square(matrix)
        matrix = matrix.detach()
        _check_symmetric(_largest(matrix), _largest(matrix - matrix.mT), matrix.dtype)
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        with full_precision(self.device):
            return self.matrix @ vectors_DB


class SparseOperator(LinearOperator):
    """A symmetric sparse matrix as an operator.

    Args:
        matrix: Shape (D, D), floating, symmetric to rounding, in any of torch's sparse layouts.

    Raises:
        TypeError: If it is not floating.
        ValueError: If it is not square, finite and symmetric.

    Cost: a product takes two multiply-adds for each stored entry and vector.
    """

    def __init__(self, matrix: Tensor) -> None:
        if not matrix.is_floating_point():
            raise TypeError(f"expected a real floating matrix, got {_kind(matrix)}")
        _check_square(matrix)
        # Entries that are stored twice add up; only this layout can be transposed and subtracted.
        matrix = matrix.detach().to_sparse_coo().coalesce()
        asymmetric = (matrix - matrix.t()).coalesce()
        _check_symmetric(_largest(matrix.values()), _largest(asymmetric.values()), matrix.dtype)
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        with full_precision(self.device):
            return torch.sparse.mm(self.matrix, vectors_DB)


class ForeignOperator(LinearOperator):
    """Another library's symmetric operator, by its `shape`, `dtype`, `device` and `@`.

    Args:
        operator: An object with a square `shape` and ``@`` on tensors (D,) and (D, b), as those of
            curvlinops and skerch. Without `dtype` or `device`: float32 on the CPU.

    Raises:
        TypeError: If it lacks `shape` or ``@``.
        ValueError: If it is not square.
    """

    def __init__(self, operator: Any) -> None:
        if not hasattr(operator, "shape") or not hasattr(operator, "__matmul__"):
            raise TypeError(
                "expected an operator with shape, dtype, device and @, or a symmetric tensor; got "
                f"{_kind(operator)}"
            )
        shape = tuple(operator.shape)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise ValueError(f"expected a square operator (D, D), got shape {shape}")
        dtype = getattr(operator, "dtype", None)
        super().__init__(
            int(shape[0]),
            dtype if isinstance(dtype, torch.dtype) else torch.float32,
            torch.device(getattr(operator, "device", None) or "cpu"),
        )
        self._operator = operator
        self.layout = getattr(operator, "layout", None)

    def _description(self) -> dict[str, Any]:
        return {
            "operator": Words(type(getattr(self, "_operator", None)).__name__),
            **super()._description(),
        }

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        # The result has no graph, but a product by a second backward pass has to record one.
        with full_precision(self.device), torch.enable_grad():
            out = self._operator @ vectors_DB
        like = isinstance(out, Tensor) and out.shape == vectors_DB.shape
        if not like or out.dtype != self.dtype or out.device != vectors_DB.device:
            raise ValueError(
                f"expected the operator to return a tensor of shape {tuple(vectors_DB.shape)} and "
                f"dtype {self.dtype} on {vectors_DB.device}, got {_kind(out)}"
            )
        return out.detach()


def as_linear_operator(operator: Any) -> LinearOperator:
    """Return the operator itself, or a symmetric matrix or another library's operator as one.

    Raises:
        TypeError: If it is neither, or an array of a library whose products are no tensors.
        ValueError: If it is not square, finite and symmetric.

    Example:
        >>> A = hesscurv.operators.as_linear_operator(torch.eye(3))
        >>> A.shape
        torch.Size([3, 3])
    """
    if isinstance(operator, LinearOperator):
        return operator
    if isinstance(operator, Tensor):
        sparse = operator.layout != torch.strided and operator.is_floating_point()
        return SparseOperator(operator) if sparse else DenseOperator(operator)
    if isinstance(operator, np.ndarray):
        raise TypeError(
            "expected an operator or a torch.Tensor, got a NumPy array; pass "
            "torch.from_numpy(array)"
        )
    if type(operator).__module__.startswith("scipy.sparse"):
        raise TypeError(
            f"expected an operator or a torch.Tensor, got SciPy's {type(operator).__name__}, which "
            "does not multiply tensors; pass torch.from_numpy(A.toarray()), of a large sparse A "
            "torch.sparse_csr_tensor(A.indptr, A.indices, A.data, A.shape), or subclass "
            "hesscurv.LinearOperator"
        )
    return ForeignOperator(operator)


def as_floating_operator(operator: Any) -> LinearOperator:
    """Return an operator as `as_linear_operator` does, if it is in single or double precision.

    Raises:
        TypeError: If it is no operator, or not float32 or float64.
        ValueError: If it is not square, or a tensor that is not symmetric and finite.
    """
    H = as_linear_operator(operator)
    if H.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"expected a float32 or float64 operator, got {H.dtype}; convert the model or matrix "
            "with .float()"
        )
    return H


def _check_square(matrix: Tensor) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"expected a square matrix (D, D), got {tuple(matrix.shape)}")


def _check_symmetric(largest: float, gap: float, dtype: torch.dtype) -> None:
    """Require a finite matrix A with these max|A| and max|A - A^T| to be symmetric to rounding."""
    if not math.isfinite(largest):
        raise ValueError("expected a finite matrix, got NaN or inf entries")
    if gap > 1e3 * torch.finfo(dtype).eps * largest:
        raise ValueError(
            f"expected a symmetric matrix, got one with max|A - A^T| = {gap:.3g} against "
            f"max|A| = {largest:.3g}; symmetrise it with (A + A.mT) / 2"
        )


def _largest(entries: Tensor) -> float:
    return float(entries.abs().max()) if entries.numel() else 0.0


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype} on {value.device}"
    return f"a {type(value).__name__}"
