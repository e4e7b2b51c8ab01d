"""Models and tasks of every kind are trained, and what that leaves behind is as without."""

import copy
import gc
import weakref

import pytest
import torch
from optim.training import TASK, data, net, precondition, quietly, sgd, train, weights
from torch import nn

import hesscurv
from hesscurv.optim import PreconditionedOptimizer


def train_one(model, optimizer, batch):
    optimizer.zero_grad()
    TASK(model, batch).backward()
    optimizer.step()


# -- what training leaves behind --------------------------------------------------------------


class Noisy(nn.Sequential):
    """Dropout, batch statistics, and modules in different modes."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        self.double()


@pytest.mark.parametrize("mode", ["gradient", "update"])
@pytest.mark.parametrize("training", [None, True, False])
def test_buffers_modes_and_random_numbers_are_those_of_training_without(mode, training):
    """With gains of one, steps are the base's, and so must be all else."""

    def run(wrapped):
        model = Noisy()
        model[3].train()
        base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        optimizer = base
        if wrapped:
            # A damping of 1e18 makes all gains 1 to the last bit.
            options = {"damping": 1e18, "refresh_every": 1, "drift_tol": 1e-3, "check_every": 1}
            optimizer = precondition(base, model, mode=mode, training=training, **options)
        torch.manual_seed(4)
        losses = []
        for step in range(5):
            optimizer.zero_grad()
            loss = TASK(model, data()[step % 4])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            assert [m.training for m in model.modules()] == [True] * 6
        return losses, model.state_dict(), torch.get_rng_state(), optimizer

    losses, state, generator, optimizer = quietly(lambda: run(True))
    # Dropout's loss is another one each time, of which there is no Hessian.
    expected = (0, 5) if training is True else (5, 0)
    assert (optimizer.report().refreshes, optimizer.report().failures) == expected
    expected, plain, plain_generator, _ = run(False)
    assert losses == expected
    assert torch.equal(generator, plain_generator)
    for name, value in state.items():
        assert torch.equal(value, plain[name]), name


def test_batch_statistics_are_in_the_curvature_only_where_training_takes_them():
    for frozen in (False, True):
        model = Noisy()
        model[1].train(not frozen)
        # By default, dropout off and the norm as it is.
        reference = copy.deepcopy(model)
        reference[3].eval()
        optimizer = sgd(model, samples=None, tol=1e-8)
        as_found = sgd(reference, samples=None, tol=1e-8)
        train_one(model, optimizer, data()[0])
        train_one(reference, as_found, data()[0])
        found = as_found.report().eigenvalues
        assert optimizer.report().eigenvalues == pytest.approx(found, rel=1e-6)
        other = Noisy()
        other[1].train(not frozen)
        evaluated = sgd(other, samples=None, tol=1e-8, training=False)
        train_one(other, evaluated, data()[0])
        same = evaluated.report().eigenvalues == pytest.approx(found, rel=1e-3)
        assert same == frozen


def test_graphs_of_the_curvature_are_gone_after_the_step():
    outputs = []

    class Watched(hesscurv.Task):
        def outputs(self, model, batch):
            out = model(batch[0])
            outputs.append(weakref.ref(out))
            return out

        def loss(self, outputs, batch):
            return nn.functional.mse_loss(outputs, batch[1])

    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"refresh_every": 1, "learning_rate": "auto", "samples": 8}
    optimizer = precondition(base, model, Watched(), **options)
    for batch in data():
        train_one(model, optimizer, batch)
        gc.collect()
        assert outputs
        assert [ref for ref in outputs if ref() is not None] == []


# -- kinds of models and tasks ----------------------------------------------------------------


def test_a_compiled_model_is_trained_as_one_that_is_not():
    torch.compiler.reset()
    model, other = net(), net()
    compiled = torch.compile(model, backend="eager")
    optimizer = PreconditionedOptimizer(
        torch.optim.SGD(compiled.parameters(), lr=0.01), compiled, TASK, data(), 3, None, 2
    )
    plain = PreconditionedOptimizer(
        torch.optim.SGD(other.parameters(), lr=0.01), other, TASK, data(), 3, None, 2
    )
    train(compiled, optimizer, 5)
    train(other, plain, 5)
    assert torch.equal(weights(model), weights(other))
    assert all(m.training for m in model.modules())


def test_a_physics_informed_net_is_trained_by_its_closure():
    """The residual of u' = -u with u(0) = 1, without batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    points = torch.linspace(0, 2, 20, dtype=torch.float64)[:, None]

    def loss(model):
        x = points.detach().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope + u).square().mean() + (model(torch.zeros_like(x[:1])) - 1).square().mean()

    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = PreconditionedOptimizer(
        base, model, loss, rank=6, refresh_every=3, learning_rate="auto"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    values = [float(optimizer.step(closure).detach()) for _ in range(60)]
    assert optimizer.report().failures == 0
    assert values[-1] < 1e-3 * values[0]  # a quarter of that, as measured


def test_a_closure_without_arguments_is_a_task_too():
    model, other = net(), net()
    batch = data()[0]
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = precondition(base, model)
    optimizer = PreconditionedOptimizer(base, model, lambda: TASK(model, batch), refresh_every=2)
    reference = precondition(
        torch.optim.SGD(other.parameters(), lr=0.01), other, TASK, [batch], rank=10, refresh_every=2
    )
    train(model, optimizer, 3)
    train(other, reference, 3)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_every_kind_of_curvature_may_be_tracked(curvature):
    model = net()
    optimizer = sgd(model, curvature=curvature)
    train(model, optimizer, 4)
    values = optimizer.report().eigenvalues
    assert len(values) == 4
    if curvature != "hessian":
        assert min(values) >= -1e-12 * values[0]
