import math
from itertools import pairwise

import pytest
import torch

from hesscurv.linalg.random_matrices import (
    KINDS,
    dct,
    draw_seed,
    inverse_dct,
    make_test_matrix,
    mix_seed,
)

SEEDS = [0, 1, 2**40 + 7]
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_columns_are_bitwise_the_same_however_the_range_is_cut(kind, dtype, seed):
    omega = make_test_matrix(kind, 1001, 12, seed, dtype)
    whole = omega.columns(0, 12)
    assert whole.shape == omega.shape == (1001, 12)
    assert whole.dtype == dtype
    for cut in [(0, 1, 12), (0, 5, 7, 12), tuple(range(13))]:
        parts = [omega.columns(a, b) for a, b in pairwise(cut)]
        assert torch.equal(torch.cat(parts, dim=1), whole)
    again = make_test_matrix(kind, 1001, 12, seed, dtype)
    assert torch.equal(again.columns(11, 12), whole[:, 11:])


@every_kind
def test_the_first_columns_do_not_depend_on_how_many_there_are(kind):
    few, many = (make_test_matrix(kind, 300, n, 3) for n in (10, 200))
    assert torch.equal(few.columns(0, 10), many.columns(0, 10))


@every_kind
def test_other_seeds_give_other_columns_and_no_column_repeats(kind):
    columns = [make_test_matrix(kind, 400, 60, seed).columns(0, 60) for seed in SEEDS]
    together = torch.cat(columns, dim=1) / 20
    cosines = together.mT @ together - torch.eye(180)
    assert cosines.abs().max() < 0.35  # 7 standard deviations of 1/sqrt(400)


@every_kind
def test_each_column_is_contiguous(kind):
    block = make_test_matrix(kind, 50, 8, 0).columns(2, 6)
    assert block.mT.is_contiguous()


@every_kind
def test_the_global_random_state_is_neither_used_nor_changed(kind):
    before = torch.get_rng_state()
    first = make_test_matrix(kind, 64, 4, 5).columns(0, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert torch.equal(make_test_matrix(kind, 64, 4, 5).columns(0, 4), first)


@every_kind
def test_columns_are_isotropic(kind):
    # The mean of omega omega^T over 4000 columns; its entries scatter by 1/sqrt(4000) = 0.016.
    blocks = [make_test_matrix(kind, 8, 8, s, torch.float64).columns(0, 8) for s in range(500)]
    omega = torch.cat(blocks, dim=1)
    torch.testing.assert_close(
        omega @ omega.mT / 4000, torch.eye(8, dtype=torch.float64), rtol=0, atol=0.1
    )
    torch.testing.assert_close(omega.mean(dim=1), torch.zeros(8).double(), rtol=0, atol=0.1)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_product_with_the_transpose_is_that_of_the_columns(kind, dtype):
    omega = make_test_matrix(kind, 6001, 40, 9, dtype)
    V = torch.randn(6001, 7, dtype=dtype)
    result = omega.transpose_matmul(V)
    assert result.dtype == torch.float64
    expected = omega.columns(0, 40).double().mT @ V.double()
    # A few eps of the norms, each about sqrt(6001): rounding of the sums, or of the FFTs.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result, expected, rtol=0, atol=4 * eps * 6001)


def test_rademacher_entries_are_signs():
    omega = make_test_matrix("rademacher", 1000, 5, 0).columns(0, 5)
    assert set(omega.unique().tolist()) == {-1.0, 1.0}


def test_gaussian_entries_have_normal_tails():
    omega = make_test_matrix("gaussian", 100_000, 1, 0, torch.float64).columns(0, 1)
    beyond = (omega.abs() > 2).double().mean().item()
    assert abs(beyond - math.erfc(2 / math.sqrt(2))) < 4 * math.sqrt(0.0455 / 100_000)


@pytest.mark.parametrize("dim", [1, 2, 3, 17, 64, 101])
@pytest.mark.parametrize("seed", SEEDS)
def test_ssrft_columns_are_orthogonal(dim, seed):
    omega = make_test_matrix("ssrft", dim, dim, seed, torch.float64).columns(0, dim)
    torch.testing.assert_close(
        omega.mT @ omega, dim * torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-13 * dim
    )


def test_ssrft_mixes_a_unit_vector_evenly():
    # The largest of 4096 entries of near normal size: sqrt(2 log 4096) = 4.1; 6 is rare.
    omega = make_test_matrix("ssrft", 4096, 8, 0).columns(0, 8)
    assert omega.abs().max() < 6


def test_rademacher_and_ssrft_agree_between_dtypes():
    for kind, tolerance in [("rademacher", 0.0), ("ssrft", 1e-5)]:
        single, double = (
            make_test_matrix(kind, 500, 6, 4, dtype).columns(0, 6)
            for dtype in (torch.float32, torch.float64)
        )
        torch.testing.assert_close(single.double(), double, rtol=0, atol=tolerance)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 17, 100, 101])
def test_the_dct_is_the_orthonormal_one_of_type_two(n):
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    C = torch.cos(math.pi * k * (2 * j + 1) / (2 * n)) * math.sqrt(2 / n)
    C[0] *= math.sqrt(0.5)
    x = torch.randn(3, n, dtype=torch.float64)
    # The cosines' arguments up to 2 pi n / 2 are rounded, hence n eps.
    torch.testing.assert_close(dct(x), x @ C.mT, rtol=0, atol=1e-14 * n)
    torch.testing.assert_close(inverse_dct(x), x @ C, rtol=0, atol=1e-14 * n)
    torch.testing.assert_close(inverse_dct(dct(x)), x, rtol=0, atol=1e-13)


def test_the_dct_of_a_long_float32_vector_keeps_its_norm():
    x = torch.randn(1_000_003)
    assert abs(dct(x).norm() / x.norm() - 1) < 1e-6
    assert (inverse_dct(dct(x)) - x).norm() / x.norm() < 2e-6


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**62 + 3, -5])
def test_streams_of_one_seed_never_meet(seed):
    # 100,000 hashes of 32 bits would meet about once.
    streams = {mix_seed(seed, j) for j in range(-5, 100_000)}
    assert len(streams) == 100_005
    assert min(streams) >= 0
    assert max(streams) < 2**32


def test_neighbouring_seeds_share_no_run_of_streams():
    runs = [[mix_seed(seed, j) for j in range(1000)] for seed in (10, 11, 10 + 2**32)]
    for a in range(3):
        for b in range(a):
            assert len(set(runs[a]) & set(runs[b])) <= 1


def test_a_drawn_seed_depends_on_the_generator_and_moves_it_on():
    generator = torch.Generator().manual_seed(3)
    first, second = draw_seed(generator), draw_seed(generator)
    assert first != second
    assert draw_seed(torch.Generator().manual_seed(3)) == first


@every_kind
def test_bad_arguments_are_refused(kind):
    omega = make_test_matrix(kind, 10, 4, 0)
    for start, stop in [(-1, 2), (3, 2), (0, 5)]:
        with pytest.raises(ValueError, match="expected 0 <= start <= stop <= 4"):
            omega.columns(start, stop)
    with pytest.raises(ValueError, match=r"expected shape \(10, B\), got \(9, 2\)"):
        omega.transpose_matmul(torch.zeros(9, 2))
    with pytest.raises(TypeError, match="expected float32 or float64"):
        make_test_matrix(kind, 10, 4, 0, torch.bfloat16)
    with pytest.raises(ValueError, match="expected D >= 1"):
        make_test_matrix(kind, 0, 0, 0)
    assert omega.columns(2, 2).shape == (10, 0)
    assert omega.transpose_matmul(torch.zeros(10, 0)).shape == (4, 0)


def test_unknown_kinds_and_too_many_orthogonal_columns_are_refused():
    with pytest.raises(ValueError, match="expected a kind of test matrix among"):
        make_test_matrix("fourier", 10, 4, 0)
    with pytest.raises(ValueError, match="at most D=10 orthogonal SSRFT columns, got n=11"):
        make_test_matrix("ssrft", 10, 11, 0)
