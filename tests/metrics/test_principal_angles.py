import math

import pytest
import torch

from hesscurv.metrics import principal_angles

SEEDS = [0, 1, 2]
# Bases are orthonormal to some 1e-15, and so are angles computed in all digits from them.
FULL = {"rtol": 0, "atol": 2e-14}


@pytest.mark.parametrize("seed", SEEDS)
def test_angles_of_planes_built_from_them_come_back_sorted(bases_at_angles, seed):
    a, b = bases_at_angles([1.2, 0.3, math.pi / 2, 0.0, 0.9], dim=23, seed=seed)
    expected = torch.tensor([0.0, 0.3, 0.9, 1.2, math.pi / 2], dtype=torch.float64)
    torch.testing.assert_close(principal_angles(a, b), expected, **FULL)


def test_angles_of_two_planes_in_four_dimensions_are_the_closed_form():
    s, c = math.sin(0.4), math.cos(0.4)
    a = torch.eye(4, dtype=torch.float64)[:, :2]
    b = torch.tensor([[c, 0], [0, 0.6], [s, 0], [0, 0.8]], dtype=torch.float64)
    expected = torch.tensor([0.4, math.acos(0.6)], dtype=torch.float64)
    torch.testing.assert_close(principal_angles(a, b), expected, **FULL)


@pytest.mark.parametrize("seed", SEEDS)
def test_tiny_angles_are_right_in_absolute_precision(bases_at_angles, seed):
    # arccos of a float64 cosine cannot tell angles below 1e-8 from 0.
    expected = torch.tensor([0.0, 1e-12, 1e-9, 3e-9, 1e-7, 1e-4, 1.0, 1.5], dtype=torch.float64)
    a, b = bases_at_angles(expected, dim=40, seed=seed)
    torch.testing.assert_close(principal_angles(a, b), expected, rtol=0, atol=5e-15)


@pytest.mark.parametrize("seed", SEEDS)
def test_nearly_orthogonal_directions_are_right_in_absolute_precision(bases_at_angles, seed):
    expected = math.pi / 2 - torch.tensor([0.5, 1e-7, 1e-9, 0.0], dtype=torch.float64)
    a, b = bases_at_angles(expected, dim=19, seed=seed)
    torch.testing.assert_close(principal_angles(a, b), expected, rtol=0, atol=5e-15)


def test_angles_around_45_degrees_join_without_a_seam(bases_at_angles):
    expected = math.pi / 4 + torch.linspace(-1e-6, 1e-6, 9, dtype=torch.float64)
    a, b = bases_at_angles(expected, dim=31)
    torch.testing.assert_close(principal_angles(a, b), expected, **FULL)


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_spaces_have_zero_angles_in_any_basis(random_basis, seed):
    a = random_basis(50, 7, seed)
    rotated = a @ random_basis(7, 7, seed + 10)
    torch.testing.assert_close(
        principal_angles(a, rotated), torch.zeros(7, dtype=torch.float64), **FULL
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_angles_are_invariant_under_rotation_of_bases_and_of_the_space(random_basis, seed):
    a, b = random_basis(30, 4, seed), random_basis(30, 6, seed + 10)
    expected = principal_angles(a, b)
    torch.testing.assert_close(
        principal_angles(a @ random_basis(4, 4, 5), b @ random_basis(6, 6, 6)), expected, **FULL
    )
    whole = random_basis(30, 30, 7)
    torch.testing.assert_close(principal_angles(whole @ a, whole @ b), expected, **FULL)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(3, 3), (2, 5), (5, 2), (1, 9), (9, 9)])
def test_angles_are_symmetric_and_as_many_as_the_smaller_rank(random_basis, rank_a, rank_b):
    a, b = random_basis(9, rank_a, 1), random_basis(9, rank_b, 2)
    angles = principal_angles(a, b)
    assert angles.shape == (min(rank_a, rank_b),)
    assert angles.dtype == torch.float64
    torch.testing.assert_close(principal_angles(b, a), angles, **FULL)


def test_a_contained_space_of_lower_rank_has_zero_angles(random_basis):
    a = random_basis(20, 6)
    inside = a @ random_basis(6, 2, 3)
    torch.testing.assert_close(
        principal_angles(a, inside), torch.zeros(2, dtype=torch.float64), **FULL
    )


@pytest.mark.parametrize("num_kept", [1, 2, 5, 12, 29, 30])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_mask_has_the_angles_of_its_coordinate_axes(
    random_basis, mask_of, one_hot, num_kept, seed
):
    basis = random_basis(30, 5, seed)
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of(30, torch.randperm(30, generator=generator)[:num_kept])
    expected = principal_angles(one_hot(mask), basis)
    torch.testing.assert_close(principal_angles(mask, basis), expected, **FULL)
    torch.testing.assert_close(principal_angles(basis, mask), expected, **FULL)


@pytest.mark.parametrize("swap", [False, True])
def test_tiny_angles_against_a_mask_are_right_in_absolute_precision(mask_of, swap):
    # Axes 0, 1, 2 tilted into 3, 4, 5.
    expected = torch.tensor([1e-11, 1e-9, 0.2], dtype=torch.float64)
    basis = torch.cat([expected.cos().diag(), expected.sin().diag(), torch.zeros(3, 3)]).double()
    mask = mask_of(9, [0, 1, 2])
    angles = principal_angles(basis, mask) if swap else principal_angles(mask, basis)
    torch.testing.assert_close(angles, expected, rtol=1e-14, atol=0)


def test_angles_of_two_masks_are_zero_on_the_shared_and_right_on_the_others(mask_of):
    angles = principal_angles(mask_of(8, [0, 1, 2, 3]), mask_of(8, [2, 3, 7]))
    assert angles.tolist() == [0.0, 0.0, math.pi / 2]


@pytest.mark.parametrize("ranks", [(4, 4), (3, 6)])
@pytest.mark.usefixtures("in_small_blocks")
def test_blocks_of_rows_do_not_change_the_angles(random_basis, mask_of, one_hot, ranks):
    a, b = random_basis(101, ranks[0], 1), random_basis(101, ranks[1], 2)
    b[:, 0] = a[:, 0]  # one small angle, so that the sines take part
    b = torch.linalg.qr(b).Q
    expected = torch.linalg.svdvals(a.mT @ b).clamp(max=1)
    torch.testing.assert_close(principal_angles(a, b).cos(), expected, **FULL)
    for kept in (range(2), range(80)):
        mask = mask_of(101, list(kept))
        expected = torch.linalg.svdvals(one_hot(mask).mT @ b).clamp(max=1)
        torch.testing.assert_close(principal_angles(mask, b).cos(), expected, **FULL)


@pytest.mark.parametrize("seed", SEEDS)
def test_float32_bases_give_angles_to_float32_precision(bases_at_angles, seed):
    expected = torch.tensor([1e-5, 1e-3, 0.5, 1.3], dtype=torch.float64)
    a, b = bases_at_angles(expected, dim=500, seed=seed)
    # 2e-6 is some tens of float32 eps, from rounding the bases; arccos alone gives 3e-4.
    angles = principal_angles(a.float(), b.float())
    assert angles.dtype == torch.float64
    torch.testing.assert_close(angles, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(principal_angles(a.float(), b), expected, rtol=0, atol=2e-6)


def test_masks_of_millions_of_entries_need_no_matrix():
    # As one-hot matrices these two would take 16 TB.
    position = torch.arange(2_000_000)
    angles = principal_angles(position % 2 == 0, position % 4 < 2)
    assert angles.count_nonzero() == 500_000


def test_autocast_does_not_lower_the_precision(bases_at_angles):
    a, b = (basis.float() for basis in bases_at_angles([1e-3, 0.7], dim=100))
    expected = principal_angles(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(principal_angles(a, b), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bases_on_a_gpu_stay_there_and_masks_follow(random_basis, mask_of):
    a, b = random_basis(200, 5, 1), random_basis(200, 5, 2)
    mask = mask_of(200, list(range(100)))
    for left, right in [(a, b), (mask, b), (a, mask)]:
        angles = principal_angles(
            *(x.cuda() if x.is_floating_point() else x for x in (left, right))
        )
        assert angles.device.type == "cuda"
        torch.testing.assert_close(angles.cpu(), principal_angles(left, right), **FULL)
