import math

import cases
import oracles
import pytest
import torch
from planted import PlainOperator, indefinite, planted

import hesscurv
from hesscurv.spectra import SpectralDensity, spectral_density

DIM = 150
SPECTRA = {
    "uniform": torch.linspace(-1, 1, DIM),
    "decaying": 10 / torch.arange(1, DIM + 1),
    "outliers": torch.cat([torch.tensor([10.0, 8, -5]), torch.linspace(-0.1, 0.3, DIM - 3)]),
    "low rank": torch.cat([torch.linspace(1, 5, 12), torch.zeros(DIM - 12)]),
}
every_seed = pytest.mark.parametrize("seed", [0, 1, 2])
every_spectrum = pytest.mark.parametrize("name", SPECTRA)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def problem(name, seed=0):
    values = SPECTRA[name].double()
    return values, planted(values, DIM, seed)


def smoothed(values, grid, sigma):
    bumps = torch.exp(-0.5 * ((grid[:, None] - values) / sigma) ** 2)
    return bumps.mean(dim=1) / sigma / math.sqrt(2 * math.pi)


def counts(values, x):
    return (values <= x[:, None]).sum(dim=1)


@every_spectrum
def test_three_standard_errors_cover_the_moments(name):
    values, H = problem(name)
    # Four steps: exact up to the seventh power.
    found = [
        spectral_density(H, 4, 20, generator=seeded(seed), block_size=20) for seed in range(60)
    ]
    for power in (1, 2, 3):
        estimates = [f.moment(power) for f in found]
        truth = (values**power).mean()
        errors = torch.stack([value - truth for value, _ in estimates])
        stated = torch.stack([error for _, error in estimates])
        assert (errors.abs() <= 3 * stated + 1e-12).double().mean() >= 0.9
        assert 1 / 1.4 <= stated.norm() / errors.norm() <= 1.4


@every_spectrum
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_density_and_counts_are_covered_by_three_standard_errors(name, reorthogonalize):
    values, H = problem(name)
    x = torch.linspace(values.min() - 0.05, values.max() + 0.05, 41, dtype=torch.float64)
    covered_counts, covered_densities = [], []
    for seed in range(12):
        found = spectral_density(H, 50, 8, generator=seeded(seed), reorthogonalize=reorthogonalize)
        number, error = found.cumulative(x)
        # The quadrature's own error: a step of D / 50 at most in a bulk, here one eigenvalue.
        covered_counts.append((number - counts(values, x)).abs() <= 3 * error + 1)
        grid = found.grid(101)
        density, error = found.density(grid)
        truth = smoothed(values, grid, found.default_sigma)
        covered_densities.append((density - truth).abs() <= 3 * error + 0.01 * truth.max())
    assert torch.stack(covered_counts).double().mean() >= 0.95
    assert torch.stack(covered_densities).double().mean() >= 0.9


@every_spectrum
@every_seed
def test_the_density_integrates_to_one_and_is_nowhere_negative(name, seed):
    _, H = problem(name, seed)
    found = spectral_density(H, 30, 3, generator=seeded(seed))
    grid = found.grid(4000)
    density, _ = found.density(grid)
    # Four sigmas beyond the last node lie 6e-5 of its mass, and there is a share of it alone.
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-4)
    assert (density >= 0).all()
    torch.testing.assert_close(density, found.density()[0].new_tensor(density.tolist()))
    low, high = found.range
    assert grid[0] < low
    assert high < grid[-1]


@every_seed
def test_more_steps_resolve_more_and_more_probes_scatter_less(seed):
    values, H = problem("outliers", seed)
    grid = torch.linspace(-0.4, 0.6, 101, dtype=torch.float64)
    truth = smoothed(values, grid, 0.05)

    def error(steps, probes):
        found = spectral_density(H, steps, probes, generator=seeded(seed))
        return (found.density(grid, 0.05)[0] - truth).norm() / truth.norm()

    assert error(30, 10) < 0.25 * error(6, 10)
    assert error(30, 64) < 0.6 * error(30, 2)


@every_seed
@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_low_rank_has_its_eigenvalues_as_nodes(reorthogonalize, dtype, seed):
    H = planted([4.0, -2.0, 1.0], 80, seed, dtype)
    found = spectral_density(H, 20, 10, generator=seeded(seed), reorthogonalize=reorthogonalize)
    assert found.num_matvecs == H.num_matvecs < 10 * 20  # it ends early
    eps = torch.finfo(dtype).eps
    heavy = found.nodes[found.weights > 1e-6]
    exact = torch.tensor([4.0, -2.0, 1.0, 0.0], dtype=torch.float64)
    assert (heavy[:, None] - exact).abs().amin(dim=1).max() <= 100 * eps
    # Between eigenvalues the counts differ from the truth by the probes' scatter alone.
    x = torch.tensor([-3.0, -1.0, 0.5, 2.0, 5.0], dtype=torch.float64)
    number, error = found.cumulative(x)
    truth = torch.tensor([0.0, 1.0, 78.0, 79.0, 80.0], dtype=torch.float64)
    assert ((number - truth).abs() <= 5 * error + 1e-9).all()
    assert number[0] == 0
    assert number[-1] == pytest.approx(80, rel=1e-12)


@pytest.mark.parametrize("scale", [0.0, 3.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_multiple_of_the_identity_is_one_node(scale, dtype):
    H = PlainOperator(scale * torch.eye(40, dtype=dtype))
    found = spectral_density(H, 10, 3)
    assert found.num_matvecs == 3
    torch.testing.assert_close(found.nodes, torch.full((3, 1), scale, dtype=torch.float64))
    value, error = found.moment(1)
    assert value.item() == pytest.approx(scale, rel=1e-6)
    assert error <= 1e-6
    grid = found.grid()
    density, _ = found.density(grid)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-3)


@every_seed
def test_as_many_steps_as_dimensions_give_all_eigenvalues(seed):
    values = torch.linspace(-3, 4, 20, dtype=torch.float64)
    found = spectral_density(planted(values, 20, seed), 1000, 2, generator=seeded(seed))
    torch.testing.assert_close(found.nodes, values.expand(2, -1), rtol=0, atol=1e-10)
    assert found.num_matvecs == 40


@every_seed
@every_spectrum
def test_ghosts_do_not_spoil_the_estimates(name, seed):
    _, H = problem(name, seed)
    with_basis = spectral_density(H, 60, 4, generator=seeded(seed))
    without = spectral_density(H, 60, 4, generator=seeded(seed), reorthogonalize=False)
    if name == "outliers":  # they do come, or this would say nothing
        assert (without.nodes > 7.9).sum() > 8
        assert ((with_basis.nodes > 7.9) & (with_basis.weights > 0)).sum() == 8
    for power in (1, 2, 4):
        one, other = with_basis.moment(power).value, without.moment(power).value
        assert other.item() == pytest.approx(one.item(), rel=1e-9, abs=1e-9)
    grid = with_basis.grid(200)
    sigma = 2 * with_basis.default_sigma
    one, other = with_basis.density(grid, sigma).value, without.density(grid, sigma).value
    assert (one - other).norm() <= 0.1 * one.norm()


@every_seed
@pytest.mark.parametrize("measurements", ["rademacher", "gaussian", "ssrft"])
def test_known_pairs_are_counted_exactly(measurements, seed):
    values, H = problem("outliers", seed)
    pairs = hesscurv.eigsh(H, 3, tol=1e-9)
    before = H.num_matvecs
    found = spectral_density(
        H, 40, 8, eigenpairs=pairs, measurements=measurements, generator=seeded(seed)
    )
    assert found.num_matvecs == H.num_matvecs - before == 8 * 40
    bulk = values[3:]
    # The probes do not see the outliers at all.
    assert found.nodes.min() >= bulk.min() - 1e-9
    assert found.nodes.max() <= bulk.max() + 1e-9
    number, error = found.cumulative([-1.0, 1.0, 9.0, 11.0])
    torch.testing.assert_close(
        number, torch.tensor([1.0, 148, 149, 150], dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert error.max() <= 1e-9
    plain = spectral_density(H, 40, 8, measurements=measurements, generator=seeded(seed))
    for power in (1, 2, 3):
        value, error = found.moment(power)
        assert abs(value - (values**power).mean()) <= 5 * error + 1e-12
        assert error < plain.moment(power).standard_error / 3


def test_deflated_estimates_are_covered():
    values, H = problem("decaying")
    pairs = hesscurv.eigsh(H, 10, tol=1e-9)
    covered = []
    for seed in range(60):
        found = spectral_density(H, 6, 8, eigenpairs=pairs, generator=seeded(seed))
        for power in (1, 2):
            value, error = found.moment(power)
            covered.append(abs(value - (values**power).mean()) <= 3 * error)
    assert sum(covered) >= 0.9 * len(covered)


@every_seed
def test_functions_of_the_spectrum(seed):
    values = torch.linspace(1, 3, DIM, dtype=torch.float64)
    found = spectral_density(planted(values, DIM, seed), 20, 10, generator=seeded(seed))
    for fn in (torch.log, torch.exp, lambda x: 1 / (x + 0.1)):
        value, error = found.expectation(fn)
        assert abs(value - fn(values).mean()) <= 5 * error
        assert 0 < error <= 0.05 * abs(value)
    shifted = spectral_density(planted(values - 2, DIM, seed), 20, 4)
    with pytest.raises(ValueError, match="finite on all Ritz values"):
        shifted.expectation(torch.log)


@every_seed
def test_the_hessian_of_a_network(seed):
    case = cases.build("mlp")
    H = case.operator(hesscurv.HessianOperator)
    values = torch.linalg.eigvalsh(oracles.dense("mlp", "hessian"))
    found = spectral_density(H, 20, 12, generator=seeded(seed))
    assert H.num_matvecs == found.num_matvecs <= 240
    for power in (1, 2, 4):
        value, error = found.moment(power)
        assert abs(value - (values**power).mean()) <= 4 * error
    low, high = found.range
    assert low == pytest.approx(values.min().item(), abs=1e-5)
    assert high == pytest.approx(values.max().item(), abs=1e-5)
    x = torch.linspace(low - 0.1, high + 0.1, 30, dtype=torch.float64)
    number, error = found.cumulative(x)
    assert ((number - counts(values, x)).abs() <= 4 * error + 1.5).double().mean() >= 0.95


@every_seed
def test_the_hessian_in_float32(seed):
    H = cases.build("mlp").cast(torch.float32).operator(hesscurv.HessianOperator)
    values = torch.linalg.eigvalsh(oracles.dense("mlp", "hessian"))
    found = spectral_density(H, 20, 12, generator=seeded(seed))
    low, high = found.range
    assert (low, high) == pytest.approx((values.min().item(), values.max().item()), abs=1e-5)
    value, error = found.moment(2)
    assert abs(value - (values**2).mean()) <= 4 * error


def test_formulas_on_known_nodes():
    nodes = torch.tensor([[0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    known = torch.tensor([5.0], dtype=torch.float64)
    found = SpectralDensity(nodes, weights, known, dim=4, num_matvecs=0)
    # Means over three unknown eigenvalues: 1.5 and 1; the fourth is 5.
    value, error = found.moment(1)
    assert value.item() == pytest.approx((3 * 1.25 + 5) / 4)
    assert error.item() == pytest.approx(0.75 * 0.25)  # |1.5 - 1| / 2 for each of two
    number, error = found.cumulative(torch.tensor([[-1.0, 0.0], [1.0, 5.0]]))
    assert number.shape == error.shape == (2, 2)
    expected = torch.tensor([[0, 3 * 0.125], [3 * 0.625, 4]], dtype=torch.float64)
    torch.testing.assert_close(number, expected)
    assert found.range == (0.0, 5.0)
    one = SpectralDensity(nodes[:1], weights[:1], known[:0], dim=4, num_matvecs=0)
    assert math.isnan(one.moment(1).standard_error)
    density, error = one.density(torch.tensor([2.0]), sigma=0.1)
    assert density.item() == pytest.approx(0.75 / 0.1 / math.sqrt(2 * math.pi))
    assert math.isnan(error.item())


def test_bad_arguments_are_refused():
    H = planted(indefinite(20), 20)
    pairs = hesscurv.eigsh(H, 3)
    all_pairs = hesscurv.eigsh(H, 20)
    used = H.num_matvecs
    for error, message, options in [
        (ValueError, "expected num_steps >= 1, got 0", {"num_steps": 0}),
        (ValueError, "expected num_probes >= 1, got 0", {"num_probes": 0}),
        (TypeError, "expected num_steps to be an int, got 2.5", {"num_steps": 2.5}),
        (ValueError, "expected measurements to be one of", {"measurements": "normal"}),
        (ValueError, "at most D=20 orthogonal", {"num_probes": 21, "measurements": "ssrft"}),
        (TypeError, "expected Eigenpairs", {"eigenpairs": pairs.eigenvectors}),
        (ValueError, "expected fewer than D = 20 eigenpairs, got 20", {"eigenpairs": all_pairs}),
    ]:
        with pytest.raises(error, match=message):
            spectral_density(H, **options)
    with pytest.raises(ValueError, match="expected eigenvectors of length 30, got 20"):
        spectral_density(planted(indefinite(30), 30), eigenpairs=pairs)
    assert H.num_matvecs == used
    found = spectral_density(H, 5, 2)
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a positive finite sigma"):
            found.density(sigma=sigma)
    with pytest.raises(ValueError, match="expected num_points >= 2, got 1"):
        found.grid(1)
    with pytest.raises(ValueError, match="expected a finite margin >= 0, got -1"):
        found.grid(margin=-1)
    with pytest.raises(ValueError, match="expected power >= 0, got -1"):
        found.moment(-1)
