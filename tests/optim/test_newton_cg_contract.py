"""NewtonCG is used as any optimizer of torch's: groups, states, copies, schedulers, hooks."""

import copy
import io
import math
import pickle

import pytest
import torch
from optim.newton_problems import (
    closure_of,
    flat,
    gradient_of,
    net,
    quadratic,
    regression,
    take_steps,
)
from support.bundles import bundled
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from hesscurv.optim import NewtonOptions
from hesscurv.optim.newton.newton_cg import NewtonCG

OPTIONS = {"rank": 4, "refresh_every": 3}


def through_a_file(state):
    """What comes back of a state dict that is saved, without unpickling."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def weights(model):
    return flat(model.parameters()).detach().clone()


# -- resuming and copying ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_goes_on_with_the_same_bits(dtype, stop):
    model = net(dtype=dtype)
    optimizer = NewtonCG(model.parameters(), **OPTIONS)
    take_steps(optimizer, regression(model), stop)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = take_steps(optimizer, regression(model), 6)

    other = net(seed=1, dtype=dtype)
    other.load_state_dict(saved["model"])
    resumed = NewtonCG(other.parameters())  # other hyperparameters, which the state replaces
    resumed.load_state_dict(saved["optimizer"])
    assert take_steps(resumed, regression(other), 6) == expected
    assert torch.equal(weights(other), weights(model))
    assert resumed.diagnostics() == optimizer.diagnostics()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_with_the_same_bits(way):
    model = net()
    optimizer = NewtonCG(model.parameters(), **OPTIONS)
    take_steps(optimizer, regression(model), 4)
    other, copied = way((model, optimizer))
    expected = take_steps(optimizer, regression(model), 4)
    assert take_steps(copied, regression(other), 4) == expected
    assert torch.equal(weights(other), weights(model))


def test_the_state_is_tensors_and_numbers_by_parameter():
    model = net()
    params = list(model.parameters())
    optimizer = NewtonCG(params, **OPTIONS)
    take_steps(optimizer, regression(model), 2)
    assert set(optimizer.state) == set(params)
    for p in params:
        state = optimizer.state[p]
        assert state["basis"].shape == (*p.shape, 4)
        assert state["eigenvalues"].shape == (4,)
        assert all(isinstance(value, (torch.Tensor, int, float)) for value in state.values())
        assert {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)} == (
            optimizer.diagnostics()
        )
    U = torch.cat([optimizer.state[p]["basis"].reshape(-1, 4) for p in params])
    torch.testing.assert_close(U.mT @ U, torch.eye(4, dtype=U.dtype))


def test_a_loaded_state_is_not_shared():
    model = net()
    optimizer = NewtonCG(model.parameters(), **OPTIONS)
    take_steps(optimizer, regression(model), 2)
    other = copy.deepcopy(model)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    resumed = NewtonCG(other.parameters())
    resumed.load_state_dict(state)
    take_steps(resumed, regression(other), 4)
    for key, own in before["state"].items():
        assert torch.equal(own["basis"], state["state"][key]["basis"])


def test_a_distributed_checkpoint_is_loaded_before_the_first_step():
    model = net()
    optimizer = NewtonCG(model.parameters(), **OPTIONS)
    take_steps(optimizer, regression(model), 4)
    saved = get_optimizer_state_dict(model, optimizer)

    other = copy.deepcopy(model)
    fresh = NewtonCG(other.parameters(), **OPTIONS)
    template = get_optimizer_state_dict(other, fresh)
    assert template["state"].keys() == saved["state"].keys()
    for name, own in saved["state"].items():
        assert own.keys() == template["state"][name].keys()
        assert own["basis"].shape == template["state"][name]["basis"].shape
    set_optimizer_state_dict(other, fresh, saved)
    expected = take_steps(optimizer, regression(model), 4)
    assert take_steps(fresh, regression(other), 4) == expected


def test_a_state_of_zeros_is_no_eigenspace():
    model, plain = net(), net()
    optimizer = NewtonCG(model.parameters(), **OPTIONS)
    get_optimizer_state_dict(model, optimizer)
    expected = take_steps(NewtonCG(plain.parameters(), **OPTIONS), regression(plain), 3)
    assert take_steps(optimizer, regression(model), 3) == expected


def test_a_step_without_a_closure_is_refused():
    optimizer = NewtonCG(net().parameters())
    with pytest.raises(TypeError, match="expected a closure"):
        optimizer.step()


# -- groups and hyperparameters ---------------------------------------------------------------


def test_groups_named_or_not_are_one_set_of_parameters():
    plain, grouped, named = net(), net(), net()
    expected = take_steps(NewtonCG(plain.parameters(), **OPTIONS), regression(plain), 4)
    groups = [{"params": grouped[0].parameters()}, {"params": grouped[2].parameters()}]
    assert take_steps(NewtonCG(groups, **OPTIONS), regression(grouped), 4) == expected
    assert (
        take_steps(NewtonCG(named.named_parameters(), **OPTIONS), regression(named), 4) == expected
    )


def test_the_first_groups_hyperparameters_are_those_of_all():
    a, b = net(), net()
    groups = [{"params": a[0].parameters(), "lr": 0.3}, {"params": a[2].parameters()}]
    expected = take_steps(NewtonCG(b.parameters(), lr=0.3, **OPTIONS), regression(b), 3)
    assert take_steps(NewtonCG(groups, **OPTIONS), regression(a), 3) == expected
    with pytest.raises(ValueError, match=r"as in the first group, got 0\.3"):
        NewtonCG([groups[1], groups[0]])


def test_hyperparameters_may_change_between_steps():
    model = net()
    optimizer = NewtonCG(model.parameters(), rank=4, refresh_every=100)
    loss = regression(model)
    take_steps(optimizer, loss, 2)
    group = optimizer.param_groups[0]
    group["damping"] = 7.0
    take_steps(optimizer, loss, 1)
    assert optimizer.diagnostics()["damping"] in (7.0 / 3, 7.0, 21.0, 70.0)
    group["rank"] = 6
    take_steps(optimizer, loss, 1)
    assert optimizer.state[model[0].weight]["basis"].shape[-1] == 6
    assert optimizer.diagnostics()["refreshed_at"] == 3
    group["refresh_every"] = 1
    take_steps(optimizer, loss, 1)
    assert optimizer.diagnostics()["refreshed_at"] == 4
    group["max_cg"] = 1
    take_steps(optimizer, loss, 1)
    assert optimizer.diagnostics()["cg_iterations"] == 1
    group["cg_tol"] = 2.0
    before = weights(model)
    with pytest.raises(ValueError, match="cg_tol"):
        optimizer.step(loss)
    assert torch.equal(weights(model), before)


def test_constant_damping_stays():
    model = net()
    optimizer = NewtonCG(
        model.parameters(), rank=4, damping=0.1, options=NewtonOptions(adapt_damping=False)
    )
    take_steps(optimizer, regression(model), 4)
    assert optimizer.diagnostics()["damping"] == 0.1


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scheduler_sets_the_first_step_length(as_tensor):
    params, _, loss = quadratic([2.0] * 12)
    lr = torch.tensor(0.5) if as_tensor else 0.5
    optimizer = NewtonCG(params, rank=2, lr=lr, damping=0.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    lengths = []
    for _ in range(3):
        optimizer.step(loss)
        scheduler.step()
        lengths.append(optimizer.diagnostics()["step_length"])
    assert lengths == [0.5, 0.25, 0.125]


def test_with_rate_zero_nothing_moves():
    model = net()
    optimizer = NewtonCG(model.parameters(), lr=0.0)
    before = weights(model)
    loss = regression(model)
    assert torch.equal(optimizer.step(closure_of(optimizer, loss)), loss().detach())
    assert torch.equal(weights(model), before)
    assert optimizer.diagnostics()["num_matvecs"] == 0


def test_at_a_stationary_point_nothing_moves():
    w = nn.Parameter(torch.zeros(3))
    optimizer = NewtonCG([w])
    optimizer.step(lambda: (w**2).sum())
    report = optimizer.diagnostics()
    assert (report["step_length"], report["num_refused"], report["num_matvecs"]) == (0.0, 0, 0)
    assert torch.equal(w, torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rank": -1}, ValueError, "rank >= 0, got -1"),
        ({"rank": 2.5}, TypeError, "rank to be an int"),
        ({"damping": -1e-3}, ValueError, "damping"),
        ({"damping": math.nan}, ValueError, "damping"),
        ({"lr": -1}, ValueError, "lr"),
        ({"lr": "fast"}, TypeError, "lr to be a number"),
        ({"lr": torch.ones(2)}, TypeError, "lr to be a number"),
        ({"refresh_every": 0}, ValueError, "refresh_every >= 1"),
        ({"refresh_tol": 0}, ValueError, "refresh_tol"),
        ({"refresh_matvecs": 0}, ValueError, "refresh_matvecs >= 1"),
        ({"cg_tol": 1.0}, ValueError, "cg_tol"),
        ({"max_cg": 0}, ValueError, "max_cg >= 1"),
        ({"adapt_damping": "no"}, TypeError, "adapt_damping"),
        ({"damping_bounds": 1.0}, TypeError, "damping_bounds"),
        ({"damping_bounds": (1, 0)}, ValueError, "swap them"),
        ({"damping_bounds": (0, math.inf)}, ValueError, "damping_bounds"),
        ({"sufficient_decrease": 0.0}, ValueError, "sufficient_decrease"),
        ({"backtracking": 1.0}, ValueError, "backtracking"),
        ({"max_backtracks": -1}, ValueError, "max_backtracks >= 0"),
        ({"vectorize": None}, TypeError, "vectorize"),
        ({"generator": 0.5}, TypeError, "generator to be a torch.Generator"),
    ],
)
def test_bad_arguments_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        NewtonCG(net().parameters(), **bundled(NewtonOptions, options))


@pytest.mark.parametrize(
    ("param", "error", "words"),
    [
        (torch.zeros(2, dtype=torch.complex64, requires_grad=True), TypeError, "complex64"),
        (torch.zeros(2, device="meta", requires_grad=True), ValueError, "one device"),
        (torch.eye(2).to_sparse().requires_grad_(), TypeError, "sparse"),
    ],
)
def test_parameters_that_form_no_vector_are_refused(param, error, words):
    optimizer = NewtonCG(net().parameters())
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


# -- which parameters move --------------------------------------------------------------------


def test_frozen_and_unused_parameters_are_left_alone():
    model = net()
    unused = nn.Parameter(torch.randn(3, dtype=torch.float64))
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone(), unused.clone()
    optimizer = NewtonCG([*model.parameters(), unused], **OPTIONS)
    losses = take_steps(optimizer, regression(model), 5)
    assert losses[-1] < losses[0]
    assert torch.equal(model[0].bias, before[0])
    assert torch.equal(unused, before[1])
    assert set(optimizer.state) == {model[0].weight, model[2].weight, model[2].bias}


def test_freezing_thawing_and_adding_parameters_is_a_refresh():
    model = net()
    loss = regression(model)
    optimizer = NewtonCG(model[0].parameters(), rank=4, refresh_every=100)
    take_steps(optimizer, loss, 2)
    optimizer.add_param_group({"params": model[2].parameters()})
    take_steps(optimizer, loss, 2)
    assert optimizer.diagnostics()["refreshed_at"] == 2
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    losses = take_steps(optimizer, loss, 2)
    assert optimizer.diagnostics()["refreshed_at"] == 4
    assert torch.equal(model[0].weight, before)
    assert "basis" not in optimizer.state[model[0].weight]
    model[0].weight.requires_grad_(True)
    losses += take_steps(optimizer, loss, 2)
    assert optimizer.diagnostics()["refreshed_at"] == 6
    assert losses == sorted(losses, reverse=True)


def test_a_rank_beyond_the_number_of_entries_is_all_of_them():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = NewtonCG([w])
    optimizer.step(lambda: (w**4).sum())
    assert optimizer.state[w]["basis"].shape == (2, 2)


def test_parameters_of_several_dtypes_move_together():
    a = nn.Parameter(torch.ones(3))
    b = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = NewtonCG([a, b], rank=2)
    for _ in range(3):
        optimizer.step(lambda: (a.double() * b.sum()).square().sum() + (b - 2).square().sum())
    assert a.dtype == torch.float32
    assert a.abs().max() < 0.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_move_by_float32_vectors(dtype):
    model = net(dtype=dtype)
    optimizer = NewtonCG(model.parameters(), **OPTIONS)
    losses = take_steps(optimizer, regression(model), 6)
    assert losses[-1] < losses[0]
    assert optimizer.state[model[0].weight]["basis"].dtype == dtype


# -- hooks and gradients ----------------------------------------------------------------------


def test_step_hooks_run_once_a_step():
    model = net()
    optimizer = NewtonCG(model.parameters(), **OPTIONS)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    take_steps(optimizer, regression(model), 2)
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears(set_to_none):
    model = net()
    optimizer = NewtonCG(model.parameters(), **OPTIONS)
    take_steps(optimizer, regression(model), 1)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_gradients_before_the_step_do_not_matter():
    model, other = net(), net()
    expected = take_steps(NewtonCG(model.parameters(), **OPTIONS), regression(model), 3)
    for p in other.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer = NewtonCG(other.parameters(), **OPTIONS)
    loss = regression(other)

    def without_zero_grad():
        value = loss()
        value.backward()
        return value

    got = [float(optimizer.step(without_zero_grad)) for _ in range(3)]
    assert got == expected[:3]
    assert gradient_of(loss, list(other.parameters())).isfinite().all()
