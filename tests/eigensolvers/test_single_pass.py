import warnings

import pytest
import torch
from planted import PlainOperator, assert_valid, by_magnitude, indefinite, planted

from hesscurv import ConvergenceWarning
from hesscurv.eigensolvers.sketch.single_pass import core_matrix, single_pass, take_measurements
from hesscurv.linalg.orthogonalization import orthonormalize_
from hesscurv.linalg.random_matrices import draw_seed, make_test_matrix

every_kind = pytest.mark.parametrize("measurements", ["ssrft", "gaussian", "rademacher"])
every_seed = pytest.mark.parametrize("seed", [0, 1, 2])


def generator(seed):
    return torch.Generator().manual_seed(seed)


@every_kind
@every_seed
def test_a_low_rank_operator_is_recovered_exactly(measurements, seed):
    values = indefinite(12)
    H = planted(values, 300, seed)
    pairs = single_pass(H, 12, measurements=measurements, generator=generator(seed))
    # The sketch is exact for rank <= outer; its least squares have conditions below 100.
    torch.testing.assert_close(pairs.eigenvalues, by_magnitude(values), rtol=0, atol=1e-11)
    assert pairs.residuals.max() <= 1e-11
    assert pairs.converged.all()
    assert pairs.info["rank"] == 12
    assert_valid(pairs, H)


@every_kind
def test_a_low_rank_float32_operator_is_recovered_to_its_rounding(measurements):
    values = indefinite(12)
    H = planted(values, 300, dtype=torch.float32)
    pairs = single_pass(H, 12, measurements=measurements)
    # 20 eps times |lambda_1| = 10, for products, sums over 300 and least squares together.
    tolerance = 20 * torch.finfo(torch.float32).eps * 10
    expected = by_magnitude(values).float()
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=0, atol=tolerance)
    assert_valid(pairs, H, tolerance=1e-6)


@every_kind
@every_seed
def test_a_decaying_spectrum_is_found_approximately(measurements, seed):
    values = indefinite(300) ** 3  # 1000, -125, 37, ...
    H = planted(values, 300, seed)
    with pytest.warns(ConvergenceWarning, match="of 10 eigenpairs have residuals within"):
        pairs = single_pass(
            H, 10, outer=40, inner=80, measurements=measurements, generator=generator(seed)
        )
    # |lambda_41| / |lambda_10| = 0.015: a percent, plus what the fit amplifies.
    torch.testing.assert_close(pairs.eigenvalues, values[:10], rtol=0.05, atol=0)
    assert pairs.converged[0]
    assert_valid(pairs, H)


@every_seed
def test_it_is_the_formula_of_the_paper(seed):
    H = planted(indefinite(200), 200, seed)
    pairs = single_pass(
        H, 10, outer=20, inner=40, generator=generator(seed), residuals=False, block_size=7
    )
    source = generator(seed)
    omega, psi = (
        make_test_matrix("ssrft", 200, 40, draw_seed(source), torch.float64).columns(0, 40)
        for _ in range(2)
    )
    Y = H.matrix @ omega
    Q = torch.linalg.qr(Y[:, :20]).Q
    C = torch.linalg.pinv(psi.mT @ Q) @ (psi.mT @ Y) @ torch.linalg.pinv(omega.mT @ Q).mT
    approximation = Q @ ((C + C.mT) / 2) @ Q.mT
    values = torch.linalg.eigvalsh(approximation)
    torch.testing.assert_close(pairs.eigenvalues, by_magnitude(values)[:10], rtol=0, atol=1e-11)
    # The vectors are eigenvectors of the approximation.
    V = pairs.eigenvectors
    gaps = approximation @ V - V * pairs.eigenvalues
    assert gaps.norm(dim=0).max() <= 1e-11


@every_kind
def test_all_pairs_are_exact_where_all_are_wanted(measurements):
    values = indefinite(30)
    H = planted(values, 30)
    pairs = single_pass(H, 30, measurements=measurements)
    torch.testing.assert_close(pairs.eigenvalues, by_magnitude(values), rtol=0, atol=1e-12)
    assert pairs.converged.all()
    assert pairs.num_matvecs == 30 + 30
    assert_valid(pairs, H)


@every_kind
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_operators_are_exact(measurements, dim, dtype):
    H = planted(indefinite(dim), dim, dtype=dtype)
    pairs = single_pass(H, dim, measurements=measurements)
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        pairs.eigenvalues.double(), by_magnitude(indefinite(dim)), rtol=0, atol=tolerance
    )


@every_kind
@every_seed
def test_one_pair_is_found(measurements, seed):
    H = planted([4.0, -1e-3, 1e-3], 200, seed)
    pairs = single_pass(
        H, 1, outer=8, inner=16, measurements=measurements, generator=generator(seed)
    )
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([4.0]).double())
    assert_valid(pairs, H)


@every_kind
@pytest.mark.parametrize("k", [1, 6, 20])
def test_the_zero_operator_has_eigenvalues_zero_and_an_orthonormal_basis(measurements, k):
    H = PlainOperator(torch.zeros(20, 20, dtype=torch.float64))
    pairs = single_pass(H, k, measurements=measurements)
    assert pairs.eigenvalues.abs().max() == 0
    assert pairs.residuals.abs().max() == 0
    assert pairs.converged.all()
    assert_valid(pairs, H)


@every_kind
@every_seed
def test_a_rank_below_k_is_completed_with_eigenvalues_zero(measurements, seed):
    values = torch.tensor([5.0, -4.0, 3.0])
    H = planted(values, 100, seed)
    pairs = single_pass(H, 9, measurements=measurements, generator=generator(seed))
    torch.testing.assert_close(pairs.eigenvalues[:3], values.double(), rtol=0, atol=1e-11)
    assert pairs.eigenvalues[3:].abs().max() <= 1e-11
    assert pairs.converged.all()
    assert_valid(pairs, H)


@every_kind
def test_repeated_eigenvalues_come_with_their_whole_space(measurements):
    values = torch.tensor([3.0] * 5 + [-3.0] * 4 + [1.0] * 3)
    H = planted(values, 150)
    pairs = single_pass(H, 12, measurements=measurements)
    torch.testing.assert_close(
        pairs.eigenvalues.sort().values, values.double().sort().values, rtol=0, atol=1e-11
    )
    assert pairs.converged.all()
    assert_valid(pairs, H)


def test_the_same_seed_gives_the_same_result_bit_for_bit_and_none_is_seed_zero():
    H = planted(indefinite(100), 100)
    runs = [
        single_pass(H, 5, generator=g, residuals=False)
        for g in (generator(0), generator(0), None, generator(1))
    ]
    assert torch.equal(runs[0].eigenvectors, runs[1].eigenvectors)
    assert torch.equal(runs[0].eigenvectors, runs[2].eigenvectors)
    assert not torch.equal(runs[0].eigenvectors, runs[3].eigenvectors)


def test_the_global_random_state_is_neither_used_nor_changed():
    before = torch.get_rng_state()
    single_pass(planted([2.0, 1.0], 50), 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("block_size", [1, 3, 1000])
def test_the_block_size_changes_rounding_only(block_size):
    H = planted(indefinite(100), 100)
    reference = single_pass(H, 5, residuals=False)
    pairs = single_pass(H, 5, residuals=False, block_size=block_size)
    torch.testing.assert_close(pairs.eigenvalues, reference.eigenvalues, rtol=0, atol=1e-11)


@every_kind
def test_ranges_measured_apart_assemble_to_the_same_result(measurements):
    H = planted(indefinite(80), 80)
    outer, inner = 10, 20
    source = generator(3)
    omega, psi = (
        make_test_matrix(measurements, 80, inner, draw_seed(source), torch.float64)
        for _ in range(2)
    )
    Y = torch.zeros(inner, 80, dtype=torch.float64)
    M = torch.zeros(inner, inner, dtype=torch.float64)
    for start, stop in [(13, 20), (0, 6), (6, 13)]:
        M[:, start:stop] = take_measurements(H, omega, psi, start, stop, Y[start:stop], 4)
    Q, _ = orthonormalize_(Y[:outer].clone())
    C = core_matrix(Q, M, omega, psi)
    whole = single_pass(
        H,
        4,
        outer=outer,
        inner=inner,
        measurements=measurements,
        generator=generator(3),
        residuals=False,
    )
    values = by_magnitude(torch.linalg.eigvalsh((C + C.mT) / 2))
    torch.testing.assert_close(whole.eigenvalues, values[:4], rtol=0, atol=1e-11)


def test_sizes_default_to_twice_k_and_twice_that_within_d_and_the_limit():
    H = planted(indefinite(100), 100)

    def sizes(k, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            pairs = single_pass(H, k, **options)
        return pairs.info["outer"], pairs.info["inner"], pairs.num_matvecs

    assert sizes(5) == (10, 20, 25)
    assert sizes(5, residuals=False) == (10, 20, 20)
    assert sizes(5, outer=15) == (15, 30, 35)
    assert sizes(5, inner=16) == (8, 16, 21)
    assert sizes(40) == (80, 100, 140)  # 100 orthogonal measurements are all there are
    assert sizes(60, outer=500, inner=500) == (100, 100, 160)
    assert sizes(5, max_matvecs=21) == (8, 16, 21)
    assert sizes(5, max_matvecs=10) == (5, 5, 10)
    assert sizes(5, max_matvecs=1000) == (10, 20, 25)


def test_residuals_are_optional_and_then_no_pair_counts_as_converged():
    H = planted([3.0, 2.0, 1.0], 50)
    pairs = single_pass(H, 3, residuals=False)
    assert pairs.residuals.isnan().all()
    assert not pairs.converged.any()
    assert H.num_matvecs == pairs.num_matvecs == 12


def test_a_dense_tensor_serves_as_an_operator():
    H = planted([3.0, 2.0, 1.0], 50)
    pairs = single_pass(H.matrix, 3)
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([3.0, 2.0, 1.0]).double())


def test_progress_is_shown_on_request_only(terminal):
    H = planted([3.0, 2.0, 1.0], 50)
    single_pass(H, 3)
    assert terminal.readouterr().err == ""
    single_pass(H, 3, progress=True)
    shown = terminal.readouterr().err
    assert "single_pass" in shown
    assert "15/15" in shown
    assert "products/s" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "expected 1 <= k <= D=20, got k=0"),
        ({"k": 21}, "expected 1 <= k <= D=20, got k=21"),
        ({"k": 4, "outer": 3}, "k=4, outer=3, inner=6"),
        ({"k": 4, "outer": 8, "inner": 7}, "k=4, outer=8, inner=7"),
        ({"k": 4, "max_matvecs": 7}, "expected max_matvecs >= 8 for 4 measurements and 4"),
        ({"k": 2, "outer": 4, "inner": 8, "max_matvecs": 9}, "expected max_matvecs >= 10"),
        ({"k": 4, "measurements": "fourier"}, "expected a kind of test matrix"),
        ({"k": 4, "block_size": 0}, "expected block_size >= 1"),
    ],
)
def test_bad_arguments_are_refused_before_any_product(options, message):
    H = planted([1.0], 20)
    with pytest.raises(ValueError, match=message):
        single_pass(H, **options)
    assert H.num_matvecs == 0


def test_products_that_are_not_finite_are_refused():
    matrix = torch.eye(30, dtype=torch.float64)
    matrix[3, 3] = float("nan")
    with pytest.raises(ValueError, match="products 0 to 6 with the operator have NaN or inf"):
        single_pass(PlainOperator(matrix), 3)
    with pytest.raises(TypeError, match="expected float32 or float64"):
        single_pass(torch.eye(30, dtype=torch.bfloat16), 3)
    with pytest.raises(ValueError, match="expected a square matrix"):
        single_pass(torch.zeros(30, 20), 3)
