import warnings

import pytest
import torch
from planted import PlainOperator, assert_valid, by_magnitude, indefinite, planted

from hesscurv import ConvergenceWarning
from hesscurv.eigensolvers.sketch.two_pass import rayleigh_ritz

every_kind = pytest.mark.parametrize("measurements", ["gaussian", "rademacher", "ssrft"])
every_seed = pytest.mark.parametrize("seed", [0, 1, 2])


def generator(seed):
    return torch.Generator().manual_seed(seed)


@every_kind
@every_seed
@pytest.mark.parametrize("subspace_iterations", [0, 2])
def test_a_low_rank_operator_is_recovered_exactly(measurements, seed, subspace_iterations):
    values = indefinite(12)
    H = planted(values, 300, seed)
    pairs = rayleigh_ritz(
        H,
        12,
        subspace_iterations=subspace_iterations,
        measurements=measurements,
        generator=generator(seed),
    )
    torch.testing.assert_close(pairs.eigenvalues, by_magnitude(values), rtol=0, atol=1e-12)
    assert pairs.residuals.max() <= 1e-12
    assert pairs.converged.all()
    assert_valid(pairs, H)


def test_a_low_rank_float32_operator_is_recovered_to_its_rounding():
    values = indefinite(12)
    H = planted(values, 300, dtype=torch.float32)
    pairs = rayleigh_ritz(H, 12)
    # 10 eps times |lambda_1| = 10, for products and sums over 300.
    torch.testing.assert_close(
        pairs.eigenvalues, by_magnitude(values).float(), rtol=0, atol=100 * 1.2e-7
    )
    assert_valid(pairs, H, tolerance=1e-6)


@every_seed
def test_subspace_iterations_reduce_the_error(seed):
    values = indefinite(300)
    H = planted(values, 300, seed)
    errors = []
    for q in (0, 1, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            pairs = rayleigh_ritz(
                H, 8, num_measurements=20, subspace_iterations=q, generator=generator(seed)
            )
        assert_valid(pairs, H)
        assert pairs.num_matvecs == (2 + q) * 20 + 8
        H.num_matvecs = 0
        errors.append((pairs.eigenvalues.abs() - values[:8].abs()).abs().max())
    # |lambda_21| / |lambda_8| = 0.38: each iteration multiplies the error by about 0.15.
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 10


@every_seed
def test_ritz_values_of_a_definite_operator_lie_below_its_eigenvalues(seed):
    values = indefinite(100).abs()
    pairs = rayleigh_ritz(planted(values, 100, seed), 10, generator=generator(seed), tol=1.0)
    assert (pairs.eigenvalues <= values[:10] + 1e-12).all()


@every_kind
@pytest.mark.parametrize("dim", [1, 2, 5, 30])
def test_all_pairs_are_exact_where_all_are_wanted(measurements, dim):
    values = indefinite(dim)
    H = planted(values, dim)
    pairs = rayleigh_ritz(H, dim, measurements=measurements, subspace_iterations=1)
    torch.testing.assert_close(pairs.eigenvalues, by_magnitude(values), rtol=0, atol=1e-11)
    assert pairs.converged.all()
    assert_valid(pairs, H)


@every_seed
def test_one_pair_is_found(seed):
    H = planted([-4.0, 1e-3, 1e-3], 200, seed)
    pairs = rayleigh_ritz(H, 1, num_measurements=3, generator=generator(seed))
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([-4.0]).double())
    assert_valid(pairs, H)


@pytest.mark.parametrize("k", [1, 6, 20])
@pytest.mark.parametrize("subspace_iterations", [0, 3])
def test_the_zero_operator_has_eigenvalues_zero_and_an_orthonormal_basis(k, subspace_iterations):
    H = PlainOperator(torch.zeros(20, 20, dtype=torch.float64))
    pairs = rayleigh_ritz(H, k, subspace_iterations=subspace_iterations)
    assert pairs.eigenvalues.abs().max() == 0
    assert pairs.residuals.abs().max() == 0
    assert pairs.converged.all()
    assert_valid(pairs, H)


@every_kind
@every_seed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rank_below_k_is_completed_with_eigenvalues_zero(measurements, seed, dtype):
    values = torch.tensor([5.0, -4.0, 3.0])
    H = planted(values, 100, seed, dtype)
    pairs = rayleigh_ritz(H, 9, measurements=measurements, generator=generator(seed))
    tolerance = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(pairs.eigenvalues[:3], values.to(dtype), rtol=0, atol=tolerance)
    assert pairs.eigenvalues[3:].abs().max() <= tolerance
    assert pairs.converged.all()
    assert_valid(pairs, H, tolerance=20 * torch.finfo(dtype).eps)


def test_repeated_eigenvalues_come_with_their_whole_space():
    values = torch.tensor([3.0] * 5 + [-3.0] * 4 + [1.0] * 3)
    H = planted(values, 150)
    pairs = rayleigh_ritz(H, 12)
    torch.testing.assert_close(
        pairs.eigenvalues.sort().values, values.double().sort().values, rtol=0, atol=1e-12
    )
    assert pairs.converged.all()
    assert_valid(pairs, H)


@every_seed
def test_initial_vectors_replace_random_ones_and_carry_what_they_know(seed):
    values = indefinite(200)
    H = planted(values, 200, seed)
    exact = torch.linalg.eigh(H.matrix)
    top = exact.eigenvectors[:, exact.eigenvalues.abs().argsort(descending=True)[:8]]
    noisy = top + 1e-4 * torch.randn(200, 8, dtype=torch.float64) / 200**0.5
    cold = rayleigh_ritz(H, 8, num_measurements=12, generator=generator(seed), tol=10.0)
    warm = rayleigh_ritz(
        H, 8, num_measurements=12, generator=generator(seed), initial=noisy, tol=1e-4
    )
    assert warm.num_matvecs == cold.num_matvecs
    assert warm.residuals.max() < cold.residuals.max() / 100
    H.num_matvecs = 0
    pairs = rayleigh_ritz(H, 4, initial=noisy, tol=1e-4)  # the basis is as large as initial
    assert pairs.info["num_measurements"] == 8
    torch.testing.assert_close(pairs.eigenvalues, values[:4], rtol=1e-6, atol=0)
    assert_valid(pairs, H)


def test_initial_vectors_may_be_dependent_and_of_another_dtype():
    H = planted([3.0, 2.0, 1.0], 60)
    initial = torch.randn(60, 2).repeat(1, 2)
    pairs = rayleigh_ritz(H, 3, num_measurements=8, initial=initial)
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([3.0, 2.0, 1.0]).double())
    before = initial.clone()
    rayleigh_ritz(H, 3, num_measurements=8, initial=initial)
    assert torch.equal(initial, before)


def test_the_same_seed_gives_the_same_result_bit_for_bit_and_none_is_seed_zero():
    H = planted(indefinite(100), 100)
    state = torch.get_rng_state()
    runs = [
        rayleigh_ritz(H, 5, generator=g, residuals=False)
        for g in (generator(0), generator(0), None, generator(1))
    ]
    assert torch.equal(runs[0].eigenvectors, runs[1].eigenvectors)
    assert torch.equal(runs[0].eigenvectors, runs[2].eigenvectors)
    assert not torch.equal(runs[0].eigenvectors, runs[3].eigenvectors)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_basis_has_twice_k_vectors_within_d_and_the_limit():
    H = planted(indefinite(100), 100)

    def size(k, **options):
        pairs = rayleigh_ritz(H, k, tol=1e3, **options)
        return pairs.info["num_measurements"], pairs.num_matvecs

    assert size(5) == (10, 25)
    assert size(60) == (100, 260)
    assert size(5, num_measurements=1000) == (100, 205)
    assert size(5, max_matvecs=22) == (8, 21)
    assert size(5, max_matvecs=22, residuals=False) == (10, 20)
    assert size(5, max_matvecs=25, subspace_iterations=2) == (5, 25)


def test_pairs_beyond_the_tolerance_come_with_a_warning():
    H = planted(indefinite(100), 100)
    with pytest.warns(ConvergenceWarning, match=r"0 of 10 eigenpairs .* tol=1e-09"):
        pairs = rayleigh_ritz(H, 10, tol=1e-9)
    assert not pairs.converged.any()


def test_progress_is_shown_on_request_only(terminal):
    H = planted(indefinite(50) ** 3, 50)
    rayleigh_ritz(H, 3, tol=1.0)
    assert terminal.readouterr().err == ""
    rayleigh_ritz(H, 3, tol=1.0, progress=True)
    assert "15/15" in terminal.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "expected 1 <= k <= D=20, got k=0"),
        ({"k": 21}, "expected 1 <= k <= D=20, got k=21"),
        ({"k": 4, "num_measurements": 3}, r"between max\(k, k0\) = 4 and D = 20, got 3"),
        ({"k": 4, "max_matvecs": 11}, "expected max_matvecs >= 12"),
        ({"k": 4, "measurements": "fourier"}, "expected a kind of test matrix"),
        ({"k": 4, "block_size": 0}, "expected subspace_iterations >= 0 and block_size >= 1"),
        ({"k": 4, "subspace_iterations": -1}, "expected subspace_iterations >= 0"),
        ({"k": 4, "initial": torch.zeros(19, 2)}, r"expected initial vectors of shape \(20, k0\)"),
        ({"k": 4, "initial": torch.zeros(20, 6), "num_measurements": 5}, "k0=6 initial vectors"),
        ({"k": 4, "initial": torch.full((20, 2), float("nan"))}, "expected finite initial"),
    ],
)
def test_bad_arguments_are_refused_before_any_product(options, message):
    H = planted([1.0], 20)
    with pytest.raises(ValueError, match=message):
        rayleigh_ritz(H, **options)
    assert H.num_matvecs == 0


def test_products_that_are_not_finite_are_refused():
    matrix = torch.eye(30)
    matrix[3, 3] = float("inf")
    with pytest.raises(ValueError, match="products 0 to 6 with the operator have NaN or inf"):
        rayleigh_ritz(PlainOperator(matrix), 3)
