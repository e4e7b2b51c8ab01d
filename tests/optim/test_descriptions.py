"""What `print` and `help` tell of optimizers and their reports."""

import inspect

import pytest
import torch
from optim.training import TASK, data, net, precondition, quietly, sgd, train
from optim.wrapping_optimizers import Lookahead

import hesscurv.optim
from hesscurv.optim import NewtonCG


def test_a_preconditioned_optimizer_tells_what_it_wraps_and_how_far_it_has_come():
    model = net()
    base = Lookahead(torch.optim.SGD(model.parameters(), lr=0.01))
    other = torch.nn.Parameter(torch.ones(2))
    base.add_param_group({"params": [other], "lr": 0.5})
    optimizer = precondition(base, model, rank=1, damping=0.5)
    train(model, optimizer, 2)
    assert repr(optimizer).splitlines() == [
        "PreconditionedOptimizer(",
        "  base: Lookahead(SGD), 2 groups, lr 0.01 to 0.5; the gradient is preconditioned",
        "  rank=1, damping=0.5, refreshed every 3",
        "  hessian of 43 numbers in 4 parameters, 256 samples",
        "  2 steps, 1 refreshes",
        ")",
    ]


def test_newton_tells_its_settings_and_how_far_it_has_come():
    model = net()
    optimizer = NewtonCG(model.parameters(), rank=1)
    assert "no steps yet" in repr(optimizer)
    optimizer.step(lambda: TASK(model, data()[0]))
    text = repr(optimizer)
    assert text.startswith("NewtonCG(")
    assert "hessian of 43 numbers in 4 parameters" in text
    assert "rank=1, refreshed every 20; first damping 0.001, lr 1" in text
    assert "1 steps" in text
    assert 1 <= len(text.splitlines()) <= 10


def test_a_report_says_why_a_refresh_failed():
    def broken(model, batch):
        raise RuntimeError("a damaged sample\nand more")

    model = net()
    optimizer = precondition(torch.optim.SGD(model.parameters(), lr=0.01), model, broken)
    quietly(lambda: train(model, optimizer, 1))
    report = optimizer.report()
    assert report.last_failure == "RuntimeError: a damaged sample\nand more"
    assert "curvature failed 1 time, at last by RuntimeError: a damaged sample\n" in str(report)
    assert "1 failures" in repr(optimizer)
    assert sgd(net()).report().last_failure == ""


@pytest.mark.parametrize("name", hesscurv.optim.__all__)
def test_help_shows_the_arguments(name):
    public = getattr(hesscurv.optim, name)
    if inspect.isclass(public) and issubclass(public, Warning):
        return
    text = inspect.getdoc(public)
    arguments = [p for p in inspect.signature(public).parameters if p != "self"]
    section = text.split("Args:")[1]
    for argument in arguments:
        assert f"{argument}: " in section, argument
