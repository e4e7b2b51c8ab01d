"""State dicts: training goes on with the same bits, or says why it cannot."""

import copy
import io
import pickle

import pytest
import torch
from optim.training import TASK, data, net, precondition, quietly, sgd, train, weights
from torch import nn
from torch.optim import lr_scheduler

from hesscurv.optim.group_settings import DUE, LAST, STEP
from hesscurv.optim.preconditioner.tracked_preconditioner import BASIS, OWN_STATE, VALUES

BASES = {
    "SGD": lambda p, **k: torch.optim.SGD(p, **{"lr": 0.01} | k),
    "SGD, momentum": lambda p, **k: torch.optim.SGD(p, **{"lr": 0.01, "momentum": 0.9} | k),
    "SGD, foreach": lambda p, **k: torch.optim.SGD(
        p, **{"lr": 0.01, "momentum": 0.9, "foreach": True} | k
    ),
    "SGD, fused": lambda p, **k: torch.optim.SGD(
        p, **{"lr": 0.01, "momentum": 0.9, "fused": True} | k
    ),
    "AdamW": lambda p, **k: torch.optim.AdamW(p, **{"lr": 0.01} | k),
    "AdamW, foreach": lambda p, **k: torch.optim.AdamW(p, **{"lr": 0.01, "foreach": True} | k),
    "AdamW, fused": lambda p, **k: torch.optim.AdamW(p, **{"lr": 0.01, "fused": True} | k),
    "AdamW, amsgrad": lambda p, **k: torch.optim.AdamW(p, **{"lr": 0.01, "amsgrad": True} | k),
}


def saved(value):
    """What a file keeps of it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def build(base="SGD, momentum", dtype=torch.float64, seed=1, changes=None, **options):
    model = net(dtype, seed)
    made = BASES[base](model.parameters(), **(changes or {}))
    options = {"learning_rate": "auto" if "SGD" in base else None, "max_growth": 2.0} | options
    return model, precondition(made, model, TASK, data(dtype=dtype), **options)


# -- the same bits ----------------------------------------------------------------------------


ALL = [(base, 5) for base in BASES]
ALL += [(base, stop) for base in ("SGD, momentum", "AdamW, amsgrad") for stop in (1, 6)]


@pytest.mark.parametrize(("base", "stop"), ALL)
def test_training_resumes_with_the_same_bits(base, stop):
    """In the midst of an interval of three steps, and at a refresh."""
    model, optimizer = build(base)
    train(model, optimizer, stop)
    weights_file, file = saved(model.state_dict()), saved(optimizer.state_dict())
    expected = train(model, optimizer, 10 - stop, first=stop)
    # Another process has another net, and starts from other hyperparameters.
    other, resumed = build(
        base,
        seed=9,
        changes={"lr": 0.5, "weight_decay": 0.3},
        rank=5,
        damping=2.0,
        refresh_every=50,
    )
    other.load_state_dict(weights_file)
    resumed.load_state_dict(file)
    assert torch.equal(train(other, resumed, 10 - stop, first=stop), expected)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][key]), key
    for ours, theirs in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        assert {**ours, "params": 0} == {**theirs, "params": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_basis_keeps_its_bits_whatever_the_parameters_dtype(dtype):
    model, optimizer = build(dtype=dtype)
    train(model, optimizer, 2)
    file, weights_file = saved(optimizer.state_dict()), saved(model.state_dict())
    other, resumed = build(dtype=dtype, seed=9)
    other.load_state_dict(weights_file)
    resumed.load_state_dict(file)
    ours, theirs = optimizer._tracked.current, resumed._tracked.current
    assert theirs.basis_mD.dtype == torch.float32
    assert torch.equal(ours.basis_mD, theirs.basis_mD)
    assert (ours.eigenvalues, ours.residuals) == (theirs.eigenvalues, theirs.residuals)
    expected = train(model, optimizer, 4, first=2)
    assert torch.equal(train(other, resumed, 4, first=2), expected)


def test_a_schedulers_and_the_interval_in_time_go_on_too():
    model, optimizer = build(refresh_every=None)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=20)
    train(model, optimizer, 3, after=lambda _: scheduler.step())
    files = [saved(x.state_dict()) for x in (model, optimizer, scheduler)]
    other, resumed = build(refresh_every=None, seed=9)
    rates = lr_scheduler.OneCycleLR(resumed, 0.01, total_steps=20)
    for x, file in zip((other, resumed, rates), files, strict=True):
        x.load_state_dict(file)
    # Within the first ten steps no refresh is decided on.
    expected = train(model, optimizer, 5, first=3, after=lambda _: scheduler.step())
    got = train(other, resumed, 5, first=3, after=lambda _: rates.step())
    assert torch.equal(got, expected)


def test_an_earlier_state_may_be_gone_back_to():
    model, optimizer = build()
    train(model, optimizer, 2)
    files = saved(model.state_dict()), saved(optimizer.state_dict())
    expected = train(model, optimizer, 5, first=2)
    train(model, optimizer, 4, first=7)
    for x, file in zip((model, optimizer), files, strict=True):
        x.load_state_dict(file)
    assert torch.equal(train(model, optimizer, 5, first=2), expected)


def test_a_group_added_before_saving_is_resumed_with():
    def start():
        model = net()
        base = torch.optim.SGD(model[0].parameters(), lr=0.01, momentum=0.9)
        return model, precondition(base, model, refresh_every=100)

    def add(model, optimizer):
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.02})

    model, optimizer = start()
    train(model, optimizer, 2)
    add(model, optimizer)
    files = saved(model.state_dict()), saved(optimizer.state_dict())
    expected = train(model, optimizer, 3, first=2)
    other, resumed = start()
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, got \[2, 2\]; add the same"):
        resumed.load_state_dict(files[1])
    add(other, resumed)
    for x, file in zip((other, resumed), files, strict=True):
        x.load_state_dict(file)
    assert torch.equal(train(other, resumed, 3, first=2), expected)


def test_after_a_failure_the_interval_goes_on_too():
    def broken(model, batch):
        if broken.is_so:
            raise RuntimeError("a damaged sample")
        return TASK(model, batch)

    def start():
        model = net()
        return model, precondition(torch.optim.SGD(model.parameters(), lr=0.01), model, broken)

    broken.is_so = True
    model, optimizer = start()
    quietly(lambda: train(model, optimizer, 2))
    files = saved(model.state_dict()), saved(optimizer.state_dict())
    assert not files[1]["state"][0][BASIS].any()
    broken.is_so = False
    expected = train(model, optimizer, 4, first=2)
    other, resumed = start()
    for x, file in zip((other, resumed), files, strict=True):
        x.load_state_dict(file)
    assert torch.equal(train(other, resumed, 4, first=2), expected)


# -- other state dicts ------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["SGD", "SGD, momentum", "AdamW"])
def test_a_state_dict_of_the_base_alone_is_taken(base):
    alone = net()
    plain = BASES[base](alone.parameters())
    train(alone, plain, 3)
    model, optimizer = build(base, rank=2, refresh_every=4)
    train(model, optimizer, 2)  # another eigenspace than what is to come
    model.load_state_dict(alone.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.param_groups[0]["curvature_rank"] == 2
    refreshes = optimizer.report().refreshes
    train(model, optimizer, 1, first=3)
    assert optimizer.report().refreshes == refreshes + 1
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert optimizer.base.state[p].keys() == plain.state[q].keys()


def test_the_base_alone_takes_over_where_the_wrapper_was():
    model, optimizer = build("AdamW")
    train(model, optimizer, 3)
    alone = copy.deepcopy(model)
    plain = BASES["AdamW"](alone.parameters())
    plain.load_state_dict(optimizer.base.state_dict())
    train(alone, plain, 2, first=3)
    assert torch.isfinite(weights(alone)).all()


@pytest.mark.parametrize("of", ["fewer", "more"])
def test_an_eigenspace_of_other_parameters_is_computed_anew(of):
    whole, part = {"params": None}, {"params": ["0"]}
    model, optimizer = build(**(part if of == "fewer" else whole))
    train(model, optimizer, 2)
    other, resumed = build(**(whole if of == "fewer" else part))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert resumed.report().gains == []
    train(other, resumed, 1, first=2)
    basis_mD = resumed._tracked.current.basis_mD
    eye = torch.eye(len(basis_mD), dtype=torch.float64)
    torch.testing.assert_close(basis_mD @ basis_mD.mT, eye, rtol=0, atol=1e-10)


def change(state, **entries):
    """A copy of a state dict with other entries of the first parameter."""
    state = copy.deepcopy(state)
    state["state"][0].update(entries)
    return state


def of_a_wider_net(state):
    model = nn.Sequential(nn.Linear(5, 7), nn.Softplus(), nn.Linear(7, 1)).double()
    optimizer = sgd(model)
    train(model, optimizer, 2)
    return optimizer.state_dict()


REFUSED = {
    "another model's": (of_a_wider_net, r"curvature_basis of shape \(6, 5, 4\) for a parameter"),
    "one more layer": (
        lambda state: (
            state | {"param_groups": [state["param_groups"][0] | {"params": [0, 1, 2, 3, 4, 5]}]}
        ),
        r"groups of \[4\] parameters, got \[6\]",
    ),
    "cut": (lambda state: change(state, **{BASIS: torch.zeros(6, 5, 3)}), "same model"),
    "no tensor": (lambda state: change(state, **{VALUES: 3.0}), "expected tensors"),
    "empty": (lambda state: change(state, **{VALUES: torch.zeros(0)}), "expected"),
    "a number": (lambda state: change(state, **{VALUES: torch.tensor(1.0)}), "expected"),
    "NaN": (
        lambda state: change(state, **{VALUES: torch.full((4,), torch.nan)}),
        "expected finite curvature_eigenvalues",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_has_changed(name):
    make, message = REFUSED[name]
    model, optimizer = build()
    train(model, optimizer, 2)
    state = make(optimizer.state_dict())
    before = saved(optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, entry in before["state"].items():
        for key, value in entry.items():
            assert torch.equal(after["state"][number][key], value)
    expected = train(twin.model, twin, 4, first=2)
    assert torch.equal(train(model, optimizer, 4, first=2), expected)


# -- what a state dict is ---------------------------------------------------------------------


def test_a_state_dict_has_tensors_by_parameter_and_plain_values_by_group():
    model, optimizer = build()
    assert optimizer.state_dict()["state"] == {}
    train(model, optimizer, 5)
    state = optimizer.state_dict()
    for number, p in enumerate(model.parameters()):
        entry = state["state"][number]
        assert set(OWN_STATE) | {"momentum_buffer"} == set(entry)
        assert entry[BASIS].shape == (*p.shape, 4)
        assert optimizer.state[p].keys() == entry.keys()
    (group,) = state["param_groups"]
    assert group["params"] == [0, 1, 2, 3]
    assert (group[STEP], group[LAST], group[DUE]) == (5, 3, None)
    plain = (int, float, str, bool, type(None), list)
    assert all(isinstance(value, plain) for value in group.values())


def test_a_state_dict_of_an_earlier_time_keeps_its_values():
    model, optimizer = build()
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    basis = state["state"][0][BASIS].clone()
    train(model, optimizer, 5, first=2)
    assert torch.equal(state["state"][0][BASIS], basis)


def test_a_file_holds_the_basis_once():
    model, optimizer = build("SGD")
    train(model, optimizer, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    held = 4 * sum(p.numel() for p in model.parameters()) * 8
    assert held < file.tell() < held + 12000  # the rest is names, numbers and a zip's records


# -- copies -----------------------------------------------------------------------------------


def by_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("base", ["SGD, momentum", "AdamW"])
def test_a_copy_goes_on_with_the_same_bits_and_a_model_of_its_own(base, scheduled, copied):
    model, optimizer = build(base)
    if scheduled:
        lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    train(model, optimizer, 2)
    other = copied(optimizer)
    assert other.model is not model
    owned = [p for group in other.param_groups for p in group["params"]]
    assert all(p is q for p, q in zip(other.model.parameters(), owned, strict=True))
    before = weights(model)
    got = train(other.model, other, 5, first=2)
    assert torch.equal(weights(model), before)
    assert torch.equal(got, train(model, optimizer, 5, first=2))
    assert other.report().refreshes == optimizer.report().refreshes


def test_a_copy_takes_a_scheduler_hooks_and_groups():
    model, optimizer = build()
    train(model, optimizer, 1)
    other, said = copy.deepcopy(optimizer), []
    other.register_step_pre_hook(lambda *_: said.append("step"))
    scheduler = lr_scheduler.StepLR(other, 1)
    train(other.model, other, 2, first=1, after=lambda _: scheduler.step())
    assert said == ["step", "step"]
    assert other.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert optimizer.param_groups[0]["lr"] == 0.01
    other.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    train(other.model, other, 1, first=3)
    assert len(optimizer.param_groups) == 1


def test_a_copy_of_one_that_has_not_begun_begins_alike():
    model, optimizer = build()
    other = copy.deepcopy(optimizer)
    assert torch.equal(train(other.model, other, 4), train(model, optimizer, 4))
