"""Operators whose entries are so small or large that squares of them leave the floating range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hesscurv.operators.linear_operator import LinearOperator

# Norms of products with unit vectors for which all squares and their sums stay in float64's range.
SAFE_RANGE = (2.0**-480, 2.0**480)
# One factor for each end, so that a solve that goes on later is in the same units.
_FACTOR = 2.0**600


class RangeError(ValueError):
    """The first products are so small or large that norms underflow or overflow.

    Args:
        message: What was found, with the remedy.
        factor: What brings H into the range, a power of two.
    """

    def __init__(self, message: str, factor: float) -> None:
        super().__init__(message)
        self.factor = factor


def require_range(largest: float) -> None:
    """Require that squares of a product's entries can be computed with.

    Args:
        largest: The largest magnitude of its entries; finite, 0 for the zero operator.

    Raises:
        RangeError: If they underflow or overflow.
    """
    if largest == 0 or SAFE_RANGE[0] < largest < SAFE_RANGE[1]:
        return
    factor = _FACTOR if largest < 1 else 1 / _FACTOR
    raise RangeError(
        f"the products with the operator are of size {largest:.2g}, whose square is not in the "
        f"range of float64; multiply the operator (the loss) by {factor:.3g} = "
        f"2^{600 if largest < 1 else -600}, and divide its eigenvalues by that",
        factor,
    )


class ScaledOperator(LinearOperator):
    """``factor * H``, with all that H knows beside.

    Args:
        operator: H.
        factor: A power of two, so that products are scaled without rounding.
    """

    def __init__(self, operator: LinearOperator, factor: float) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self.operator, self.factor = operator, factor
        self.communicator = operator.communicator

    def __getattr__(self, name: str) -> Any:
        """Return what H has beyond a plain operator: its layout, its calibration."""
        if name in ("operator", "__setstate__"):  # while it is being built or copied
            raise AttributeError(name)
        return getattr(self.operator, name)

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        return (self.operator @ vectors_DB) * self.factor

    def product_rows(self, rows_RB: Tensor) -> Tensor:
        """Return this rank's rows of the product, given its rows of V."""
        out_RB = self.operator.product_rows(rows_RB) * self.factor
        self.num_matvecs += rows_RB.shape[1]
        return out_RB

    def expect(self, products: int) -> None:
        """Take note that so many products follow."""
        self.operator.expect(products)

    def confirm(self) -> None:
        """Compare the products since `expect` with an independent one."""
        self.operator.confirm()

    @contextmanager
    def solving(self) -> Iterator[None]:
        """Multiply inside for a solver that looks at every product itself."""
        with self.operator.solving():
            yield

    def memory_needed(self, width: int) -> int:
        """Return the bytes that a product of `width` vectors takes."""
        return self.operator.memory_needed(width)

    def settings(self) -> dict[str, Any]:
        """Return what decides the rounding of products beside H itself."""
        return self.operator.settings()

    def adopt(self, settings: dict[str, Any]) -> None:
        """Compute from here on as the operator did whose `settings` these are."""
        self.operator.adopt(settings)
