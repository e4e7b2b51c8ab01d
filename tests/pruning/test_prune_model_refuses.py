"""Pruning a model in one call: what is wrong is said before anything is computed."""

import pytest
import torch
from support.bundles import bundled
from torch import nn

from hesscurv import supervised
from hesscurv.pruning import PruningOptions
from hesscurv.pruning.curvature.quadratic_model import Measuring
from hesscurv.pruning.run import pruning_run
from hesscurv.pruning.run.prune_model import prune_model

TASK = supervised(nn.CrossEntropyLoss())


def network():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    return net.double()


def data():
    return [(torch.randn(n, 4).double(), torch.randint(3, (n,))) for n in (5, 4)]


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail where a loss or a gradient is computed."""
    monkeypatch.setattr(
        pruning_run.PruningRun, "prune", lambda *_, **__: pytest.fail("something was computed")
    )


def assert_refused(error, message, batches=None, task=TASK, sparsity=0.5, net=None, **options):
    net = net or network()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    hooks = [len(m._forward_pre_hooks) for m in net.modules()]
    batches = data() if batches is None else batches
    with pytest.raises(error, match=message):
        prune_model(net, task, batches, sparsity, **bundled(PruningOptions, options))
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], t) or bool(t.isnan().any()) for n, t in before.items())
    assert [len(m._forward_pre_hooks) for m in net.modules()] == hooks


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_sparsities_out_of_range(sparsity):
    assert_refused(ValueError, r"expected a sparsity in \(0, 1\), got", sparsity=sparsity)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "taylor"}, r"expected method to be one of \('obs', 'obd', .*got 'taylor'"),
        ({"scope": "rows"}, "expected scope 'global', 'layer' or a dict .*got 'rows'"),
        ({"scope": {"9": 0.5}}, "'9' is no weight or module to prune; there are"),
        ({"scope": {"0": 1.0}}, r"expected a sparsity in \[0, 1\) for '0', got 1.0"),
        ({"scope": {}}, "expected a scope with some sparsity above 0"),
        ({"scope": {"0": 0.0}}, "expected a scope with some sparsity above 0"),
        ({"structure": "2/4"}, "expected structure None or 'N:M'"),
        ({"structure": "4:2"}, "expected 0 < N < M"),
        ({"structure": "2:5"}, "2:5 fits no weight"),
        ({"structure": "2:4", "weights": ["0.bias"]}, "2:4 fits no weight"),
        ({"schedule": "square"}, "expected a schedule of .*got 'square'"),
        ({"schedule": [0.3, 0.4], "stages": 2}, "ends at sparsity 0.5, got 0.4"),
        ({"schedule": [0.4, 0.3], "stages": 2}, "do not fall"),
        ({"schedule": [0.2, 0.5], "stages": 3}, "steps_per_stage = 3 sparsities, got 2"),
        ({"schedule": [0.5], "stages": 1, "steps_per_stage": 2}, "= 2 sparsities, got 1"),
        ({"stages": 0}, "expected stages >= 1, got 0"),
        ({"steps_per_stage": 0}, "expected steps_per_stage >= 1"),
        ({"gradients_per_stage": -1}, "expected gradients_per_stage >= 1"),
        ({"max_calibration": 0}, "expected max_calibration >= 1"),
        ({"weights": ["1.weight", "3.bias"], "structure": "2:4"}, "2:4 fits no weight"),
        ({"weights": ["9.weight"]}, "no parameter or submodule '9.weight'"),
    ],
)
def test_options_that_do_not_exist(options, message):
    assert_refused(ValueError, message, **options)


@pytest.mark.usefixtures("nothing_runs")
def test_tasks_without_parts():
    def loss(model, batch):
        return model(batch[0]).square().mean()

    assert_refused(
        TypeError, r"in two parts, outputs\(model, batch\) and .*got a function", task=loss
    )
    assert_refused(TypeError, "expected a task", task=nn.CrossEntropyLoss())


@pytest.mark.usefixtures("nothing_runs")
def test_frozen_weights():
    net = network().requires_grad_(False)
    assert_refused(ValueError, "weights to prune, found none", net=net)
    assert_refused(ValueError, "require grad, got frozen", net=net, weights=["0.weight"])


@pytest.mark.usefixtures("nothing_runs")
def test_batches_that_are_none():
    assert_refused(ValueError, "expected at least one batch, got", batches=[])
    assert_refused(ValueError, "expected at least one batch, got", calibration=[])
    assert_refused(ValueError, "looks like one batch", batches=data()[0])
    assert_refused(TypeError, "got a one-shot", batches=iter(data()))


@pytest.mark.usefixtures("nothing_runs")
def test_models_that_are_none():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        prune_model(lambda x: x, TASK, data(), 0.5)
    assert_refused(ValueError, "weights to prune, found none", net=nn.Sequential(nn.ReLU()))


@pytest.mark.usefixtures("nothing_runs")
def test_a_plan_that_exceeds_the_free_memory(monkeypatch):
    monkeypatch.setattr(pruning_run, "free_memory", lambda device: 1000)
    assert_refused(MemoryError, "42 weights with 1000 gradients a stage needs about .* are free")


def test_magnitude_pruning_needs_no_memory_for_curvature(monkeypatch):
    monkeypatch.setattr(pruning_run, "free_memory", lambda device: 0)
    assert prune_model(network(), TASK, data(), 0.5, method="magnitude").kept == 21


@pytest.mark.parametrize("method", ["obs", "magnitude"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(monkeypatch, method, value):
    monkeypatch.setattr(
        pruning_run, "measure_quadratic_model", lambda *_: pytest.fail("curvature was measured")
    )
    net = network()
    with torch.no_grad():
        net[3].bias[0] = value
    message = "expected a finite loss on the calibration set, got NaN or inf"
    assert_refused(ValueError, message, net=net, method=method)


def test_data_for_the_curvature_that_is_not_finite():
    bad = [(x.clone().fill_(float("nan")), y) for x, y in data()]
    message = "expected a finite Hessian of the loss in the outputs"
    assert_refused(ValueError, message, batches=bad, calibration=data())
    for rest, message in (("kronecker", "finite covariance"), ("isotropic", "diagonal to be")):
        how = Measuring(rows="fisher", rest=rest)
        assert_refused(ValueError, message, batches=bad, calibration=data(), measuring=how)
