"""Eigenpairs, overlaps and functions of the spectrum from the Gram matrix, against dense ones."""

import math

import cases
import oracles
import pytest
import torch
from torch import nn

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, SampleSpace, eigsh
from hesscurv.operators.sample_space.output_rows import NoRowsError

KINDS = {"ggn": GGNOperator, "fisher": EmpiricalFisherOperator}
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def descending(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


@pytest.fixture(params=[("mlp", "ggn"), ("conv_bn", "ggn"), ("resnet", "fisher")])
def problem(request):
    name, kind = request.param
    operator = cases.build(name).operator(KINDS[kind])
    return operator, *descending(oracles.dense(name, kind))


def test_pairs_are_the_dense_ones_and_residuals_true(problem):
    G, values, vectors = problem
    k = 4
    pairs = eigsh(G, k, method="sample_space")
    assert pairs.method == "sample_space"
    assert pairs.converged.all()
    assert pairs.num_matvecs == 1
    torch.testing.assert_close(pairs.eigenvalues, values[:k], **CLOSE)
    V = pairs.eigenvectors
    torch.testing.assert_close(V.mT @ V, torch.eye(k, dtype=V.dtype), **CLOSE)
    assert (vectors[:, :k].mT @ V).abs().diagonal().min() > 1 - 1e-9
    true = (G @ V.clone() - V * pairs.eigenvalues).norm(dim=0)
    assert float((pairs.residuals - true).abs().max()) < 1e-12 * float(values[0])


def test_overlaps_need_no_basis(problem):
    G, _values, vectors = problem
    space, dim, k = SampleSpace(G), len(vectors), 4
    V = vectors[:, :k]
    mask = torch.zeros(dim, dtype=torch.bool)
    mask[torch.randperm(dim)[:9]] = True
    assert math.isclose(space.overlap(mask, k), hesscurv.overlap(mask, V), abs_tol=1e-10)
    scores = torch.rand(dim, dtype=torch.float64)
    got, expected = (
        f(scores)
        for f in (
            lambda s: space.overlap_by_k(s, [1, 3, 4]),
            lambda s: hesscurv.overlap_by_k(s, V, [1, 3, 4]),
        )
    )
    torch.testing.assert_close(got, expected, **CLOSE)
    torch.testing.assert_close(space.leverage(k), hesscurv.leverage_scores(V), **CLOSE)
    parts = space.overlap_by_parameter(mask, k)
    expected = hesscurv.overlap_by_parameter(mask, V, G.layout)
    assert all(math.isclose(parts[n], p.overlap, abs_tol=1e-10) for n, p in expected.items())
    assert math.isclose(sum(parts.values()), space.overlap(mask, k), rel_tol=1e-12)


def test_functions_of_the_spectrum_are_exact(problem):
    G, values, _ = problem
    space, damping = SampleSpace(G), 0.1
    assert math.isclose(space.trace(), float(values.sum()), rel_tol=1e-10)
    assert math.isclose(
        space.log_determinant(damping),
        float((values.clamp(min=0) + damping).log().sum()),
        rel_tol=1e-9,
    )
    expected = float((values / (values + damping)).sum())
    assert math.isclose(space.effective_dimension(damping), expected, rel_tol=1e-9)


def test_spaces_of_two_steps_overlap_as_their_bases_do():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batch = (torch.randn(10, 6).double(), torch.randint(0, 3, (10,)))
    G, k = GGNOperator(net, hesscurv.supervised(nn.CrossEntropyLoss()), [batch]), 5
    first, early = SampleSpace(G), eigsh(G, k, method="sample_space")
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn_like(p)
    later, late = SampleSpace(G), eigsh(G, k, method="sample_space")
    expected = hesscurv.overlap(early, late)
    assert expected < 0.99
    assert math.isclose(first.overlap_with(later, k), expected, abs_tol=1e-9)


def test_multiplicities_are_found():
    # Orthogonal samples of equal size: four times the same eigenvalue.
    net = nn.Linear(4, 1, bias=False).double()
    batch = (torch.eye(4).double(), torch.zeros(4, 1).double())
    G = GGNOperator(net, hesscurv.supervised(nn.MSELoss()), [batch])
    pairs = eigsh(G, 4, method="sample_space")
    torch.testing.assert_close(pairs.eigenvalues, torch.full((4,), 0.5).double(), **CLOSE)


# -- the choice -----------------------------------------------------------------------------------


def small(samples=24, dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 60), nn.Tanh(), nn.Linear(60, 3)).to(dtype)
    batch = (torch.randn(samples, 10, dtype=dtype), torch.randint(0, 3, (samples,)))
    return net, hesscurv.supervised(nn.CrossEntropyLoss()), [batch]


def test_auto_takes_sample_space_where_rows_are_few():
    F = EmpiricalFisherOperator(*small())
    pairs, products = eigsh(F, 10), eigsh(F, 10, method="block_krylov")
    assert (pairs.method, products.method) == ("sample_space", "block_krylov")
    torch.testing.assert_close(pairs.eigenvalues, products.eigenvalues, rtol=1e-5, atol=1e-9)
    # Options of the Krylov method ask for it, and so does what only it has.
    assert eigsh(F, 10, block_size=4).method == "block_krylov"
    assert eigsh(F, 10, initial=products).method == "block_krylov"
    assert eigsh(F, 10, max_matvecs=200).method == "block_krylov"
    assert eigsh(hesscurv.HessianOperator(*small()), 3).method == "block_krylov"
    assert eigsh(EmpiricalFisherOperator(*small(2000)), 3).method == "block_krylov"


def test_auto_takes_products_for_the_tail_that_the_dtype_does_not_carry():
    net, task, [(x, y)] = small(dtype=torch.float32)
    x *= 0.3 ** torch.arange(len(x)).unsqueeze(1)  # gradients of the last are tiny
    first, last = net[0], net[2]
    torch.nn.init.zeros_(first.bias)
    F = EmpiricalFisherOperator(net, task, [(x, y)], params=[first.weight, last.weight])
    space, k = SampleSpace(F), 20
    assert space.rank < k < len(space)
    with pytest.raises(ValueError, match="above the rounding of"):
        eigsh(F, k, method="sample_space")
    assert eigsh(F, k).method == "block_krylov"


def test_the_same_generator_gives_the_same_pairs():
    F = EmpiricalFisherOperator(*small())
    a, b = (eigsh(F, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a.eigenvectors, b.eigenvectors)
    assert a.method == "sample_space"


def test_errors_say_what_to_do():
    F = EmpiricalFisherOperator(*small())
    with pytest.raises(ValueError, match=r"expected 1 <= k <= 24.*method='block_krylov'"):
        eigsh(F, 30, method="sample_space")
    with pytest.raises(ValueError, match="'LM' or 'LA', got 'SA'"):
        eigsh(F, 3, method="sample_space", which="SA")
    with pytest.raises(NoRowsError, match="use method='block_krylov'"):
        eigsh(torch.eye(4), 2, method="sample_space")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    batch = (torch.randn(6, 4).double(), torch.randn(6, 2).double())
    G = GGNOperator(net, hesscurv.supervised(nn.MSELoss()), [batch], training=True)
    with pytest.raises(NoRowsError, match=r"single samples|depend on each other"):
        eigsh(G, 2, method="sample_space")
    space = SampleSpace(F)
    with pytest.raises(ValueError, match="finite damping > 0"):
        space.effective_dimension(0.0)
    with pytest.raises(ValueError, match="expected a bool mask"):
        space.overlap(torch.ones(F.shape[0]), 3)
