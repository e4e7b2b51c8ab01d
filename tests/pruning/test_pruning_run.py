"""A pruning's stages against dense forms: predicted changes, losses, and which samples they see."""

import math
from types import SimpleNamespace

import cases
import pytest
import torch
from prunable import data, network, run

from hesscurv.objective.objective import Objective
from hesscurv.pruning.curvature.quadratic_model import Measuring
from hesscurv.pruning.run import pruning_run
from hesscurv.pruning.run.calibration_loss import CalibrationLoss, SampleStream


def dense_form(model, origin, mu):
    """``1/2 d^T (R^T R + mu K) d + r^T R d`` of d = x - origin, of explicit matrices."""
    R = torch.cat(model.matrix.rows, 1)
    K = torch.block_diag(
        *[
            torch.stack([block.multiply(e) for e in torch.eye(block.numel).double()], 1)
            for block in model.matrix.blocks
        ]
    )
    H, slope = R.T @ R + mu * K, R.T @ model.residual

    def value(x):
        d = x - origin
        return float(d @ H @ d / 2 + slope @ d)

    return value


@pytest.mark.parametrize("steps_per_stage", [1, 2])
def test_predicted_changes_are_those_of_the_dense_form_with_the_steps_own_mu(
    steps_per_stage, monkeypatch
):
    net, models, seen = network(0), [], []
    start = torch.cat([net[i].weight.detach().flatten() for i in (0, 3, 6)])
    measure = pruning_run.measure_quadratic_model

    def recorded(objective, weights, params, *args):
        origin = torch.cat([p.flatten() for p in params.values()]).clone()
        models.append((measure(objective, weights, params, *args), origin))
        return models[-1][0]

    def look(stage, weights):
        after = torch.cat([w.flatten() for w in weights.values()]).clone()
        seen.append((stage, models[-1], after))

    monkeypatch.setattr(pruning_run, "measure_quadratic_model", recorded)
    run(net, stages=2, steps_per_stage=steps_per_stage, sparsity=0.6, on_step=look)
    assert len(seen) == 2 * steps_per_stage
    before, accepted = start, []
    for stage, (model, origin), after in seen:
        if stage.mu is not None:
            value = dense_form(model, origin, stage.mu)
            # float64, sums of some hundred terms that cancel.
            assert stage.predicted_change == pytest.approx(value(after) - value(before), rel=1e-9)
            accepted.append(stage.mu)
        before = after
    assert any(mu != 1 for mu in accepted)


@pytest.mark.parametrize("target", ["outputs", "loss"])
def test_the_changes_of_layers_are_predicted_without_the_first_order_term(target, monkeypatch):
    net, models = network(0), []
    measure = pruning_run.measure_quadratic_model
    monkeypatch.setattr(
        pruning_run,
        "measure_quadratic_model",
        lambda *args: models.append(measure(*args)) or models[-1],
    )
    dense = [net[i].weight.detach().clone() for i in (0, 3, 6)]
    report = run(net, stages=1, sparsity=0.6, measuring=Measuring(target=target))
    # One stage: the model is that of the dense weights, and mu the only one accepted.
    (stage,), (model,) = report.stages, models
    assert report.method == "obs"
    assert stage.mu not in (None, 1.0)
    assert bool(model.residual.any()) == (target == "loss")
    zero = torch.zeros(sum(w.numel() for w in dense)).double()
    quadratic = SimpleNamespace(matrix=model.matrix, residual=torch.zeros_like(model.residual))
    value = dense_form(quadratic, zero, stage.mu)
    at = 0
    for layer, old, i in zip(report.layers, dense, (0, 3, 6), strict=True):
        moved = zero.clone()
        moved[at : at + old.numel()] = (net[i].weight.detach() - old).flatten()
        assert layer.predicted_change == pytest.approx(value(moved), rel=1e-9)
        at += old.numel()


# -- the calibration loss ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_calibration_loss_that_is_not_finite_is_larger_than_any_other(bad):
    problem = cases.build("mlp")
    objective = Objective(
        *(problem.model, problem.task, problem.batches, None),
        **{"training": False, "compute_dtype": None, "budget": None},
    )
    objective.refresh()
    loss = CalibrationLoss(objective, problem.batches, 100)
    params = objective.parameters()
    assert 0 < loss(params) < math.inf
    assert loss((torch.full_like(params[0], bad), *params[1:])) == math.inf


# -- samples ----------------------------------------------------------------------------------


def stream(sizes, count):
    """Samples 0, 1, 2, ... in batches of these sizes, and how often the source was read."""
    numbers = torch.arange(float(sum(sizes))).split(list(sizes))
    where = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    return SampleStream(where, [(part[:, None], part.long()) for part in numbers], count)


def taken(source):
    return [int(i) for _, y in source.take() for i in y]


@pytest.mark.parametrize("sizes", [(12,), (5, 5, 2), (1,) * 12, (7, 5)])
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_stages_take_samples_in_turn_until_the_pass_is_over(sizes, count):
    source = stream(sizes, count)
    for _ in range(2):  # a second pass as the first
        parts = [taken(source) for _ in range(12 // count)]
        assert [i for part in parts for i in part] == list(range(12))
        assert {len(part) for part in parts} == {count}


def test_a_stage_goes_on_in_the_next_pass_with_what_is_missing():
    source = stream((5, 5), 4)
    assert [taken(source) for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert taken(source) == [2, 3, 4, 5]


@pytest.mark.parametrize("count", [10, 11, 40])
def test_a_stage_has_no_sample_twice_where_a_pass_has_fewer(count):
    source = stream((5, 5), count)
    for _ in range(3):
        assert sorted(taken(source)) == list(range(10))


def test_the_stages_of_a_pruning_see_other_samples(monkeypatch):
    seen = []
    measure = pruning_run.measure_quadratic_model

    def recorded(objective, weights, params, samples, *args):
        seen.append(torch.cat([x.flatten(1) for x, _ in samples]))
        return measure(objective, weights, params, samples, *args)

    monkeypatch.setattr(pruning_run, "measure_quadratic_model", recorded)
    # One batch of 40, which every stage takes a part of.
    run(network(0), data(sizes=(40,)), stages=3, gradients_per_stage=12, measuring=Measuring())
    assert [len(part) for part in seen] == [12, 12, 12]
    assert len(torch.cat(seen).unique(dim=0)) == 36
