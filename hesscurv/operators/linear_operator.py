"""Symmetric linear operators known by their products, and their sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscurv.distributed import Communicator
from hesscurv.interface.descriptions import Words, describe_object, inherit_arguments
from hesscurv.interface.uncompiled import uncompiled
from hesscurv.linalg.precision import require_float64
from hesscurv.linalg.transfers import all_finite

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator


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

    Example:
        >>> class Scaled(hesscurv.LinearOperator):
        ...     def _matmat(self, V):
        ...         return 2.0 * V
        >>> A = Scaled(3, torch.float64, torch.device("cpu"))
        >>> A @ torch.ones(3).double(), A.num_matvecs
        (tensor([2., 2., 2.], dtype=torch.float64), 1)
    """

    checks_late = False

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = torch.Size((size, size))
        self.dtype = dtype
        self.device = torch.device(device)
        require_float64(self.device)
        self.num_matvecs: int = 0
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
        """Apply the operator to the columns of a checked block (D, b).

        Runs in no-grad mode: a product by autograd belongs under `torch.enable_grad`.
        """

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

    # -- algebra ----------------------------------------------------------------------------------

    def __mul__(self, factor: float) -> OperatorSum:
        """Return the operator times a number."""
        if not _is_number(factor):
            return NotImplemented
        terms, shift = self._terms()
        return OperatorSum([(factor * a, H) for a, H in terms], factor * shift)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> OperatorSum:
        """Return the operator divided by a number."""
        return self * (1 / divisor) if _is_number(divisor) else NotImplemented

    def __neg__(self) -> OperatorSum:
        """Return the negative."""
        return self * -1.0

    def __add__(self, other: LinearOperator | float) -> OperatorSum:
        """Return the sum with another operator, or with a number times the identity."""
        terms, shift = self._terms()
        if isinstance(other, LinearOperator):
            more, further = other._terms()
            return OperatorSum(terms + more, shift + further)
        return OperatorSum(terms, shift + other) if _is_number(other) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: LinearOperator | float) -> OperatorSum:
        """Return the difference from another operator, or from a number times the identity."""
        if not (_is_number(other) or isinstance(other, LinearOperator)):
            return NotImplemented
        return self + other * -1.0

    def __rsub__(self, other: float) -> OperatorSum:
        """Return a number times the identity, minus the operator."""
        return self * -1.0 + other if _is_number(other) else NotImplemented

    def _terms(self) -> tuple[list[tuple[float, LinearOperator]], float]:
        """Return factors and operators that add up to this one, and a multiple of the identity."""
        return [(1.0, self)], 0.0

    def matvec(self, vector: Tensor) -> Tensor:
        """Return ``H @ v``."""
        return self @ vector

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return ``H @ V``."""
        return self @ vectors

    def expect(self, products: int) -> None:  # noqa: B027, there may be nothing to choose
        """Announce the number of products to come; an operator may choose its way by it."""

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

    def seconds_per_vector(self, block: int) -> float | None:
        """Return the predicted seconds per vector in blocks of `block`; None where not known."""
        return None

    def settings(self) -> dict[str, Any]:
        """Return, in plain values, what decides the rounding of products beside H itself."""
        return {}

    def adopt(self, settings: dict[str, Any]) -> None:  # noqa: B027, there may be nothing to adopt
        """Compute from here on as the operator did whose `settings` these are."""

    def restrict(self, params: Any) -> LinearOperator:
        """Return the operator on some of the parameters; see `CurvatureOperator.restrict`.

        Raises:
            TypeError: If it has no parameters.
        """
        raise TypeError(
            f"a {type(self).__name__} has no parameters to restrict it to; index its matrix"
        )

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

    def to_scipy(self) -> ScipyLinearOperator:
        """Return a `scipy.sparse.linalg.LinearOperator` over NumPy vectors (needs SciPy).

        Raises:
            ImportError: If SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator as OperatorOfScipy
        except ImportError as error:
            raise ImportError("to_scipy needs SciPy: pip install 'hesscurv[bench]'") from error

        def apply(array: Any) -> Any:
            # A copy: SciPy's arrays may be read-only or have negative strides.
            tensor = torch.from_numpy(array.copy()).to(self.device, self.dtype)
            return (self @ tensor).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        return OperatorOfScipy(
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


class OperatorSum(LinearOperator):
    r"""The operator :math:`\sum_i a_i H_i + \sigma I`.

    Made by arithmetic: ``H + G``, ``H - G``, ``2 * H``, ``H / 3``, ``-H``, ``H - sigma``.

    Args:
        terms: Pairs of a real factor a_i and an operator H_i, one at least, all of one size, dtype,
            device and group of ranks.
        shift: sigma, in the unit of the eigenvalues.

    Raises:
        ValueError: If the operators do not fit.

    Cost: a product takes one with each operator, which counts it as well.

    Example:
        >>> A = hesscurv.operators.DenseOperator(torch.diag(torch.tensor([1.0, 2.0])))
        >>> B = 2 * A - 1.0
        >>> B @ torch.ones(2)
        tensor([1., 3.])
    """

    def __init__(self, terms: list[tuple[float, LinearOperator]], shift: float = 0.0) -> None:
        first = terms[0][1]
        for _, other in terms[1:]:
            for what in ("shape", "dtype", "device"):
                wanted, got = getattr(first, what), getattr(other, what)
                if wanted != got:
                    raise ValueError(
                        f"expected operators of one {what}, got {wanted} and {got}; build both of "
                        "the same parameters, dtype and device"
                    )
            if first.communicator.size != other.communicator.size:
                raise ValueError("expected operators of the same ranks; pass one process_group")
        super().__init__(first.shape[0], first.dtype, first.device)
        self.terms, self.shift = terms, shift
        self.communicator = first.communicator
        self.checks_late = all(H.checks_late for _, H in terms)
        layouts = [getattr(H, "layout", None) for _, H in terms]
        if all(layout == layouts[0] for layout in layouts):
            self.layout = layouts[0]

    def _terms(self) -> tuple[list[tuple[float, LinearOperator]], float]:
        return self.terms, self.shift

    def _description(self) -> dict[str, Any]:
        shift = f" {self.shift:+g} I" if self.shift else ""
        sum_ = " ".join(f"{a:+g} {type(H).__name__}" for a, H in self.terms)
        return {"sum": Words(sum_ + shift), **super()._description()}

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        return self._add_up([H @ vectors_DB for _, H in self.terms], vectors_DB)

    def product_rows(self, rows_RB: Tensor) -> Tensor:
        """Return this rank's rows of the product, given its rows of V; see `LinearOperator`."""
        out_RB = self._add_up([H.product_rows(rows_RB) for _, H in self.terms], rows_RB)
        self.num_matvecs += rows_RB.shape[1]
        return out_RB

    def _add_up(self, products: list[Tensor], vectors: Tensor) -> Tensor:
        out = vectors * self.shift if self.shift else torch.zeros_like(vectors)
        for (factor, _), product in zip(self.terms, products, strict=True):
            out.add_(product, alpha=factor)
        return out

    def restrict(self, params: Any) -> OperatorSum:
        """Return the same sum of operators on some of the parameters; see `CurvatureOperator`."""
        return OperatorSum([(a, H.restrict(params)) for a, H in self.terms], self.shift)

    def expect(self, products: int) -> None:
        """Announce the number of products to come."""
        for _, H in self.terms:
            H.expect(products)

    def confirm(self) -> None:
        """Compare the products since `expect` with independent ones, and warn of a gap."""
        for _, H in self.terms:
            H.confirm()

    @contextmanager
    def solving(self) -> Iterator[None]:
        """Multiply inside for a solver that looks at every product itself."""
        with ExitStack() as stack:
            for _, H in self.terms:
                stack.enter_context(H.solving())
            yield

    def product_errors(self, vectors_DB: Tensor) -> Tensor | None:
        """Return bounds on the norms of the products' errors, (B,); None where they are exact."""
        found = [(abs(a), H.product_errors(vectors_DB)) for a, H in self.terms]
        errors = [a * e for a, e in found if e is not None]
        return sum(errors[1:], errors[0]) if errors else None

    def memory_needed(self, width: int) -> int:
        """Return the bytes that a product of `width` vectors takes: graphs of all are kept."""
        return sum(H.memory_needed(width) for _, H in self.terms)

    def seconds_per_vector(self, block: int) -> float | None:
        """Return the predicted seconds per vector of all operators; see `LinearOperator`."""
        found = [H.seconds_per_vector(block) for _, H in self.terms]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if known else None

    def settings(self) -> dict[str, Any]:
        """Return what decides the rounding of products, of each operator."""
        if len(self.terms) == 1:  # a multiple goes on from the operator's own settings
            return self.terms[0][1].settings()
        return {str(i): H.settings() for i, (_, H) in enumerate(self.terms)}

    def adopt(self, settings: dict[str, Any]) -> None:
        """Compute from here on as the operators did whose `settings` these are."""
        for i, (_, H) in enumerate(self.terms):
            H.adopt(settings if len(self.terms) == 1 else settings[str(i)])


def require_finite(vectors: Tensor) -> None:
    """Refuse vectors with NaN or inf entries.

    Raises:
        ValueError: If there are any.
    """
    if not all_finite(vectors):
        raise ValueError("expected a finite vector, got NaN or inf entries")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
