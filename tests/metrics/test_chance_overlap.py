import math

import pytest
import torch

from hesscurv.metrics import (
    chance_overlap,
    leverage_scores,
    overlap,
    overlap_z_score,
    random_mask,
)

SEEDS = [0, 1, 2]
NUM_SAMPLES = 20_000


def assert_samples_fit(samples, chance):
    # The mean of n samples has standard error std / sqrt(n): 5 of them.
    assert abs(float(samples.mean()) - chance.mean) < 5 * chance.std / math.sqrt(len(samples))
    # The standard deviation of n near-normal samples is right to 1 / sqrt(2 n) = 0.5 %; heavier
    # tails at small D double that: 5 %.
    assert float(samples.std()) == pytest.approx(chance.std, rel=0.05)


@pytest.mark.parametrize(("k", "k2", "D"), [(1, 1, 2), (3, 3, 12), (2, 5, 9), (6, 4, 8)])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_spaces_have_the_predicted_mean_and_deviation(mask_of, k, k2, D, seed):
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(NUM_SAMPLES, D, k2, generator=generator, dtype=torch.float64)
    bases = torch.linalg.qr(gaussian).Q
    chance = chance_overlap(k, D, k2=k2)
    against_mask = bases[:, :k].square().sum((1, 2)) / math.sqrt(k * k2)
    assert_samples_fit(against_mask, chance)
    fixed = torch.linalg.qr(torch.randn(D, k, generator=generator, dtype=torch.float64)).Q
    assert_samples_fit((fixed.mT @ bases).square().sum((1, 2)) / math.sqrt(k * k2), chance)
    # The formula above is the library's.
    assert float(against_mask[0]) == pytest.approx(overlap(mask_of(D, range(k)), bases[0]))


@pytest.mark.parametrize(("k", "k2", "D"), [(3, 3, 12), (2, 5, 9), (6, 4, 8)])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_masks_have_the_predicted_mean_and_deviation(k, k2, D, seed):
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(NUM_SAMPLES, D, generator=generator).argsort(1)
    samples = (ranks[:, :k2] < k).sum(1).double() / math.sqrt(k * k2)
    assert_samples_fit(samples, chance_overlap(k, D, k2=k2, against="random_mask"))


def test_random_masks_follow_the_hypergeometric_distribution_exactly():
    k, k2, D = 4, 3, 10
    weights = [math.comb(k, m) * math.comb(D - k, k2 - m) for m in range(k2 + 1)]
    values = [m / math.sqrt(k * k2) for m in range(k2 + 1)]
    total = math.comb(D, k2)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    square = sum(w * v * v for w, v in zip(weights, values, strict=True)) / total
    chance = chance_overlap(k, D, k2=k2, against="random_mask")
    assert chance.mean == pytest.approx(mean)
    assert chance.std == pytest.approx(math.sqrt(square - mean**2))


def test_one_random_direction_has_the_moments_of_a_beta_variable():
    # A squared coordinate of a random unit vector: Beta(1/2, (D - 1)/2).
    D = 7
    a, b = 0.5, (D - 1) / 2
    mean, std = chance_overlap(1, D)
    assert mean == pytest.approx(a / (a + b))
    assert std == pytest.approx(math.sqrt(a * b / (a + b + 1)) / (a + b))


def test_chance_is_symmetric_in_the_ranks_and_k2_defaults_to_k():
    for against in ("random_space", "random_mask"):
        assert chance_overlap(3, 20, k2=5, against=against) == pytest.approx(
            chance_overlap(5, 20, k2=3, against=against)
        )
        assert chance_overlap(3, 20, against=against) == chance_overlap(
            3, 20, k2=3, against=against
        )


def test_complementary_spaces_vary_as_the_spaces_do():
    # tr P Q and tr (I - P) Q differ by a constant: the same variance before normalising.
    one, other = chance_overlap(3, 20, k2=5), chance_overlap(17, 20, k2=5)
    assert one.std * math.sqrt(3) == pytest.approx(other.std * math.sqrt(17))


@pytest.mark.parametrize("against", ["random_space", "random_mask"])
def test_the_whole_space_always_overlaps_alike(against):
    assert chance_overlap(8, 8, against=against) == (1, 0)
    assert chance_overlap(1, 1, against=against) == (1, 0)
    assert chance_overlap(8, 8, k2=2, against=against) == (0.5, 0)


def test_published_chance_levels_are_reproduced():
    # The three nets of the paper, to the digits printed there.
    assert chance_overlap(355, 7030).mean == pytest.approx(0.0505, abs=5e-5)
    assert chance_overlap(1000, 895_210).mean == pytest.approx(0.00112, abs=5e-6)
    assert chance_overlap(1500, 11_689_512).mean == pytest.approx(0.000128, abs=5e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_z_score_counts_deviations_above_the_mean(random_basis, mask_of, as_pairs, seed):
    basis, mask = random_basis(30, 4, seed), mask_of(30, range(6))
    mean, std = chance_overlap(6, 30, k2=4)
    expected = (overlap(mask, basis) - mean) / std
    assert overlap_z_score(mask, basis) == pytest.approx(expected)
    assert overlap_z_score(as_pairs(basis), mask) == pytest.approx(expected)
    other = random_basis(30, 6, seed + 10)
    assert overlap_z_score(basis, other) == pytest.approx((overlap(basis, other) - mean) / std)


@pytest.mark.parametrize("seed", SEEDS)
def test_z_score_against_random_masks_is_standardised_for_any_space(random_basis, seed):
    # A space that lies along few coordinates: random masks vary more than the ranks alone say.
    basis = random_basis(12, 3, seed)
    basis[4:] *= 0.2
    basis = torch.linalg.qr(basis).Q
    generator = torch.Generator().manual_seed(seed)
    masks = [random_mask(12, 5, generator) for _ in range(1000)]
    scores = torch.tensor([overlap_z_score(mask, basis, against="random_mask") for mask in masks])
    # Mean 0 with standard error 0.032, deviation 1 to 2.2 %: 5 of each.
    assert abs(float(scores.mean())) < 0.16
    assert float(scores.std()) == pytest.approx(1, abs=0.11)
    narrow = [overlap_z_score(mask, basis) for mask in masks[:100]]
    assert float(torch.tensor(narrow).std()) > 1.3


def test_z_score_against_random_masks_is_exact_over_all_masks(random_basis):
    basis = random_basis(8, 2)
    masks = [
        torch.tensor([(code >> i) & 1 == 1 for i in range(8)])
        for code in range(256)
        if code.bit_count() == 3
    ]
    scores = torch.tensor(
        [overlap_z_score(basis, mask, against="random_mask") for mask in masks],
        dtype=torch.float64,
    )
    assert float(scores.mean()) == pytest.approx(0, abs=1e-12)
    assert float(scores.square().mean()) == pytest.approx(1, abs=1e-12)


def test_z_score_of_two_masks_is_the_hypergeometric_one(mask_of, one_hot):
    a, b = mask_of(12, range(4)), mask_of(12, range(2, 8))
    mean, std = chance_overlap(4, 12, k2=6, against="random_mask")
    expected = (overlap(a, b) - mean) / std
    assert overlap_z_score(a, b, against="random_mask") == pytest.approx(expected)
    # The mask as a basis of coordinate axes is the same space.
    assert overlap_z_score(a, one_hot(b), against="random_mask") == pytest.approx(expected)
    assert float(leverage_scores(one_hot(b)).sum()) == 6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: chance_overlap(0, 5), ValueError, r"1 <= k <= 5 \(D\), got k=0"),
        (lambda: chance_overlap(5, 0), ValueError, r"got D=0"),
        (lambda: chance_overlap(2, 5, k2=6), ValueError, r"1 <= k2 <= 5 \(D\), got k2=6"),
        (lambda: chance_overlap(0.5, 5), TypeError, r"expected k to be an integer, got 0.5"),
        (lambda: chance_overlap(1, 5, against="mask"), ValueError, r"'random_mask', got 'mask'"),
        (
            lambda: overlap_z_score(torch.eye(4), torch.ones(4) > 0),
            ValueError,
            r"got ranks 4 and 4 in D=4 with the overlap always at 1",
        ),
        (
            lambda: overlap_z_score(torch.eye(4), torch.eye(4), against="x"),
            ValueError,
            r"got 'x'",
        ),
        (
            lambda: overlap_z_score(torch.eye(4), torch.eye(4), against="random_mask"),
            ValueError,
            r"expected a mask.*got two bases; use against='random_space'",
        ),
        (
            lambda: overlap_z_score(
                torch.ones(4, 1) / 2, torch.arange(4) < 2, against="random_mask"
            ),
            ValueError,
            r"there is no z-score",
        ),
        (
            lambda: overlap_z_score(
                torch.eye(4)[:, :2], torch.arange(4) < 4, against="random_mask"
            ),
            ValueError,
            r"there is no z-score",
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
