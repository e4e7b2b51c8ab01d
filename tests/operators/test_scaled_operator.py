"""An operator in other units: its products, their rows, and what it counts."""

import torch

from hesscurv.operators.linear_operator import DenseOperator
from hesscurv.operators.scaled_operator import ScaledOperator


def test_products_and_rows_are_scaled_and_counted_once():
    matrix = torch.randn(6, 6, dtype=torch.float64)
    matrix = matrix + matrix.T
    inner = DenseOperator(matrix)
    H = ScaledOperator(inner, 2.0**10)
    V = torch.randn(6, 3, dtype=torch.float64)
    # A power of two scales without rounding.
    expected = (inner @ V) * 2.0**10
    inner.num_matvecs = 0
    assert torch.equal(H @ V, expected)
    assert (H.num_matvecs, inner.num_matvecs) == (3, 3)
    assert torch.equal(H.product_rows(V), expected)
    assert (H.num_matvecs, inner.num_matvecs) == (6, 6)
