import math

import cases
import oracles
import pytest
import torch
from planted import PlainOperator, indefinite, planted

import hesscurv
from hesscurv.linalg.random_matrices import draw_seed, make_test_matrix
from hesscurv.spectra import trace

METHODS = ("xtrace", "hutch++", "hutchinson")
every_seed = pytest.mark.parametrize("seed", [0, 1, 2])
every_method = pytest.mark.parametrize("method", METHODS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def decaying(dim, seed=0):
    return planted(10 / torch.arange(1, dim + 1) ** 2, dim, seed)


def drawn(kind, H, count, generator):
    seed = draw_seed(generator)
    return make_test_matrix(kind, H.shape[0], count, seed, H.dtype).columns(0, count)


def complement(A, omega):
    """The projector onto what A times the columns of omega does not span."""
    Q = torch.linalg.qr(A @ omega).Q
    return torch.eye(len(A), dtype=A.dtype) - Q @ Q.mT


@every_seed
@pytest.mark.parametrize("num_matvecs", [4, 10, 31])
def test_xtrace_is_the_mean_of_its_definition_with_one_vector_left_out_each(seed, num_matvecs):
    H, m = planted(indefinite(60), 60, seed), num_matvecs // 2
    A, omega = H.matrix, drawn("gaussian", H, m, seeded(seed))
    samples = []
    for i in range(m):
        E = complement(A, omega[:, torch.arange(m) != i])
        nu = E @ omega[:, i]
        rest = (60 - (m - 1)) * (nu @ A @ nu) / (nu @ nu)
        samples.append(((torch.eye(60) - E) @ A).trace() + rest)
    samples = torch.stack(samples)
    found = trace(H, num_matvecs, generator=seeded(seed))
    assert found.value == pytest.approx(samples.mean().item(), rel=1e-10)
    assert found.standard_error == pytest.approx(samples.std().item() / math.sqrt(m), rel=1e-8)
    assert found.num_matvecs == H.num_matvecs == 2 * m
    assert found.method == "xtrace"


@every_seed
def test_hutchpp_is_its_definition(seed):
    H, generator = planted(indefinite(60), 60, seed), seeded(seed)
    A = H.matrix
    E = complement(A, drawn("rademacher", H, 6, generator))
    X = E @ drawn("rademacher", H, 8, generator)  # what two thirds of 20 leave over
    samples = ((torch.eye(60) - E) @ A).trace() + (X * (A @ X)).sum(dim=0)
    found = trace(H, 20, "hutch++", generator=seeded(seed))
    assert found.value == pytest.approx(samples.mean().item(), rel=1e-10)
    assert found.standard_error == pytest.approx(samples.std().item() / math.sqrt(8), rel=1e-8)
    assert found.num_matvecs == H.num_matvecs == 20


@every_seed
def test_hutchinson_is_its_definition(seed):
    H = planted(indefinite(60), 60, seed)
    X = drawn("rademacher", H, 20, seeded(seed))
    samples = (X * (H.matrix @ X)).sum(dim=0)
    found = trace(H, 20, "hutchinson", generator=seeded(seed))
    assert found.value == pytest.approx(samples.mean().item(), rel=1e-10)
    assert found.standard_error == pytest.approx(samples.std().item() / math.sqrt(20), rel=1e-8)


@every_method
@pytest.mark.parametrize(
    "spectrum",
    [indefinite(150), 10 / torch.arange(1, 151) ** 2, torch.linspace(1, 2, 150)],
    ids=["indefinite", "decaying", "flat"],
)
def test_three_standard_errors_cover_the_truth(method, spectrum):
    H = planted(spectrum, 150)
    truth = H.matrix.trace().item()
    found = [trace(H, 40, method, generator=seeded(seed)) for seed in range(60)]
    covered = [abs(e.value - truth) <= 3 * e.standard_error for e in found]
    assert sum(covered) >= 0.9 * 60
    # And they are no wider than they need be: within a factor of 1.6 of the true deviation.
    true_error = math.sqrt(sum((e.value - truth) ** 2 for e in found) / 60)
    stated = math.sqrt(sum(e.standard_error**2 for e in found) / 60)
    assert 1 / 1.6 <= stated / true_error <= 1.6


def test_xtrace_is_far_more_accurate_at_equal_products_where_the_spectrum_decays():
    H = decaying(150)
    truth = H.matrix.trace().item()

    def error(method):
        found = [trace(H, 40, method, generator=seeded(seed)).value for seed in range(20)]
        return math.sqrt(sum((value - truth) ** 2 for value in found) / 20)

    # Measured: 66 and 2.0.
    assert error("xtrace") <= error("hutchinson") / 30
    assert error("xtrace") <= error("hutch++") / 1.2


@every_seed
@every_method
@pytest.mark.parametrize("num_matvecs", [30, 1000])
def test_as_many_products_as_dimensions_are_exact(method, num_matvecs, seed):
    H = planted(indefinite(30), 30, seed)
    found = trace(H, num_matvecs, method)
    assert found.value == pytest.approx(H.matrix.trace().item(), rel=1e-12)
    assert (found.standard_error, found.num_matvecs, found.method) == (0.0, 30, "exact")
    assert H.num_matvecs == 30


@every_seed
@pytest.mark.parametrize("method", ["xtrace", "hutch++"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_low_rank_is_exhausted(method, dtype, seed):
    # Rank 4 with 4 + 1 (a third of 15) and more test vectors: only rounding is left.
    H = planted([4.0, -2.0, 1.0, 0.5], 90, seed, dtype)
    for num_matvecs in (15, 24, 60):
        found = trace(H, num_matvecs, method, generator=seeded(seed))
        eps = torch.finfo(dtype).eps
        assert abs(found.value - 3.5) <= 100 * eps
        assert found.standard_error <= 100 * eps
        # None are spent on directions that the range does not have.
        first = {"xtrace": num_matvecs // 2, "hutch++": num_matvecs - num_matvecs // 3}[method]
        assert found.num_matvecs == first + 4


def test_a_range_that_one_vector_alone_spans_is_left_out_with_it():
    # As many test vectors as the rank: without one of them the range is incomplete.
    H = planted([4.0, -2.0, 1.0, 0.5, 0.25], 90)
    found = trace(H, 10)
    assert abs(found.value - 3.75) > 1e-3
    assert abs(found.value - 3.75) <= 5 * found.standard_error


@every_method
def test_the_zero_operator_has_no_trace_and_no_error(method):
    found = trace(planted([0.0], 40), 12, method)
    assert (found.value, found.standard_error) == (0.0, 0.0)


def test_a_multiple_of_the_identity_is_exact_but_for_hutchpp():
    H = PlainOperator(3 * torch.eye(50, dtype=torch.float64))
    for method in ("xtrace", "hutchinson"):
        found = trace(H, 10, method)
        assert found.value == pytest.approx(150, rel=1e-12)
        assert found.standard_error <= 1e-12


@every_method
def test_a_one_by_one_matrix(method):
    assert trace(torch.tensor([[2.5]]), 1, method).value == 2.5


@every_method
def test_float32_agrees_with_float64(method):
    H = decaying(120)
    single = trace(PlainOperator(H.matrix.float()), 24, method, generator=seeded(1))
    assert isinstance(single.value, float)
    truth = H.matrix.trace().item()
    assert abs(single.value - truth) <= 4 * single.standard_error


@every_seed
@every_method
def test_the_hessian_of_a_network(method, seed):
    problem = cases.build("mlp")
    H = problem.operator(hesscurv.HessianOperator)
    truth = oracles.dense("mlp", "hessian").trace().item()
    found = trace(H, 24, method, generator=seeded(seed))
    assert abs(found.value - truth) <= 4 * found.standard_error
    assert found.standard_error <= abs(truth)
    assert H.num_matvecs == found.num_matvecs <= 24
    assert trace(H, H.shape[0]).value == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize(("method", "least"), [("xtrace", 4), ("hutch++", 4), ("hutchinson", 2)])
def test_too_few_products_are_refused_before_the_first(method, least):
    H = planted(indefinite(20), 20)
    with pytest.raises(ValueError, match=f"expected num_matvecs >= {least}, got {least - 1}"):
        trace(H, least - 1, method)
    assert H.num_matvecs == 0
    assert trace(H, least, method).standard_error > 0
