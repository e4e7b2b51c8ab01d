"""A preconditioned optimizer is used as any of torch's: hooks, closures, schedulers, scalers."""

import math

import pytest
import torch
from optim.training import TASK, data, net, precondition, sgd, train, weights
from torch import nn
from torch.optim import lr_scheduler


def one_gradient(model, batch=None):
    TASK(model, data()[0] if batch is None else batch).backward()


# -- gradients and closures -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["gradient", "update"])
def test_gradients_are_the_same_objects_with_the_same_bits_after_a_step(mode):
    model = net()
    optimizer = sgd(model, mode=mode)
    for _ in range(4):
        optimizer.zero_grad()
        one_gradient(model)
        found = [p.grad for p in model.parameters()]
        copies = [g.clone() for g in found]
        optimizer.step()
        for p, g, before in zip(model.parameters(), found, copies, strict=True):
            assert p.grad is g
            assert torch.equal(g, before)


@pytest.mark.parametrize("mode", ["gradient", "update"])
def test_gradients_are_as_found_when_the_base_raises(mode):
    model = net()
    optimizer = sgd(model, mode=mode)
    one_gradient(model)
    optimizer.step()
    found = [p.grad for p in model.parameters()]

    def fail(*_):
        raise ZeroDivisionError

    optimizer.base.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), found, strict=True))
    assert optimizer.report().steps == 1


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_closure_is_evaluated_once_with_gradients_on_and_its_loss_returned(base):
    model, calls = net(), []
    optimizer = precondition(base(model.parameters(), lr=0.01), model)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = TASK(model, data()[0])
        loss.backward()
        calls.append(loss.detach())
        return loss

    for step in range(4):
        with torch.no_grad():
            got = optimizer.step(closure)
        assert len(calls) == step + 1
        assert got.detach() is not None
        assert torch.equal(got, calls[-1])
    other = net()
    plain = precondition(base(other.parameters(), lr=0.01), other)
    for _ in range(4):
        plain.zero_grad()
        one_gradient(other)
        assert plain.step() is None
    assert torch.equal(weights(model), weights(other))


def test_accumulated_gradients_are_those_of_one_larger_batch():
    first, second = net(), net()
    batches = data()
    whole = tuple(torch.cat([batches[0][i], batches[1][i]]) for i in (0, 1))
    one, other = sgd(first), sgd(second)
    for _ in range(4):
        one.zero_grad()
        one_gradient(first, whole)
        one.step()
        other.zero_grad()
        for batch in batches[:2]:
            (TASK(second, batch) / 2).backward()
        other.step()
    # The same but for the order of sums.
    torch.testing.assert_close(weights(first), weights(second), rtol=1e-10, atol=1e-12)


def test_clipped_gradients_are_what_is_preconditioned():
    model, other = net(), net()
    optimizer, plain = sgd(model), sgd(other)
    for _ in range(3):
        for m, o in ((model, optimizer), (other, plain)):
            o.zero_grad()
            one_gradient(m)
            if m is model:
                norm = nn.utils.clip_grad_norm_(m.parameters(), 0.01)
            else:
                for p in m.parameters():
                    p.grad.mul_(0.01 / (norm + 1e-6))
            o.step()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=0)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_is_the_bases(to_none):
    model = net()
    optimizer = sgd(model)
    one_gradient(model)
    optimizer.zero_grad(to_none)
    for p in model.parameters():
        assert p.grad is None if to_none else not p.grad.any()


# -- hooks ------------------------------------------------------------------------------------


def test_every_hook_runs_once_whether_the_wrappers_or_the_bases():
    model, said = net(), []
    optimizer = sgd(model)

    def note(name):
        return lambda *_: said.append(name)

    for name, o in (("wrapper", optimizer), ("base", optimizer.base)):
        o.register_step_pre_hook(note(f"{name}, before a step"))
        o.register_step_post_hook(note(f"{name}, after a step"))
        o.register_state_dict_pre_hook(note(f"{name}, before saving"))
        o.register_state_dict_post_hook(note(f"{name}, after saving"))
        o.register_load_state_dict_pre_hook(note(f"{name}, before loading"))
        o.register_load_state_dict_post_hook(note(f"{name}, after loading"))
    one_gradient(model)
    saved = {}
    for kind, act in {
        "a step": optimizer.step,
        "saving": lambda: saved.update(optimizer.state_dict()),
        "loading": lambda: optimizer.load_state_dict(saved),
    }.items():
        said.clear()
        act()
        assert sorted(said) == sorted(
            f"{name}, {when} {kind}" for name in ("base", "wrapper") for when in ("after", "before")
        )


def test_hooks_may_change_what_goes_in_and_out():
    model = net()
    optimizer = sgd(model)
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"note": 3})
    state = optimizer.state_dict()
    assert state["note"] == 3

    def forget_rate(_, state):
        groups = [group | {"lr": 0.5} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(forget_rate)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert state["param_groups"][0]["lr"] == 0.01


# -- schedulers -------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, 3),
}


@pytest.mark.parametrize(
    ("name", "of"), [*((name, "wrapper") for name in SCHEDULERS), (next(iter(SCHEDULERS)), "base")]
)
def test_every_scheduler_gives_the_rates_that_it_gives_the_base(name, of):
    model, alone = net(), net()
    optimizer, plain = sgd(model), torch.optim.SGD(alone.parameters(), lr=0.01, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer if of == "wrapper" else optimizer.base)
    expected = SCHEDULERS[name](plain)
    for step in range(6):
        train(model, optimizer, 1, first=step)
        train(alone, plain, 1, first=step)
        scheduler.step()
        expected.step()
        for key in ("lr", "momentum"):  # cyclic ones turn both
            assert optimizer.param_groups[0][key] == plain.param_groups[0][key]
    assert optimizer.param_groups is optimizer.base.param_groups


def test_a_plateau_is_noticed():
    model = net()
    optimizer = sgd(model)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1)
    for step in range(4):
        train(model, optimizer, 1, first=step)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_a_rate_that_a_scheduler_set_is_the_rate_of_the_step():
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = precondition(base, model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: [1.0, 0.0, 0.5][epoch])
    moved = []
    for step in range(3):
        before = weights(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append(before - weights(model))
        if step < 2:
            scheduler.step()
    assert not moved[1].any()
    torch.testing.assert_close(moved[2], 0.5 * moved[0], rtol=1e-9, atol=1e-12)


# -- scaled gradients -------------------------------------------------------------------------

FUSED = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_changes_nothing_but_for_overflow(base, unscale):
    model, other = net(torch.float32), net(torch.float32)
    batches = data(dtype=torch.float32)
    options = {"task": TASK, "batches": batches}
    optimizer = precondition(FUSED[base](model.parameters()), model, **options)
    plain = precondition(FUSED[base](other.parameters()), other, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(TASK(model, batches[step % 4])).backward()
        overflows = step == 2
        if overflows:
            model[0].weight.grad[0, 0] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
        before, steps = weights(model), optimizer.report().steps
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weights(model), before) == overflows
        assert optimizer.report().steps == steps + (not overflows)
        if not overflows:
            train_one(other, plain, batches[step % 4])
    assert scaler.get_scale() == 2.0**9
    # Scaling by powers of two is exact; fused kernels may be told the scale, or not.
    assert torch.equal(weights(model), weights(other))


def train_one(model, optimizer, batch):
    optimizer.zero_grad()
    TASK(model, batch).backward()
    optimizer.step()


# -- attributes -------------------------------------------------------------------------------


def test_attributes_that_the_base_has_are_found():
    class WithModes(torch.optim.SGD):
        mode = "train"

        def eval(self):
            self.mode = "eval"

    model = net()
    optimizer = precondition(WithModes(model.parameters(), lr=0.1), model)
    assert optimizer.mode == "gradient"  # the wrapper's own come first
    optimizer.eval()
    assert optimizer.base.mode == "eval"
    with pytest.raises(AttributeError, match="PreconditionedOptimizer' object has no attribute"):
        _ = optimizer._step_supports_amp_scaling
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = optimizer.nothing
    assert "rank=3" in repr(optimizer)
    assert "WithModes" in repr(optimizer)
