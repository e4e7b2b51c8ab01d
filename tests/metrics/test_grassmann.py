import math

import pytest
import torch

import hesscurv.metrics as metrics
from hesscurv.metrics import grassmann_distances, intersection_over_union, overlap

SEEDS = [0, 1, 2]
NAMES = ["geodesic", "chordal_2", "chordal_f", "projection_2", "projection_f", "fubini_study"]
# A few eps of float64 times sqrt(k).
TIGHT = 1e-13


def test_distances_at_known_angles_are_the_closed_forms(bases_at_angles):
    a, b = bases_at_angles([0.2, 0.7, 1.1], dim=12)
    expected = {
        "geodesic": math.sqrt(0.2**2 + 0.7**2 + 1.1**2),
        "chordal_2": 2 * math.sin(0.55),
        "chordal_f": 2 * math.hypot(math.sin(0.1), math.sin(0.35), math.sin(0.55)),
        "projection_2": math.sin(1.1),
        "projection_f": math.hypot(math.sin(0.2), math.sin(0.7), math.sin(1.1)),
        "fubini_study": math.acos(math.cos(0.2) * math.cos(0.7) * math.cos(1.1)),
    }
    assert grassmann_distances(a, b) == pytest.approx(expected, abs=TIGHT)
    cosines = math.cos(0.2) ** 2 + math.cos(0.7) ** 2 + math.cos(1.1) ** 2
    assert overlap(a, b) == pytest.approx(cosines / 3, abs=TIGHT)


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_spaces_have_distance_0_and_overlap_1(random_basis, seed):
    a = random_basis(40, 6, seed)
    rotated = a @ random_basis(6, 6, seed + 10)
    assert grassmann_distances(a, rotated) == pytest.approx(dict.fromkeys(NAMES, 0), abs=TIGHT)
    assert overlap(a, rotated) == pytest.approx(1, abs=TIGHT)


@pytest.mark.parametrize("seed", SEEDS)
def test_orthogonal_spaces_have_the_largest_distance_and_overlap_0(random_basis, maxima, seed):
    frame = random_basis(40, 12, seed)
    a, b = frame[:, :6], frame[:, 6:]
    assert grassmann_distances(a, b) == pytest.approx(maxima(6), abs=TIGHT)
    ones = dict.fromkeys(NAMES, 1.0)
    assert grassmann_distances(a, b, normalized=True) == pytest.approx(ones, abs=TIGHT)
    assert overlap(a, b) == pytest.approx(0, abs=TIGHT)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_distance_is_its_entry_among_all_distances(random_basis, maxima, name, normalized):
    a, b = random_basis(15, 4, 1), random_basis(15, 4, 2)
    value = getattr(metrics, f"{name}_distance")(a, b, normalized=normalized)
    assert value == grassmann_distances(a, b, normalized=normalized)[name]
    unit = maxima(4)[name] if normalized else 1.0
    assert value * unit == pytest.approx(grassmann_distances(a, b)[name], rel=TIGHT)


@pytest.mark.parametrize("seed", SEEDS)
def test_projection_distances_are_norms_of_the_difference_of_projectors(random_basis, seed):
    a, b = random_basis(20, 5, seed), random_basis(20, 5, seed + 10)
    difference = a @ a.mT - b @ b.mT
    distances = grassmann_distances(a, b)
    assert distances["projection_f"] == pytest.approx(
        float(difference.norm()) / math.sqrt(2), abs=TIGHT
    )
    assert distances["projection_2"] == pytest.approx(
        float(torch.linalg.matrix_norm(difference, 2)), abs=TIGHT
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_chordal_f_distance_is_the_procrustes_distance_of_bases(random_basis, seed):
    a, b = random_basis(20, 5, seed), random_basis(20, 5, seed + 10)
    left, _, right = torch.linalg.svd(a.mT @ b)
    expected = float((a @ left - b @ right.mT).norm())
    assert grassmann_distances(a, b)["chordal_f"] == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize("seed", SEEDS)
def test_fubini_study_distance_is_the_angle_of_the_determinant(random_basis, seed):
    a, b = random_basis(8, 3, seed), random_basis(8, 3, seed + 10)
    expected = math.acos(abs(float(torch.linalg.det(a.mT @ b))))
    assert grassmann_distances(a, b)["fubini_study"] == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5])
def test_small_distances_keep_their_digits(bases_at_angles, angle):
    a, b = bases_at_angles([angle, angle], dim=11)
    distances = grassmann_distances(a, b)
    for name in ("geodesic", "chordal_f", "projection_f", "fubini_study"):
        # To leading order; 5e-15 from rounding the bases, 1e-10 from the next order.
        expected = angle * math.sqrt(2)
        assert distances[name] == pytest.approx(expected, rel=1e-10, abs=5e-15), name


@pytest.mark.parametrize("seed", SEEDS)
def test_overlap_is_1_minus_squared_projection_f_distance_over_k(random_basis, seed):
    a, b = random_basis(25, 6, seed), random_basis(25, 6, seed + 10)
    distance = metrics.projection_f_distance(a, b)
    assert overlap(a, b) == pytest.approx(1 - distance**2 / 6, abs=TIGHT)


@pytest.mark.parametrize("shared", [0, 1, 3, 5])
def test_overlap_of_equal_masks_gives_their_intersection_over_union(mask_of, shared):
    a, b = mask_of(20, range(5)), mask_of(20, range(5 - shared, 10 - shared))
    value = overlap(a, b)
    assert value == shared / 5
    assert intersection_over_union(a, b) == pytest.approx(value / (2 - value), rel=TIGHT)


@pytest.mark.parametrize("seed", SEEDS)
def test_overlap_of_mask_and_basis_is_the_mean_leverage_over_the_mask(random_basis, mask_of, seed):
    basis, mask = random_basis(30, 6, seed), mask_of(30, [0, 3, 4, 11, 20, 29])
    expected = float(basis[mask].square().sum(1).mean())
    assert overlap(mask, basis) == pytest.approx(expected, rel=TIGHT)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(4, 4), (2, 6), (1, 9)])
def test_overlap_is_the_cosine_between_projectors_at_any_ranks(random_basis, rank_a, rank_b):
    a, b = random_basis(12, rank_a, 1), random_basis(12, rank_b, 2)
    P, Q = a @ a.mT, b @ b.mT
    expected = float((P * Q).sum() / (P.norm() * Q.norm()))
    assert overlap(a, b) == pytest.approx(expected, abs=TIGHT)
    assert overlap(b, a) == pytest.approx(expected, abs=TIGHT)


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_mask_basis_and_eigenpairs_are_interchangeable(
    random_basis, mask_of, one_hot, as_pairs, rank
):
    basis, mask = random_basis(15, rank, 1), mask_of(15, [1, 2, 5, 14])
    expected = overlap(one_hot(mask), basis)
    for left, right in [(mask, basis), (basis, mask), (mask, as_pairs(basis))]:
        assert overlap(left, right) == pytest.approx(expected, abs=TIGHT)
    other = random_basis(15, 3, 2)
    assert overlap(as_pairs(basis), other) == overlap(basis, as_pairs(other))


@pytest.mark.parametrize("seed", SEEDS)
def test_all_metrics_are_symmetric_and_invariant_under_orthogonal_maps(random_basis, seed):
    a, b, whole = (random_basis(18, k, seed + i) for i, k in enumerate([4, 4, 18]))
    expected = grassmann_distances(a, b)
    for left, right in [(b, a), (whole @ a, whole @ b), (a @ random_basis(4, 4, 9), b)]:
        assert grassmann_distances(left, right) == pytest.approx(expected, abs=TIGHT)
        assert overlap(left, right) == pytest.approx(overlap(a, b), abs=TIGHT)


@pytest.mark.parametrize("seed", SEEDS)
def test_distances_obey_the_triangle_inequality(random_basis, seed):
    spaces = [random_basis(8, 3, 100 * seed + i) for i in range(5)]
    distance = [[grassmann_distances(x, y) for y in spaces] for x in spaces]
    for name in NAMES:
        for i in range(5):
            for j in range(5):
                for m in range(5):
                    direct = distance[i][j][name]
                    assert direct <= distance[i][m][name] + distance[m][j][name] + TIGHT


@pytest.mark.parametrize("seed", SEEDS)
def test_random_spaces_at_a_fifth_of_the_dimension_give_the_published_baseline(random_basis, seed):
    a, b = random_basis(500, 100, seed), random_basis(500, 100, seed + 10)
    distances = grassmann_distances(a, b, normalized=True)
    # Published to three digits, as limits for large D; 0.003 covers both roundings and D = 500.
    assert distances["geodesic"] == pytest.approx(0.755, abs=3e-3)
    assert distances["chordal_f"] == pytest.approx(0.782, abs=3e-3)
    assert distances["projection_f"] == pytest.approx(0.894, abs=3e-3)
    for saturated in ("chordal_2", "projection_2", "fubini_study"):
        assert distances[saturated] > 0.98
    assert overlap(a, b) == pytest.approx(0.2, abs=5e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_float32_overlap_agrees_with_float64_at_many_rows(random_basis, mask_of, seed):
    a, b = random_basis(40_000, 4, seed), random_basis(40_000, 4, seed + 10)
    b = torch.linalg.qr(a + 0.001 * b).Q
    # Rounding to float32 moves the overlap by some of its eps, 6e-8.
    expected = overlap(a, b)
    for left, right in [(a.float(), b.float()), (a.float(), b), (a, b.float())]:
        assert overlap(left, right) == pytest.approx(expected, rel=1e-6)
    mask = mask_of(40_000, range(20_000))
    assert overlap(mask, a.float()) == pytest.approx(overlap(mask, a), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_give_the_overlap_to_their_precision(random_basis, mask_of, dtype):
    a, b, mask = random_basis(400, 5, 1), random_basis(400, 5, 2), mask_of(400, range(200))
    # bfloat16 keeps 8 bits: 4e-3 per entry, less for sums of many.
    assert overlap(a.to(dtype), a) == pytest.approx(1, abs=4e-3)
    assert overlap(mask, a.to(dtype)) == pytest.approx(overlap(mask, a), abs=4e-3)
    assert overlap(a.to(dtype), b.to(dtype)) == pytest.approx(overlap(a, b), abs=4e-3)


@pytest.mark.usefixtures("in_small_blocks")
def test_blocks_of_rows_do_not_change_the_overlap(random_basis, mask_of):
    a, b = random_basis(101, 3, 1), random_basis(101, 7, 2)
    mask = mask_of(101, range(64))
    assert overlap(a, b) == pytest.approx(float((a.mT @ b).square().sum()) / math.sqrt(21))
    assert overlap(mask, b) == pytest.approx(float(b[mask].square().sum()) / math.sqrt(7 * 64))


def test_transposed_storage_gives_the_same_overlap(random_basis):
    a, b = random_basis(101, 3, 1), random_basis(101, 3, 2)
    assert overlap(a.mT.contiguous().mT, b) == pytest.approx(overlap(a, b), rel=TIGHT)


def test_autocast_does_not_lower_the_precision_of_the_overlap(random_basis):
    a, b = random_basis(300, 5, 1, torch.float32), random_basis(300, 5, 2, torch.float32)
    expected = overlap(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert overlap(a, b) == expected


def test_inputs_are_left_as_they_were(random_basis, mask_of, as_pairs):
    a, b, mask = random_basis(30, 4, 1), random_basis(30, 4, 2), mask_of(30, range(4))
    copies = [x.clone() for x in (a, b, mask)]
    a.requires_grad_()
    state = torch.get_rng_state()
    for left, right in [(a, b), (mask, b), (a, mask), (as_pairs(a), b), (mask, mask)]:
        grassmann_distances(left, right)
        overlap(left, right)
    for x, copy in zip((a, b, mask), copies, strict=True):
        assert torch.equal(x, copy)
    assert a.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_distances_refuse_different_ranks_and_name_what_works(random_basis, name):
    with pytest.raises(ValueError, match=r"equal rank, got ranks 2 and 3.*overlap or principal"):
        getattr(metrics, f"{name}_distance")(random_basis(9, 2), random_basis(9, 3))
