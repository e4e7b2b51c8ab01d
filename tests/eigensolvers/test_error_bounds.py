import math

import pytest
import torch
from planted import indefinite, planted

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.error_bounds import ErrorEstimate, a_posteriori_error
from hesscurv.eigensolvers.sketch.single_pass import single_pass

every_seed = pytest.mark.parametrize("seed", [0, 1, 2])


def exact_pairs(H, k):
    values, V = torch.linalg.eigh(H.matrix)
    order = values.abs().argsort(descending=True)[:k]
    return Eigenpairs(
        values[order], V[:, order], torch.zeros(k), torch.ones(k, dtype=torch.bool), num_matvecs=0
    )


@every_seed
def test_the_estimates_approach_the_frobenius_norms(seed):
    values = indefinite(60)
    H = planted(values, 60, seed)
    generator = torch.Generator().manual_seed(seed)
    estimate = a_posteriori_error(H, exact_pairs(H, 5), num_probes=4000, generator=generator)
    squares = values.double() ** 2
    # The relative standard deviation of each is at most sqrt(2 / 4000) = 0.022.
    for found, expected in [
        (estimate.operator_norm_squared, squares.sum()),
        (estimate.approximation_norm_squared, squares[:5].sum()),
        (estimate.error_norm_squared, squares[5:].sum()),
    ]:
        assert found == pytest.approx(expected.item(), rel=0.1)
    expected = math.sqrt(squares[5:].sum() / squares.sum())
    assert estimate.relative_error == pytest.approx(expected, rel=0.1)


def test_probes_are_counted_and_default_to_30():
    H = planted(indefinite(20), 20)
    assert a_posteriori_error(H, exact_pairs(H, 3)).num_probes == 30
    assert H.num_matvecs == 30


@pytest.mark.parametrize("block_size", [1, 7, 100])
def test_the_block_size_changes_nothing(block_size):
    H = planted(indefinite(40), 40)
    pairs = exact_pairs(H, 4)
    one, other = a_posteriori_error(H, pairs), a_posteriori_error(H, pairs, block_size=block_size)
    assert other.error_norm_squared == pytest.approx(one.error_norm_squared, rel=1e-12)


def test_exact_pairs_of_a_low_rank_operator_have_no_error():
    H = planted([4.0, -2.0, 1.0], 80)
    estimate = a_posteriori_error(H, exact_pairs(H, 3))
    assert estimate.relative_error < 1e-13
    zero = planted([0.0], 10)
    assert a_posteriori_error(zero, exact_pairs(zero, 2)).relative_error == 0


@every_seed
def test_an_equal_generator_in_the_solver_gives_independent_probes(seed):
    # Were the probes the solver's own measurements, H and Hhat would agree on them far too well.
    H = planted(indefinite(400).sign(), 400, seed)
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    pairs = single_pass(
        H, 20, outer=40, inner=40, measurements="gaussian", generator=generators[0], residuals=False
    )
    estimate = a_posteriori_error(H, pairs, 30, generators[1])
    V = pairs.eigenvectors
    true = (H.matrix - (V * pairs.eigenvalues) @ V.mT).norm() ** 2
    assert estimate.error_norm_squared == pytest.approx(true.item(), rel=0.35)


@pytest.mark.parametrize("n", [3, 10, 30])
@pytest.mark.parametrize(
    "squares",
    [[1.0], [1.0] * 20, [1 / i**2 for i in range(1, 41)]],
    ids=["rank one", "flat", "decaying"],
)
def test_the_tail_bounds_hold_in_monte_carlo(n, squares):
    # ||E z||^2 is sum sigma_i^2 g_i^2 with independent standard normal g_i.
    weights = torch.tensor(squares, dtype=torch.float64)
    generator = torch.Generator().manual_seed(n)
    trials = 20_000
    normal = torch.randn(trials, n, len(weights), generator=generator, dtype=torch.float64)
    ratio = (normal**2 @ weights).mean(dim=1) / weights.sum()
    estimate = ErrorEstimate(n, 1.0, 1.0, 1.0)
    for e in (0.1, 0.3, 0.5, 0.8):
        # Frequencies scatter by less than 0.5 / sqrt(trials) = 0.0035.
        assert (ratio <= 1 - e).double().mean() <= estimate.probability_below(e) + 0.012
        assert (ratio >= 1 + e).double().mean() <= estimate.probability_above(e) + 0.012


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
@every_seed
def test_the_confidence_interval_covers_the_truth_at_least_as_often_as_stated(confidence, seed):
    generator = torch.Generator().manual_seed(seed)
    # The worst case for the bounds: an error of rank one.
    estimates = (torch.randn(2000, 30, generator=generator, dtype=torch.float64) ** 2).mean(dim=1)
    low, high = ErrorEstimate(30, 1.0, 1.0, 1.0).confidence_interval(confidence)
    covered = ((estimates * low <= 1) & (estimates * high >= 1)).double().mean()
    assert covered >= confidence


def test_the_formulas_at_known_points():
    estimate = ErrorEstimate(30, 1.0, 1.0, 1.0)
    assert estimate.probability_below(0.0) == estimate.probability_above(0.0) == 1.0
    assert estimate.probability_below(1.0) == 0.0
    assert estimate.probability_below(0.5) == pytest.approx((math.exp(0.5) * 0.5) ** 15)
    assert estimate.probability_above(0.5) == pytest.approx((math.exp(0.5) / 1.5) ** -15)


@pytest.mark.parametrize("n", [1, 30, 1000])
@pytest.mark.parametrize("confidence", [0.01, 0.95, 0.999999])
def test_the_interval_ends_where_each_tail_is_half_of_the_rest(n, confidence):
    estimate = ErrorEstimate(n, 9.0, 5.0, 2.0)
    low, high = estimate.confidence_interval(confidence)
    assert 0 < low < 2 < high
    tail = (1 - confidence) / 2
    assert estimate.probability_above(2 / low - 1) == pytest.approx(tail, rel=1e-6)
    if 2 / high > 1e-8:  # 1 - e_below keeps too few digits otherwise
        assert estimate.probability_below(1 - 2 / high) == pytest.approx(tail, rel=1e-6)
    lower, higher = estimate.confidence_interval(confidence, norm_squared=9.0)
    assert (lower, higher) == pytest.approx((low * 4.5, high * 4.5))


def test_more_confidence_and_fewer_probes_widen_the_interval():
    def width(n, confidence):
        low, high = ErrorEstimate(n, 1.0, 1.0, 1.0).confidence_interval(confidence)
        return high - low

    assert width(30, 0.5) < width(30, 0.9) < width(30, 0.99)
    assert width(300, 0.9) < width(30, 0.9) < width(3, 0.9)


def test_bad_arguments_are_refused():
    H = planted(indefinite(20), 20)
    estimate = a_posteriori_error(H, exact_pairs(H, 3))
    for e in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected 0 <= e <= 1"):
            estimate.probability_below(e)
    for e in (-0.1, math.nan):
        with pytest.raises(ValueError, match="expected e >= 0"):
            estimate.probability_above(e)
    for confidence in (0.0, 1.0):
        with pytest.raises(ValueError, match="expected 0 < confidence < 1"):
            estimate.confidence_interval(confidence)
    with pytest.raises(ValueError, match="expected num_probes >= 1, got 0"):
        a_posteriori_error(H, exact_pairs(H, 3), num_probes=0)
    with pytest.raises(ValueError, match="expected eigenvectors of length 20, got 30"):
        a_posteriori_error(H, exact_pairs(planted([1.0], 30), 3))
