"""How large a block is, and the copies of small matrices."""

import math

import pytest
import torch

from hesscurv.linalg.block_norms import block_size, column_norms
from hesscurv.linalg.transfers import all_finite, to_device_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_size_of_a_block_is_its_largest_entry_and_its_norms(dtype):
    W_BD = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 2.0]], dtype=dtype)
    size = block_size(W_BD)
    assert size.largest == 4.0
    assert size.norms == [5.0, 2.0]  # exact in any dtype
    assert size.norms == column_norms(W_BD).tolist()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_is_infinitely_large(wrong):
    W_BD = torch.ones(2, 3)
    W_BD[1, 2] = wrong
    assert block_size(W_BD).largest == math.inf
    assert not all_finite(torch.ones(2), W_BD)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_block_has_no_size(shape):
    size = block_size(torch.empty(shape))
    assert size.largest == 0
    assert size.norms == [0.0] * shape[0]
    assert all_finite(torch.empty(shape))


def test_small_matrices_take_the_dtype_of_what_they_are_sent_to():
    small = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert to_device_of(small, small) is small
    assert to_device_of(small, torch.empty(0, dtype=torch.float32)).dtype == torch.float32
