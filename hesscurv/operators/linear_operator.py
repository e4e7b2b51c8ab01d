"""A symmetric linear operator known by its products alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesscurv.distributed import Communicator
from hesscurv.interface.descriptions import Words, describe_object, inherit_arguments
from hesscurv.interface.uncompiled import uncompiled
from hesscurv.linalg.precision import full_precision, require_float64
from hesscurv.linalg.transfers import all_finite


class LinearOperator(ABC):
    """A symmetric operator H of size D x D that is applied, never formed.

    Subclasses implement `_matmat` for a block; ``H @ v`` and ``H @ V`` check the operand, count the
    products and call it. SciPy, skerch and curvlinops find the attributes that they look for
    (`shape`, `dtype`, `device`, `@` from both sides, `T`, `to_scipy`).

    Args:
        size: The size D.
        dtype: The dtype of the vectors.
        device: The device of the vectors.

    Attributes:
        num_matvecs: The number of products so far.
        communicator: The ranks that multiply together, each with the same operator or a part of
            it; a single process unless set.
        checks_late: Whether NaN among the vectors is looked for in `_matmat`, not before it.
    """

    checks_late = False

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = torch.Size((size, size))
        self.dtype = dtype
        self.device = torch.device(device)
        require_float64(self.device)
        self.num_matvecs = 0
        self.communicator = Communicator()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass show the arguments that it takes from its base."""
        super().__init_subclass__(**kwargs)
        inherit_arguments(cls)

    def __repr__(self) -> str:
        """Say what it is, how large, and how often it was applied; nothing is computed."""
        return describe_object(self, **self._description())

    def _description(self) -> dict[str, Any]:
        """Return what `repr` says, by name, also of an operator that is not built to its end."""
        shape = getattr(self, "shape", None)
        return {
            "D": Words(f"{shape[0]:,}") if shape else None,
            "dtype": getattr(self, "dtype", None),
            "device": Words(str(getattr(self, "device", None))),
            "num_matvecs": getattr(self, "num_matvecs", 0),
        }

    @abstractmethod
    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        """Apply the operator to the columns of a checked block (D, b)."""

    @uncompiled
    def __matmul__(self, other: Tensor) -> Tensor:
        """Return ``H @ v`` for v (D,) or ``H @ V`` for V (D, b), in H's dtype on H's device.

        Raises:
            TypeError: If the operand is not a tensor or has another dtype.
            ValueError: If its shape or device does not fit, or it has NaN or inf entries.
        """
        self._check(other)
        with torch.inference_mode(False), torch.no_grad():
            other = other.clone() if other.is_inference() else other
            block = other.detach().unsqueeze(1) if other.ndim == 1 else other.detach()
            if block.shape[1] == 0:
                return torch.empty_like(block)
            out = self._matmat(block)
        self.num_matvecs += block.shape[1]
        return out.squeeze(1) if other.ndim == 1 else out

    def product_rows(self, rows_RB: Tensor) -> Tensor:
        """Return this rank's rows of ``H @ V``, given its rows of V; on all ranks at once.

        No rank holds more of the basis that V comes from than its rows, and full vectors only
        during the product. In a single process, all rows: ``H @ V``.

        Args:
            rows_RB: Shape (D_local, B): the rows ``communicator.rows(D)`` of V.

        Returns:
            The same rows of the product, (D_local, B).

        Raises:
            TypeError: If the operand is not a tensor or has another dtype.
            ValueError: If its shape or device does not fit, or it has NaN or inf entries.
            DistributedError: If another rank fails.

        Cost: B products; each rank receives B D entries, and for sums over ranks B D more.
        """
        communicator = self.communicator
        if communicator.size == 1:
            return self @ rows_RB
        dim = self.shape[0]
        with communicator.together("a product of rows") as step:
            self._check_rows(rows_RB)
            step.require_same("number of vectors", rows_RB.shape[1], "pass as many on all ranks")
        full_BD = communicator.gather_rows(rows_RB.detach().mT.contiguous(), dim)
        with communicator.together("a product of rows"):
            start, stop = communicator.rows(dim)
            return (self @ full_BD.mT)[start:stop].clone()

    def __rmatmul__(self, other: Tensor) -> Tensor:
        """Return ``v @ H`` or ``V @ H`` for V (b, D): the operator is symmetric."""
        if isinstance(other, Tensor) and other.ndim == 2:
            return (self @ other.mT).mT
        return self @ other

    def matvec(self, vector: Tensor) -> Tensor:
        """Return ``H @ v``."""
        return self @ vector

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return ``H @ V``."""
        return self @ vectors

    def expect(self, products: int) -> None:  # noqa: B027, there may be nothing to choose
        """Take note that so many products follow; an operator may choose its way by it."""

    def confirm(self) -> None:  # noqa: B027, there may be nothing to compare with
        """Compare the products since `expect` with an independent one, and warn of a gap."""

    @contextmanager
    def solving(self) -> Iterator[None]:
        """Multiply inside for a solver that looks at every product itself, for NaN and inf.

        H is one matrix from the first product inside to the last one: an operator of a model need
        not look at each product whether a value has changed that leaves no other mark.
        """
        yield

    def product_errors(self, vectors_DB: Tensor) -> Tensor | None:
        """Return how far products with these vectors are off, norms (B,), float64 on the CPU.

        None where products are as exact as the dtype.
        """
        return None

    def memory_needed(self, width: int) -> int:
        """Return the bytes on its device that a product of `width` vectors takes, the block aside.

        0 where it is not known.
        """
        return 0

    def settings(self) -> dict[str, Any]:
        """Return, in plain values, what decides the rounding of products beside H itself."""
        return {}

    def adopt(self, settings: dict[str, Any]) -> None:  # noqa: B027, there may be nothing to adopt
        """Compute from here on as the operator did whose `settings` these are."""

    @property
    def T(self) -> LinearOperator:
        """The transpose: the operator itself."""
        return self

    def adjoint(self) -> LinearOperator:
        """Return the adjoint: the operator itself."""
        return self

    def to_dense(self, block_size: int = 64) -> Tensor:
        """Form the matrix (D, D), symmetrised, in D products and D^2 floats; for small D."""
        size = self.shape[0]
        dense = torch.empty(size, size, dtype=self.dtype, device=self.device)
        for start in range(0, size, block_size):
            stop = min(start + block_size, size)
            unit = torch.zeros(size, stop - start, dtype=self.dtype, device=self.device)
            unit[start:stop].fill_diagonal_(1)
            dense[:, start:stop] = self @ unit
        return (dense + dense.mT) / 2

    def to_scipy(self) -> Any:
        """Return a `scipy.sparse.linalg.LinearOperator` over NumPy vectors (needs SciPy).

        Raises:
            ImportError: If SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator
        except ImportError as error:
            raise ImportError("to_scipy needs SciPy: pip install 'hesscurv[bench]'") from error

        def apply(array: Any) -> Any:
            # A copy: SciPy's arrays may be read-only or have negative strides.
            tensor = torch.from_numpy(array.copy()).to(self.device, self.dtype)
            return (self @ tensor).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        return ScipyLinearOperator(
            shape=tuple(self.shape), matvec=apply, rmatvec=apply, matmat=apply, dtype=numpy_dtype
        )

    def _check_rows(self, rows: Any) -> None:
        start, stop = self.communicator.rows(self.shape[0])
        if isinstance(rows, Tensor) and rows.ndim != 2:
            raise ValueError(
                f"expected this rank's rows of a block, ({stop - start}, b), got "
                f"{tuple(rows.shape)}"
            )
        self._check_operand(rows, stop - start)

    def _check(self, other: Any) -> None:
        self._check_operand(other, self.shape[0])

    def _check_operand(self, other: Any, size: int) -> None:
        if not isinstance(other, Tensor):
            raise TypeError(
                f"expected a torch.Tensor of shape ({size},) or ({size}, b), got "
                f"{type(other).__name__}; convert it with torch.as_tensor"
            )
        if other.ndim not in (1, 2) or other.shape[0] != size:
            raise ValueError(
                f"expected shape ({size},) or ({size}, b), got {tuple(other.shape)}; "
                "vectors are columns"
            )
        if other.dtype != self.dtype:
            raise TypeError(
                f"expected dtype {self.dtype}, got {other.dtype}; convert with .to(H.dtype)"
            )
        if other.device.type != self.device.type or (
            None not in (other.device.index, self.device.index)
            and other.device.index != self.device.index
        ):
            raise ValueError(
                f"expected a vector on device {self.device}, got {other.device}; "
                "move it with .to(H.device)"
            )
        if not self.checks_late:
            require_finite(other)


class DenseOperator(LinearOperator):
    """A symmetric matrix as an operator.

    Args:
        matrix: Shape (D, D), floating, symmetric to rounding.

    Raises:
        TypeError: If it is not a floating tensor.
        ValueError: If it is not square, finite and symmetric.
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
        with full_precision(self.device):
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


def require_finite(vectors: Tensor) -> None:
    """Refuse vectors with NaN or inf entries.

    Raises:
        ValueError: If there are any.
    """
    if not all_finite(vectors):
        raise ValueError("expected a finite vector, got NaN or inf entries")


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
