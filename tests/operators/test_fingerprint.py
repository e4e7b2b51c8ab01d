"""Fingerprints tell operators apart and are the same for the same one."""

import copy

import pytest
import torch
from torch import nn

import hesscurv
from hesscurv.operators.fingerprint import differences, fingerprint
from hesscurv.operators.matrix_operators import as_linear_operator


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    batches = [(torch.randn(6, 4), torch.randint(2, (6,))) for _ in range(2)]
    return model, batches


def marks(model, batches, **options):
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    return fingerprint(hesscurv.HessianOperator(model, task, batches, **options))


def test_a_copy_has_the_same_fingerprint(parts):
    model, batches = parts
    first, second = marks(model, batches), marks(copy.deepcopy(model), copy.deepcopy(batches))
    assert differences(first, second) == []


def test_the_way_of_computing_does_not_matter(parts):
    first, second = (marks(*parts, way=way) for way in hesscurv.HessianOperator.ways[:2])
    assert first == second


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        (lambda m, b: m[0].weight.data.add_(1e-6), "values"),
        (lambda m, b: m[1].running_mean.add_(0.1), "constants"),
        (lambda m, b: b[1][0].mul_(1.01), "batches"),
        (lambda m, b: b[0][1].sub_(1).abs_(), "batches"),
    ],
)
def test_what_changes_is_named(parts, change, entry):
    model, batches = parts
    before = marks(model, batches)
    with torch.no_grad():
        change(model, batches)
    assert differences(before, marks(model, batches)) == [entry]


def test_a_subset_of_the_parameters_is_another_operator(parts):
    found = differences(marks(*parts), marks(*parts, params=["0"]))
    assert {"size", "parameters", "values"} <= set(found)


def test_dense_operators_differ_by_their_entries():
    A = torch.diag(torch.arange(1.0, 5.0))
    first, second = (fingerprint(as_linear_operator(M)) for M in (A, A + torch.eye(4)))
    assert differences(first, second) == ["entries"]


def test_a_fingerprint_between_a_step_and_a_product_hides_nothing(parts):
    model, batches = parts
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    H = hesscurv.HessianOperator(model, task, batches)
    vector = torch.ones(H.shape[0])
    H @ vector
    with torch.no_grad():
        model[0].weight.mul_(2)
    fingerprint(H)
    assert torch.equal(H @ vector, hesscurv.HessianOperator(model, task, batches) @ vector)
