"""Basis: vectors in slabs behave as one matrix, and the memory ends at the wanted number."""

import pytest
import torch

from hesscurv.eigensolvers.krylov.basis import Basis
from hesscurv.storage.placement import Placement


def filled(sizes=(2, 3, 4), first=3, grow=2, capacity=12, dim=5000):
    g = torch.Generator().manual_seed(0)
    place = Placement("device", torch.float64, torch.device("cpu"), capacity, dim)
    basis = Basis(place, first, grow, torch.float64)
    blocks = [torch.randn(n, dim, generator=g, dtype=torch.float64) for n in sizes]
    for block in blocks:
        basis.append(block)
    return basis, torch.cat(blocks)


@pytest.mark.parametrize("grow", [1, 2, 20])
@pytest.mark.parametrize("first", [1, 3, 12])
def test_appended_vectors_come_back_in_order(first, grow):
    basis, rows = filled(first=first, grow=grow)
    assert torch.equal(torch.cat(basis.slabs()), rows)
    assert torch.equal(torch.cat(basis.slabs(2, 7)), rows[2:7])
    assert basis.slabs(4, 4) == []


@pytest.mark.parametrize(("start", "stop", "k"), [(0, 9, 9), (0, 9, 4), (2, 7, 5), (2, 7, 2)])
def test_rotation_in_place_is_the_product_and_the_rest_moves_up(start, stop, k):
    basis, rows = filled()
    Y = torch.randn(stop - start, k, dtype=torch.float64)
    basis.rotate_(start, stop, Y)
    expected = torch.cat([rows[:start], Y.mT @ rows[start:stop], rows[stop:]])
    torch.testing.assert_close(torch.cat(basis.slabs()), expected)
    assert basis.size == len(expected)


def test_memory_is_taken_as_the_basis_grows_and_given_back_at_the_end():
    basis, rows = filled(sizes=(2,), first=3, grow=2)
    assert sum(len(s) for s in basis._slabs) == 3
    basis.append(rows)
    assert sum(len(s) for s in basis._slabs) == 5
    kept = basis.shrink()
    assert kept.untyped_storage().nbytes() == 3 * 5000 * 8
    assert torch.equal(kept, torch.cat([rows, rows[:1]]))


def test_more_vectors_than_the_capacity_are_refused():
    basis, _ = filled(capacity=9)
    with pytest.raises(ValueError, match="at most 9 vectors, got 9 \\+ 1"):
        basis.append(torch.zeros(1, 5000, dtype=torch.float64))


def test_coefficients_of_another_size_are_refused():
    basis, _ = filled()
    with pytest.raises(ValueError, match=r"coefficients \(4, k\)"):
        basis.rotate_(0, 4, torch.zeros(5, 2, dtype=torch.float64))
