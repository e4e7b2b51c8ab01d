"""What cannot be computed, or is of no use, is said once; training goes on as without."""

import copy
import math
import warnings

import pytest
import torch
from optim.training import (
    SPECTRA,
    TASK,
    Quadratic,
    data,
    net,
    precondition,
    quadratic_data,
    quadratic_loss,
    quietly,
    set_gradients,
    sgd,
    train,
    weights,
)
from torch import nn

import hesscurv
from hesscurv.optim import CurvatureWarning


class Switched(hesscurv.Task):
    """A task whose loss is NaN, or cannot be computed, at will."""

    def __init__(self, fault=None):
        self.fault = fault

    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        if self.fault == "raises":
            raise RuntimeError("a damaged sample")
        loss = nn.functional.mse_loss(outputs, batch[1])
        if self.fault == "NaN":
            return loss * math.nan
        if self.fault == "no second derivative":  # d sqrt(x) at 0
            return loss + outputs.sub(outputs.detach()).square().sum().sqrt()
        return loss


FAULTS = ("NaN", "no second derivative", "raises")
BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def both(base, task, **options):
    """A preconditioned net, and the same with the base alone."""
    model = net()
    alone = copy.deepcopy(model)
    optimizer = precondition(BASES[base](model.parameters()), model, task, **options)
    return model, optimizer, alone, BASES[base](alone.parameters())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("base", BASES)
def test_a_failure_leaves_exactly_the_bases_steps_and_warns_once(base, fault):
    model, optimizer, alone, plain = both(base, Switched(fault), learning_rate=None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, optimizer, 8)
    train(alone, plain, 8)
    assert torch.equal(weights(model), weights(alone))
    (warning,) = said
    assert warning.category is CurvatureWarning
    assert f"steps are those of {base} alone" in str(warning.message)
    assert warning.filename == __file__.replace("test_curvature_failures", "training")
    report = optimizer.report()
    assert (report.failures, report.refreshes) == (3, 0)  # at 0, 3 and 6
    assert "curvature failed 3 times" in str(report)
    assert report.eigenvalues == report.gains == []


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("first", [False, True], ids=["later", "from the first on"])
def test_it_recovers_at_the_next_refresh(fault, first):
    task = Switched(fault if first else None)
    model, optimizer, *_ = both("SGD", task, learning_rate="auto", max_growth=2.0)
    train(model, optimizer, 3) if not first else quietly(lambda: train(model, optimizer, 3))
    task.fault = fault
    before = weights(model)
    quietly(lambda: train(model, optimizer, 3, first=3))
    assert optimizer.report().rate_factor == 1.0  # the rate is the base's too, meanwhile
    assert optimizer.report().gains == []
    task.fault = None
    train(model, optimizer, 1, first=6)
    report = optimizer.report()
    assert len(report.gains) == 3
    assert report.rate_factor != 1.0
    assert torch.isfinite(weights(model)).all()
    assert not torch.equal(weights(model), before)


def test_the_steps_after_a_recovery_are_preconditioned_as_ever():
    task = Switched("raises")
    model, optimizer, _, _ = both("SGD", task)
    quietly(lambda: train(model, optimizer, 3))
    task.fault = None
    # One that begins here, with the same momentum.
    other = copy.deepcopy(model)
    fresh = precondition(BASES["SGD"](other.parameters()), other, task)
    fresh.base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    fresh.param_groups[0].update(curvature_refreshed=None)
    train(model, optimizer, 3, first=3)
    train(other, fresh, 3, first=3)
    # Solved for with the random numbers of the same step, from nothing.
    assert torch.equal(weights(model), weights(other))


def test_a_loader_that_fails_is_a_failure_like_others():
    class Broken(list):
        broken = True

        def __iter__(self):
            if self.broken:
                raise OSError("no such file")
            return super().__iter__()

    model, batches = net(), Broken(data())
    optimizer = sgd(model, batches)
    with pytest.warns(CurvatureWarning, match="OSError: no such file"):
        train(model, optimizer, 3)
    batches.broken = False
    train(model, optimizer, 1)
    assert optimizer.report().refreshes == 1


def test_a_failing_check_of_drift_is_a_refresh_that_fails():
    task = Switched()
    model, optimizer, _, _ = both("SGD", task, drift_tol=0.1, check_every=2, refresh_every=100)
    train(model, optimizer, 2)
    task.fault = "raises"
    with pytest.warns(CurvatureWarning, match="a damaged sample"):
        train(model, optimizer, 1)
    assert optimizer.report().failures == 1


def test_modes_and_random_numbers_are_as_found_after_a_failure():
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Dropout(), nn.BatchNorm1d(6), nn.Linear(6, 1)
    ).double()
    model[1].eval()
    optimizer = precondition(
        torch.optim.SGD(model.parameters(), lr=0.01), model, Switched("raises")
    )
    before = torch.get_rng_state()
    set_gradients(model, torch.ones_like(weights(model)))
    quietly(optimizer.step)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert torch.equal(torch.get_rng_state(), before)


# -- gradients that are not finite ------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("base", BASES)
def test_a_gradient_that_is_not_finite_does_not_reach_other_parameters(base, bad):
    model, optimizer, alone, plain = both(base, TASK)
    for m, o in ((model, optimizer), (alone, plain)):
        set_gradients(m, torch.ones_like(weights(m)))
        m[0].bias.grad[2] = bad
        o.step()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        # Exactly the base's step: what is inside the eigenspace cannot be told.
        assert torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0)), name
        assert torch.isfinite(p).all() == (name != "0.bias")


# -- little to gain ---------------------------------------------------------------------------


def on_a_spectrum(spectrum, rank):
    model = Quadratic()
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = precondition(
        base, model, quadratic_loss, quadratic_data(spectrum), rank=rank, refresh_every=1, tol=1e-8
    )

    def step():
        set_gradients(model, weights(model))
        optimizer.step()

    return step


def test_a_flat_spectrum_warns_once():
    step = on_a_spectrum([10.0, 9.0, -8.0, 6.0, 1.0], 3)
    match = r"\|lambda_1\| = 10 is less than 2 times \|lambda_4\| = 6.*raise rank"
    with pytest.warns(CurvatureWarning, match=match):
        step()
    for _ in range(3):  # warnings are errors
        step()


@pytest.mark.parametrize("spectrum", [[10.0, 9.0, -8.0, 4.9], [10.0, -9.0, 8.0], SPECTRA["rank 3"]])
def test_a_spectrum_that_stands_out_does_not_warn(spectrum):
    on_a_spectrum(spectrum, 3)()


def test_all_pairs_there_are_leave_nothing_to_compare_with():
    on_a_spectrum([10.0 - i / 10 for i in range(12)], 12)()


def test_a_loss_without_curvature_is_stepped_on_as_by_the_base():
    model = nn.Linear(4, 3).double()
    alone = copy.deepcopy(model)
    batch = torch.randn(5, 4, dtype=torch.float64)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = precondition(base, model, lambda m, b: m(b).mean(), [batch])
    plain = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for m, o in ((model, optimizer), (alone, plain)):
            o.zero_grad()
            m(batch).mean().backward()
            o.step()
    assert torch.equal(weights(model), weights(alone))
    assert optimizer.report().failures == 0
    assert optimizer.report().refreshes == 2
