"""Whatever changes between two products is noticed: weights, buffers, modes, data."""

import cases
import oracles
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hesscurv import GGNOperator, HessianOperator


def gap(got, expected):
    return float((got - expected).norm() / expected.norm())


def flip_sign(model):
    model[2].weight.data.neg_()


def reverse(model):
    model[2].weight.data.copy_(model[2].weight.data.flip(1))


def nudge_one_entry(model):
    model[0].weight.data[0, 0] += 1e-4


def replace(model):
    model[0].weight = nn.Parameter(2 * model[0].weight.detach())


def load_by_assignment(model):
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)


def replace_data(model):
    model[0].weight.data = 2 * model[0].weight.data


def step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Adam(model.parameters(), 0.1).step()
    model.zero_grad()


CHANGES = [flip_sign, reverse, nudge_one_entry, replace, load_by_assignment, replace_data, step]


ALL = [(change, "retained") for change in CHANGES]
ALL += [(nudge_one_entry, way) for way in HessianOperator.ways[1:]]


@pytest.mark.parametrize(("change", "way"), ALL)
def test_a_changed_weight_is_noticed(change, way):
    problem = cases.build("mlp", batches=1)
    H = problem.operator(HessianOperator, way=way, check=False)
    V = torch.randn(H.shape[0], 2, dtype=torch.float64)
    before = H @ V
    change(problem.model)
    expected = oracles.dense_hessian(problem) @ V
    assert gap(before, expected) > 1e-6
    assert gap(H @ V, expected) < 1e-10


@pytest.mark.parametrize("change", [nudge_one_entry, replace, load_by_assignment, replace_data])
@pytest.mark.parametrize("name", ["by_module", "frozen"])
def test_a_change_in_weights_that_are_not_selected_is_noticed(name, change):
    problem = cases.build(name)
    problem.model.double()
    H = problem.operator(HessianOperator)
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    change(problem.model)
    if name == "frozen":  # assigning makes a new parameter, which is not
        problem.model[0].weight.requires_grad_(False)
    assert gap(H.to_dense(), oracles.dense_hessian(problem)) < 1e-10


def test_changed_half_precision_weights_are_noticed_beside_their_copies():
    problem = cases.build("by_module").cast(torch.bfloat16)
    H = problem.operator(HessianOperator)
    H @ torch.ones(H.shape[0])
    for p in problem.model.parameters():
        p.data.mul_(2)
    fresh = problem.operator(HessianOperator)
    torch.testing.assert_close(H.to_dense(), fresh.to_dense(), rtol=0, atol=0)


def test_changed_batch_statistics_are_noticed():
    problem = cases.build("conv_bn")
    G = problem.operator(GGNOperator)
    G @ torch.ones(G.shape[0], dtype=torch.float64)
    problem.model.train()(problem.batches[0][0])
    assert gap(G.to_dense(), oracles.dense_ggn(problem)) < 1e-10


def test_the_mode_is_that_of_the_product_where_it_is_the_models_own():
    problem = cases.build("conv_bn")
    problem.training = None
    H = problem.operator(HessianOperator)
    for training in (True, False, True):
        problem.model.train(training)
        assert gap(H.to_dense(), oracles.dense_hessian(problem)) < 1e-10


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_asked_for_holds_whatever_the_models_own(training):
    problem = cases.build("conv_bn")
    problem.training = training
    for own in (True, False):
        problem.model.train(own)
        expected = oracles.dense_hessian(problem)
        assert gap(problem.operator(HessianOperator).to_dense(), expected) < 1e-10


@pytest.mark.parametrize("name", ["pinn", "pinn_of_model", "pinn_func"])
def test_new_points_of_a_closure_are_noticed(name):
    problem = cases.build(name)
    H = problem.operator(HessianOperator)
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    problem.points[0] = torch.randn(4, 1, dtype=torch.float64)
    assert gap(H.to_dense(), oracles.dense_hessian(problem)) < 1e-10


@pytest.mark.parametrize("options", [{}, {"compute_dtype": torch.float64}, {"memory_budget": 3000}])
def test_data_that_were_written_to_are_noticed(options):
    problem = cases.build("mlp").cast(torch.float32)
    H = problem.operator(HessianOperator, **options)
    H @ torch.ones(H.shape[0], dtype=H.dtype)
    problem.batches[1][0].mul_(-2)
    problem.batches[1][1].zero_()
    got = H.to_dense().double()
    assert gap(got, oracles.dense_hessian(problem.cast(torch.float64))) < 1e-5


@pytest.mark.parametrize("budget", [None, 40])  # 40 bytes: read again in every pass
def test_batches_that_were_added_are_noticed(budget):
    problem = cases.build("mlp").cast(torch.float32)
    H = problem.operator(HessianOperator, memory_budget=budget, compute_dtype=torch.float64)
    assert (H.objective.batches.kept is None) == (budget is not None)
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    problem.batches += problem.batches[:1]
    got = H.to_dense()
    assert gap(got, oracles.dense_hessian(problem.cast(torch.float64))) < 1e-10


def test_a_model_that_was_pruned_since_is_refused_with_a_remedy():
    problem = cases.build("mlp")
    H = problem.operator(HessianOperator)
    prune.l1_unstructured(problem.model[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"expected parameter '0.weight'.*build a new operator"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)


def test_a_model_that_was_converted_since_is_refused_with_a_remedy():
    problem = cases.build("mlp")
    H = problem.operator(HessianOperator)
    problem.model.float()
    with pytest.raises(ValueError, match=r"float64.*got.*float32.*build a new operator"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)


def test_a_product_after_an_error_is_right():
    problem = cases.build("mlp")
    H = problem.operator(HessianOperator)
    weight = problem.model[0].weight
    old = weight.detach().clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite loss"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)
    weight.data.copy_(old)
    assert gap(H.to_dense(), oracles.dense("mlp", "hessian")) < 1e-10
