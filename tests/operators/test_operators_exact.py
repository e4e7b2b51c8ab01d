"""Products are those of the dense matrix: for every model, way of computing, and precision."""

import cases
import oracles
import pytest
import torch

from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}
ALL = [(name, kind) for name in cases.CASES for kind in cases.kinds(name)]
BY_WAY = [
    pytest.param(name, kind, way, marks=[pytest.mark.slow] if name in cases.SLOW_TO_TRACE else [])
    for name, kind in ALL
    if name in cases.OWN_GRAPH
    for way in KINDS[kind].ways
    if way not in cases.REFUSED.get((name, kind), ())
]
REFUSED = [(name, kind, way) for (name, kind), ways in cases.REFUSED.items() for way in ways]


def gap(got, expected):
    """Relative distance in the Frobenius norm; of a zero matrix, the absolute one."""
    scale = float(expected.double().norm()) or 1.0
    return float((got.double() - expected.double()).norm()) / scale


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_the_matrix_is_exact_in_float64(name, kind):
    # Chosen ways are timed, which takes a while: that is left to a few.
    way = "auto" if name in ("mlp", "conv_bn", "transformer") else "batched"
    operator = cases.build(name).operator(KINDS[kind], way=way)
    assert gap(operator.to_dense(), oracles.dense(name, kind)) < 1e-10


@pytest.mark.parametrize(("name", "kind", "way"), BY_WAY)
def test_every_way_is_exact(name, kind, way):
    # One batch, unchecked, so that a derivative is traced once.
    operator = cases.build(name, batches=1).operator(KINDS[kind], way=way, check=False)
    expected = oracles.dense(name, kind, 1)
    vectors = torch.randn(operator.shape[0], 3, dtype=torch.float64)
    assert gap(operator @ vectors, expected @ vectors) < 1e-10
    assert gap(operator @ vectors[:, 1], expected @ vectors[:, 1]) < 1e-10
    assert gap(vectors.T @ operator, vectors.T @ expected) < 1e-10


def test_the_ggn_of_a_linear_model_is_its_hessian():
    problem = cases.build("linear")
    G, H = problem.operator(GGNOperator).to_dense(), problem.operator(HessianOperator).to_dense()
    assert gap(G, H) < 1e-10


def test_ragged_batches_make_the_matrix_of_all_their_samples():
    problem = cases.build("ragged")
    whole = cases.build("ragged")
    whole.batches = [tuple(torch.cat(parts) for parts in zip(*problem.batches, strict=True))]
    for kind, operator in KINDS.items():
        got = problem.operator(operator).to_dense()
        assert gap(got, whole.operator(operator).to_dense()) < 1e-10
        assert gap(got, oracles.MATRICES[kind](whole)) < 1e-10


@pytest.mark.parametrize(("name", "kind", "way"), REFUSED)
def test_a_way_that_torch_lacks_is_refused_and_not_wrong(name, kind, way):
    operator = cases.build(name).operator(KINDS[kind], way=way)
    with pytest.raises(ValueError, match=f"way='{way}' cannot be used: on micro-batch 0"):
        operator @ torch.ones(operator.shape[0], dtype=torch.float64)
