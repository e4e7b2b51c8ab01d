"""Rows, rank and blocks that fit the memory, or the argument that would make them fit."""

import logging

import pytest
import torch
from prunable import TASK, data, network
from torch import nn

from hesscurv import supervised
from hesscurv.pruning import PruningOptions
from hesscurv.pruning.curvature.memory_plan import MemoryPlan, Sizes, plan_memory
from hesscurv.pruning.curvature.quadratic_model import Measuring
from hesscurv.pruning.run import pruning_run
from hesscurv.pruning.run.prune_model import prune_model

# The convolutions and the last layer of a ResNet-18: entries, and inputs of each place.
RESNET18 = [(9408, 147)] + 4 * [(36864, 576)]
for width in (128, 256, 512):
    RESNET18 += [(width * width // 2 * 9, width // 2 * 9), (width * width // 2, width // 2)]
    RESNET18 += 3 * [(width * width * 9, width * 9)]
RESNET18 += [(512_000, 512)]
SIZES = Sizes([n for n, _ in RESNET18], [i for _, i in RESNET18], 4)
GB = 10**9


def by_formula(sizes, rows, block):
    """Rows and what is solved for, twice; a weight's besides; two small matrices in float64."""
    inputs = 0
    for i in sizes.columns:
        parts = next(c for c in range(1, i + 1) if i % c == 0 and i // c <= block)
        inputs += i * i // parts
    d, largest = sum(sizes.numels), max(sizes.numels)
    return (2 * rows * (d + largest) + 4 * rows**2 + 8 * d + inputs) * sizes.itemsize


def test_what_fits_is_taken_as_it_is(caplog):
    how = Measuring()
    plan = plan_memory(SIZES, how, None, 200 * GB)
    assert plan == MemoryPlan(1000, how, by_formula(SIZES, 1000, 1024))
    assert 100 * GB < plan.num_bytes < 120 * GB
    assert caplog.records == []


@pytest.mark.parametrize("free", [4, 8, 32, 100])
def test_by_default_as_many_gradients_are_taken_as_fit_and_it_is_said_once(caplog, free):
    plan = plan_memory(SIZES, Measuring(), None, free * GB)
    n = plan.gradients
    assert by_formula(SIZES, n, 1024) == plan.num_bytes <= 0.8 * free * GB
    assert by_formula(SIZES, n + 1, 1024) > 0.8 * free * GB
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{free} GB are free: pruning goes on with gradients_per_stage={n} for 1000" in (
        record.getMessage()
    )


def test_a_rank_by_default_is_lowered_alone_or_in_proportion():
    alone = plan_memory(SIZES, Measuring(rows="eigenspace"), 5, 4 * GB)
    assert (alone.gradients, alone.measuring) == (
        5,
        Measuring(rows="eigenspace", rank=alone.measuring.rank),
    )
    k = alone.measuring.rank
    assert by_formula(SIZES, k, 1024) <= 3.2 * GB < by_formula(SIZES, k + 1, 1024)
    both = plan_memory(SIZES, Measuring(rows="both"), None, 32 * GB)
    n, k = both.gradients, both.measuring.rank
    assert by_formula(SIZES, n + k, 1024) <= 25.6 * GB < by_formula(SIZES, n + k + 1, 1024)
    assert n / k == pytest.approx(10, rel=0.05)
    given = plan_memory(SIZES, Measuring(rows="both", rank=50), None, 32 * GB)
    assert given.measuring.rank == 50
    assert given.gradients + 50 == n + k
    taken = plan_memory(SIZES, Measuring(rows="both"), 200, 32 * GB)
    assert taken.gradients == 200
    assert taken.measuring.rank == n + k - 200


def test_blocks_are_made_smaller_where_covariances_are_most_of_it():
    wide = Sizes([10 * 2**17], [2**17], 4)
    free = by_formula(wide, 16, 1024)
    plan = plan_memory(wide, Measuring(), None, free)
    assert plan.measuring == Measuring(largest_block=256)
    assert by_formula(wide, plan.gradients, 256) == plan.num_bytes <= 0.8 * free
    assert plan.gradients >= 16
    # The last fifth of what is free is taken where nothing fits without it.
    last = plan_memory(wide, Measuring(), None, by_formula(wide, 16, 64))
    assert (last.gradients, last.measuring.largest_block) == (16, 64)
    # A number of gradients that is named keeps its value.
    asked = plan_memory(wide, Measuring(), 20, by_formula(wide, 20, 1024) - 1)
    assert (asked.gradients, asked.measuring.largest_block) == (20, 256)


@pytest.mark.parametrize(
    ("how", "gradients"),
    [
        (Measuring(), 1000),
        (Measuring(rows="eigenspace", rank=99), None),
        (Measuring(rows="both", rank=99), 1000),
        (Measuring(rows="both", rank=500), 20),
    ],
    ids=repr,
)
def test_what_is_asked_for_and_does_not_fit_is_refused_with_the_value_that_does(how, gradients):
    free = 4 * GB if how.rows != "both" else 20 * GB
    with pytest.raises(MemoryError, match=r" are free; use ") as caught:
        plan_memory(SIZES, how, gradients, free)
    message = str(caught.value)
    number = int(message.rsplit("=", 1)[1].split()[0])
    if "use gradients_per_stage=" in message:
        others = how.rank if how.rows == "both" else 0
        plan = plan_memory(SIZES, how, number, free)
        assert plan.gradients == number
    else:
        others = gradients if how.rows == "both" else 0
        changed = Measuring(rows=how.rows, rank=number)
        assert plan_memory(SIZES, changed, gradients, free).measuring == changed
    # It is the largest that fits.
    assert by_formula(SIZES, number + others, 1024) <= free
    assert by_formula(SIZES, number + others + 1, 1024) > free


def test_blocks_that_are_asked_for_and_do_not_fit_are_refused_with_those_that_do():
    wide = Sizes([10 * 2**17], [2**17], 4)
    how = Measuring(largest_block=2048)
    free = by_formula(wide, 20, 2048) - 1
    with pytest.raises(MemoryError, match="use gradients_per_stage=19"):
        plan_memory(wide, how, 20, free)
    free = by_formula(wide, 0, 2048)
    with pytest.raises(MemoryError, match="use a largest_block=256 in `measuring`"):
        plan_memory(wide, how, 20, free)
    assert plan_memory(wide, Measuring(largest_block=256), 20, free).gradients == 20


def test_where_nothing_fits_the_weights_that_would_are_counted():
    free = by_formula(SIZES, 15, 64)
    with pytest.raises(MemoryError, match=r"name `weights` of at most .* method='magnitude'") as e:
        plan_memory(SIZES, Measuring(), None, free)
    numel = int(str(e.value).split("at most ")[1].split()[0].replace(",", ""))
    assert by_formula(Sizes([numel], [], 4), 16, 1024) <= free
    with pytest.raises(MemoryError, match="method='magnitude', which needs none of it") as e:
        plan_memory(SIZES, Measuring(), None, 1000)
    assert "weights` of" not in str(e.value)


def test_samples_that_there_are_not_need_no_memory(caplog):
    plan = plan_memory(SIZES, Measuring(), None, 8 * GB, num_samples=40)
    assert (plan.gradients, plan.num_bytes) == (1000, by_formula(SIZES, 40, 1024))
    assert plan_memory(SIZES, Measuring(), 1000, 8 * GB, num_samples=40) == plan
    assert caplog.records == []


# -- prune_model ------------------------------------------------------------------------------


def plan_of(net):
    """The sizes of the small network's weights, in float64."""
    weights = [net[i].weight for i in (0, 3, 6)]
    return Sizes([w.numel() for w in weights], [w[0].numel() for w in weights], 8)


def test_pruning_goes_on_with_as_many_gradients_as_fit(monkeypatch, caplog):
    net, sizes = network(), plan_of(network())
    monkeypatch.setattr(
        pruning_run, "free_memory", lambda device: by_formula(sizes, 25, 1024) / 0.8 + 1
    )
    report = prune_model(net, TASK, data(), 0.5, stages=2)
    assert report.gradients == 2 * 25
    assert report.planned_bytes == by_formula(sizes, 25, 1024)
    said = [r for r in caplog.records if "gradients_per_stage=25 for 1000" in r.getMessage()]
    assert len(said) == 1


def test_a_number_of_gradients_that_is_asked_for_is_never_lowered(monkeypatch):
    net, sizes = network(), plan_of(network())
    monkeypatch.setattr(pruning_run, "free_memory", lambda device: by_formula(sizes, 25, 1024))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(MemoryError, match=r"use gradients_per_stage=25$"):
        prune_model(net, TASK, data(), 0.5, gradients_per_stage=30, stages=1)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert prune_model(net, TASK, data(), 0.5, gradients_per_stage=25, stages=1).gradients == 25


def wide_outputs():
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3).double(), torch.randint(1100, (8,)))]
    return nn.Linear(3, 1100).double(), batches


def test_more_outputs_than_ggn_rows_take_are_pruned_by_fisher_rows(caplog):
    net, batches = wide_outputs()
    other = nn.Linear(3, 1100).double()
    other.load_state_dict(net.state_dict())
    report = prune_model(net, TASK, batches, 0.5, stages=2)
    (record,) = [r for r in caplog.records if "outputs" in r.getMessage()]
    assert "1100 outputs" in record.getMessage()
    assert "Measuring(rows='fisher')" in record.getMessage()
    told = prune_model(
        other,
        TASK,
        batches,
        0.5,
        stages=2,
        options=PruningOptions(measuring=Measuring(rows="fisher")),
    )
    assert report.loss == told.loss
    assert torch.equal(net.weight_mask, other.weight_mask)


@pytest.mark.parametrize("rows", ["ggn", "both"])
def test_more_outputs_than_the_rows_take_that_are_asked_for_are_refused(rows):
    net, batches = wide_outputs()
    with pytest.raises(ValueError, match=r"got 1100; use .*measuring=Measuring\(rows='fisher'\)"):
        prune_model(
            net,
            TASK,
            batches,
            0.5,
            stages=1,
            options=PruningOptions(measuring=Measuring(rows=rows)),
        )


def test_a_loss_without_curvature_in_the_outputs_is_told_what_will_do():
    torch.manual_seed(0)
    net, task = nn.Linear(4, 2).double(), supervised(nn.L1Loss())
    batches = [(torch.randn(9, 4).double(), torch.randn(9, 2).double())]
    with pytest.raises(ValueError, match=r"zero, as that of nn.L1Loss .*rows='fisher'"):
        prune_model(net, task, batches, 0.5, stages=1)
    how = Measuring(rows="fisher")
    assert (
        prune_model(net, task, batches, 0.5, stages=1, options=PruningOptions(measuring=how)).kept
        == 4
    )


@pytest.mark.parametrize("rows", ["ggn", "fisher", "eigenspace"])
def test_constant_inputs_and_dead_units_are_no_error_of_the_factorisation(rows):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 3))
    with torch.no_grad():
        # One unit alone is alive, and has all of the curvature.
        net[0].bias[1:] = -1e9
        net[0].weight[0].abs_()
    how = Measuring(rows=rows, rank=5, damping=1e-6)
    batches = [(torch.ones(20, 256), torch.randint(3, (20,)))]
    report = prune_model(
        net,
        TASK,
        batches,
        0.8,
        stages=1,
        gradients_per_stage=16,
        options=PruningOptions(measuring=how),
    )
    assert report.loss <= report.magnitude_loss
    assert all(bool(p.isfinite().all()) for p in net.parameters())
