"""Within torch.compile: refreshes run as plain Python, and steps are the same as without it."""

import copy
import sys

import pytest
import torch
from optim.training import TASK, data, net, precondition, quietly, weights
from optim.wrapping_optimizers import SAM
from torch import nn

import hesscurv
from hesscurv.hooks import CurvatureMonitor
from hesscurv.interface.uncompiled import uncompiled
from hesscurv.optim import NewtonCG

# torch's compiler calls what torch deprecates, from 2.13 on.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

# Compiled products sum in other orders; a few steps on a small net keep that near rounding.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, backend="eager")


BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def gradient(model, optimizer):
    optimizer.zero_grad()
    TASK(model, data()[0]).backward()


def step_alone(model, optimizer):
    step = compiled(lambda: optimizer.step())

    def once():
        gradient(model, optimizer)
        step()

    return once


def bound_step(model, optimizer):
    optimizer.step = compiled(optimizer.step)

    def once():
        gradient(model, optimizer)
        optimizer.step()

    return once


def base_step(model, optimizer):
    optimizer.base.step = compiled(optimizer.base.step)

    def once():
        gradient(model, optimizer)
        optimizer.step()

    return once


def whole_step(model, optimizer):
    def once():
        gradient(model, optimizer)
        optimizer.step()

    return compiled(once)


def compiled_model(model, optimizer):
    run = torch.compile(model, backend="aot_eager")

    def once():
        gradient(run, optimizer)
        optimizer.step()

    return once


@pytest.mark.parametrize(
    ("what", "base"),
    [
        (step_alone, "SGD"),
        (step_alone, "AdamW"),
        (bound_step, "SGD"),
        (base_step, "SGD"),
        (base_step, "AdamW"),
        (whole_step, "SGD"),
        (compiled_model, "SGD"),
    ],
)
def test_compiled_steps_refresh_and_are_those_without_a_compiler(what, base):
    model = net()
    alone = copy.deepcopy(model)
    optimizer = precondition(BASES[base](model.parameters()), model, rank=2, refresh_every=2)
    plain = precondition(BASES[base](alone.parameters()), alone, rank=2, refresh_every=2)
    once = what(model, optimizer)
    for _ in range(4):
        quietly(once)
        gradient(alone, plain)
        quietly(plain.step)
    report = optimizer.report()
    assert (report.steps, report.refreshes, report.failures) == (4, 2, 0)
    # Adam's own compiled step corrects its bias in float32.
    close = {"rtol": 1e-4, "atol": 1e-6} if (what, base) == (base_step, "AdamW") else CLOSE
    torch.testing.assert_close(weights(model), weights(alone), **close)


def test_the_parts_of_a_compiled_sharpness_aware_step_refresh():
    model = net()
    optimizer = precondition(SAM(model.parameters(), torch.optim.SGD, lr=0.01), model)
    first = compiled(lambda: optimizer.first_step(zero_grad=True))
    second = compiled(lambda: optimizer.second_step())
    for _ in range(2):
        gradient(model, optimizer)
        first()
        TASK(model, data()[0]).backward()
        second()
    assert (optimizer.report().refreshes, optimizer.report().failures) == (1, 0)
    assert optimizer.report().steps == 2


def test_a_compiled_newton_step_is_one_without_a_compiler():
    losses = []
    for wrap in (compiled, lambda f: f):
        model = net()
        optimizer = NewtonCG(model.parameters(), rank=1)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = TASK(model, data()[0])
            loss.backward()
            return loss

        step = wrap(lambda optimizer=optimizer, closure=closure: optimizer.step(closure))
        losses.append([float(step()) for _ in range(3)])
        assert optimizer.diagnostics()["num_refused"] == 0
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("compiler")
def test_a_graph_without_breaks_is_refused_by_name():
    model = net()
    optimizer = precondition(BASES["SGD"](model.parameters()), model)
    gradient(model, optimizer)
    step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"PreconditionedOptimizer\.step"):
        step()


def test_products_pairs_and_monitors_work_in_compiled_functions():
    model = net()
    H = hesscurv.HessianOperator(model, TASK, data())
    v = torch.randn(H.shape[0], dtype=H.dtype)
    assert torch.equal(compiled(lambda: H @ v)(), H @ v)
    values = compiled(lambda: hesscurv.eigsh(H, k=2, tol=1e-8).eigenvalues)()
    torch.testing.assert_close(values, hesscurv.eigsh(H, k=2, tol=1e-8).eigenvalues, **CLOSE)
    monitor = CurvatureMonitor(model, TASK, data(), k=1)
    record = compiled(lambda: monitor.step(0))()
    assert record["status"] == "ok"
    assert record["eigenvalues"][0] == pytest.approx(float(values[0]), rel=0.01)


def test_without_a_compiler_a_step_is_called_as_it_is(monkeypatch):
    """The compiler's import takes seconds: nothing here may cause it."""
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(torch.compiler, "disable", lambda *_: pytest.fail("the compiler is asked"))
    assert uncompiled(lambda x: x + 1)(1) == 2


def test_modes_are_kept_within_a_compiled_step():
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 1)).double()
    optimizer = precondition(BASES["SGD"](model.parameters()), model)
    gradient(model, optimizer)
    compiled(lambda: optimizer.step())()
    assert all(m.training for m in model.modules())
    assert optimizer.report().refreshes == 1
