"""The range of floating numbers whose squares can be computed with."""

from __future__ import annotations

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
