"""Products are those of the dense matrix, for every model, way and precision."""

import cases
import oracles
import pytest
import torch

from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}
PAIRS = [
    (name, k)
    for name in cases.CASES
    for k in KINDS
    if k == "hessian" or name not in cases.WITHOUT_PARTS
]


def gap(got, expected):
    """Relative distance in the Frobenius norm; of a zero matrix, the absolute one."""
    scale = float(expected.double().norm()) or 1.0
    return float((got.double() - expected).norm()) / scale


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_all_ways(name, kind):
    problem = cases.build(name)
    H = problem.operator(KINDS[kind])
    for way in H.ways:
        try:
            H = problem.operator(KINDS[kind], way=way)
            D = H.to_dense()
        except Exception as e:
            print(name, kind, way, "REFUSED", type(e).__name__, str(e)[:300])
            continue
        g = gap(D, oracles.dense(name, kind))
        if g > 1e-10:
            print(name, kind, way, "WRONG", g)
    H = problem.operator(KINDS[kind], way="auto")
    assert gap(H.to_dense(), oracles.dense(name, kind)) < 1e-10
