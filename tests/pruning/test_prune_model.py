"""Pruning a model in one call: what it reaches, what it reports, and on which models."""

import copy
import json

import cases
import networks
import pytest
import torch
from prunable import METHODS, SEEDS, TASK, flat_mask, loss_of, network, run
from torch import nn
from torch.nn.utils import prune

from hesscurv import supervised
from hesscurv.pruning import PruningOptions
from hesscurv.pruning.curvature.quadratic_model import Measuring
from hesscurv.pruning.masks.state_dicts import dense_state_dict, masks_of
from hesscurv.pruning.run.prune_model import prune_model
from hesscurv.pruning.weights import find_weights

# -- what it reaches --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_sparsity_is_exact_over_all_weights(method, seed):
    net = network(seed)
    report = run(net, sparsity=0.73, method=method)
    mask = flat_mask(net)
    assert int(mask.sum()) == len(mask) - round(0.73 * len(mask)) == report.kept
    assert report.numel == len(mask)
    assert report.sparsity == pytest.approx(1 - report.kept / report.numel)
    assert all(not bool((net[i].weight[~masks_of(net)[f"{i}.weight"]]).any()) for i in (0, 3, 6))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_sparsity_is_exact_in_each_layer(method, seed):
    net = network(seed)
    run(net, sparsity=0.61, method=method, scope="layer", steps_per_stage=2)
    for mask in masks_of(net).values():
        assert int(mask.sum()) == mask.numel() - round(0.61 * mask.numel())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("schedule", ["cubic", "geometric", [0.2, 0.9]])
def test_the_sparsities_of_a_dict_are_exact_and_in_step(schedule, seed):
    net, seen = network(seed), []
    report = run(
        net,
        scope={"0": 0.9, "6.weight": 0.25},
        schedule=schedule,
        on_step=lambda step, weights: seen.append(
            [(w == 0).double().mean().item() for w in weights.values()]
        ),
    )
    masks = masks_of(net)
    assert int(masks["0.weight"].sum()) == 216 - round(0.9 * 216)
    assert int(masks["6.weight"].sum()) == 12 - round(0.25 * 12)
    assert "3.weight" not in masks or bool(masks["3.weight"].all())
    # Both are on their way after the first of two steps, neither is there.
    assert 0 < seen[0][0] < seen[1][0] == pytest.approx(0.9, abs=1 / 216)
    assert seen[0][2] <= seen[1][2] == pytest.approx(0.25)
    assert [step.sparsity for step in report.stages] == sorted(s.sparsity for s in report.stages)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("structure", "most"), [("2:4", 2), ("1:4", 1)])
@pytest.mark.parametrize("method", METHODS)
def test_patterns_hold_in_every_group_of_inputs(method, structure, most, seed):
    net = network(seed)
    report = run(net, structure=structure, method=method)
    masks = masks_of(net)
    assert list(masks) == ["3.weight", "6.weight"]  # the first has 3 inputs: left out
    groups = [masks["3.weight"].movedim(1, -1).reshape(-1, 4), masks["6.weight"].view(-1, 4)]
    assert all(bool((g.sum(1) == most).all()) for g in groups)
    assert report.sparsity == pytest.approx(1 - most / 4)
    assert report.loss == pytest.approx(loss_of(net), rel=1e-10)


WILD = [
    {},
    {"rows": "fisher"},
    {"target": "loss"},
    {"damping": 1e6},
    {"damping": 1e-10},
    {"root_floor": 1e-8, "rest": "diagonal"},
    {"rest": "isotropic", "rows": "fisher", "damping": 1e-8},
    {"root_floor": 1e6, "target": "loss", "largest_block": 2},
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("measuring", WILD)
def test_it_is_never_worse_than_magnitude_and_says_its_true_loss(measuring, seed):
    net = network(seed)
    magnitude, dense = copy.deepcopy(net), loss_of(net)
    report = run(net, sparsity=0.8, measuring=Measuring(**measuring))
    pairs = [tuple(w) for w in find_weights(magnitude).values()]
    with torch.no_grad():  # else the module cannot be copied
        prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.8)
    assert report.loss <= report.magnitude_loss
    # float64, the same forward passes.
    assert report.loss == pytest.approx(loss_of(net), rel=1e-10)
    assert report.magnitude_loss == pytest.approx(loss_of(magnitude), rel=1e-10)
    assert report.dense_loss == pytest.approx(dense, rel=1e-10)
    assert report.recalibrated_loss is None


def regression(seed, inputs):
    """One output, whose targets are those of the dense network: of n samples all rows are exact."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, 1, bias=False)).double()
    # Inputs that know of each other, of scales that magnitude does not see.
    mixing = torch.eye(inputs) + 0.2 * torch.randn(inputs, inputs)
    x = (torch.randn(60, inputs) @ mixing * torch.logspace(-1, 1, inputs)).double()
    return net, x, net(x).detach(), supervised(nn.MSELoss())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_linear_regression_ends_at_the_least_squares_of_its_mask(seed):
    net, x, y, mse = regression(seed, 12)
    how, seen = Measuring(damping=1e-9), []
    report = prune_model(
        net,
        mse,
        [(x, y)],
        0.5,
        stages=1,
        gradients_per_stage=60,
        options=PruningOptions(
            measuring=how, on_step=lambda _, weights: seen.append(weights["0.weight"][0])
        ),
    )
    mask, best = masks_of(net)["0.weight"][0], torch.zeros(12).double()
    best[mask] = torch.linalg.lstsq(x[:, mask], y[:, 0]).solution
    # The rest is the inputs' covariance, so that it moves the minimum by its damping alone: 1e-9
    # of a curvature that spans seven decades at most, and only along its smallest. Found: 1e-8.
    torch.testing.assert_close(seen[0], best, rtol=1e-5, atol=1e-6)
    assert torch.equal(net[0].weight.detach()[0], seen[0])
    assert report.loss == pytest.approx(float((x @ best - y[:, 0]).square().mean()), rel=1e-6)
    assert report.loss < report.magnitude_loss
    assert report.method == "obs"


def test_stages_with_compensation_take_the_quadratic_models_minimum():
    net = network()
    report = run(net, stages=3, steps_per_stage=2, method="obs")
    assert any(step.mu is not None for step in report.stages)
    assert all(step.mu is None for step in run(network(), compensate=False).stages)
    moved = run(network(), method="magnitude", compensate=True)
    assert any(step.mu is not None for step in moved.stages)


# -- the report -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_each_layer_is_reported_as_it_is(seed):
    net = network(seed)
    dense = copy.deepcopy(net)
    report = run(net, scope="global")
    masks, pruned = masks_of(net), dense_state_dict(net)
    assert [layer.name for layer in report.layers] == list(masks)
    assert sum(layer.kept for layer in report.layers) == report.kept
    for layer in report.layers:
        mask = masks[layer.name]
        assert (layer.kept, layer.numel) == (int(mask.sum()), mask.numel())
        assert layer.sparsity == pytest.approx(1 - layer.kept / layer.numel)
        alone = copy.deepcopy(dense)
        alone.load_state_dict(alone.state_dict() | {layer.name: pruned[layer.name]})
        change = loss_of(alone) - loss_of(dense)
        assert layer.true_change == pytest.approx(change, rel=1e-8, abs=1e-12)
        assert layer.predicted_change >= 0
    assert all(torch.tensor(x.true_change).isnan() for x in run(dense, layer_losses=False).layers)


def test_steps_are_reported_with_losses_that_add_up():
    report = run(network(), stages=2, steps_per_stage=3)
    assert len(report.stages) == 6
    before = report.dense_loss
    for step in report.stages:
        assert step.true_change == pytest.approx(step.loss - before, abs=1e-12)
        before = step.loss
    assert [step.gradients for step in report.stages] == [16] * 3 + [32] * 3
    assert report.stages[-1].sparsity == pytest.approx(report.sparsity)


@pytest.mark.parametrize("seed", SEEDS)
def test_of_an_exact_quadratic_the_changes_are_predicted_step_by_step(seed):
    net, x, y, mse = regression(seed, 8)
    seen = [net[0].weight.detach().clone()]
    report = prune_model(
        net,
        mse,
        [(x, y)],
        0.6,
        stages=1,
        steps_per_stage=3,
        gradients_per_stage=60,
        options=PruningOptions(
            measuring=Measuring(rest="isotropic", root_floor=1e-12),
            compensate=False,
            on_step=lambda _, weights: seen.append(weights["0.weight"]),
        ),
    )
    mean = float(2 * x.square().sum(0).mean() / 60)  # of the diagonal, which the rest adds
    moved = [float((w - seen[0]).square().sum()) for w in seen]
    for step, before, after in zip(report.stages, moved, moved[1:], strict=False):
        expected = step.true_change + mean * (after - before) / 2
        assert step.predicted_change == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("asked", "taken"), [(16, 16), (40, 40), (1000, 40)])
def test_gradients_are_those_asked_for_or_as_many_as_there_are_samples(asked, taken):
    assert run(network(), stages=3, gradients_per_stage=asked).gradients == 3 * taken
    assert run(network(), method="magnitude").gradients == 0


def test_reports_are_printed_and_kept_as_plain_values():
    report = run(network(), recalibrate_batch_norm=True)
    text = str(report)
    assert "batch statistics recalibrated" in text
    assert all(name in text for name in ("0.weight", "3.weight", "6.weight"))
    assert len(text.splitlines()) == 3 + len(report.layers)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["kept"] == report.kept
    assert len(values["stages"]) == 2


def test_reports_are_plotted():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = run(network()).plot()
    assert len(figure.axes) == 2
    assert len(figure.axes[1].patches) == 3
    plt.close(figure)


# -- kinds of models --------------------------------------------------------------------------


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2, padding="same")
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.grouped(self.up(x).relu()).relu().mean((2, 3)))


def build(name):
    if name != "grouped_and_transposed":
        return cases.build(name)
    batches = [(torch.randn(5, 4, 3, 3).double(), torch.randint(3, (5,)))]
    return cases.supervised(Grouped().double(), batches)


KINDS = ("conv_bn", "resnet", "encoder_layer", "transformer", "lstm", "grouped_and_transposed")


@pytest.mark.parametrize("method", ["obs", "obd"])
@pytest.mark.parametrize("name", [*KINDS, "unused", "dict_batches", "checkpointed"])
def test_models_of_every_kind_are_pruned_exactly(name, method):
    p = build(name)
    buffers = {n: b.clone() for n, b in p.model.named_buffers()}
    report = prune_model(
        p.model, p.task, p.batches, 0.5, method=method, stages=2, gradients_per_stage=7
    )
    assert int(flat_mask(p.model).sum()) == report.numel - round(0.5 * report.numel)
    assert report.loss == pytest.approx(loss_of(p.model, p.batches, p.task), rel=1e-8)
    assert report.loss <= report.magnitude_loss
    after = dict(p.model.named_buffers())
    assert all(torch.equal(after[n], t) for n, t in buffers.items())


def test_tied_weights_are_left_out_with_a_warning():
    p = cases.build("tied_weights")
    with pytest.warns(UserWarning, match="left out of pruning: .*embedding.weight"):
        report = prune_model(p.model, p.task, p.batches, 0.5, stages=1, gradients_per_stage=3)
    assert p.model.head.weight is p.model.embedding.weight
    assert [layer.name for layer in report.layers] == ["block.qkv.weight", "block.out.weight"]


def test_a_pattern_holds_in_attentions_and_their_hooks_run():
    torch.manual_seed(0)
    net = networks.EncoderLayer().double()
    batches = [(torch.randn(6, 3, 4).double(), torch.randint(2, (6,)))]
    prune_model(net, TASK, batches, structure="2:4", stages=1, gradients_per_stage=6)
    masks = masks_of(net)
    assert "layer.self_attn.out_proj.weight" in masks
    assert all(bool((m.view(-1, 4).sum(1) == 2).all()) for m in masks.values())
    with torch.no_grad():
        before = net.eval()(batches[0][0])
        net.layer.self_attn.out_proj.weight_orig.mul_(2)
        assert not torch.equal(net(batches[0][0]), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_computed_in_float32_and_written_back(dtype):
    net, other = network().to(dtype), network().to(dtype).float()
    report = run(net)
    single = run(other)
    # The same computation, in float32 of equal values; only the writing rounds.
    assert report.loss == pytest.approx(single.loss, rel=1e-5)
    assert all(p.dtype == dtype for p in net.parameters())
    assert torch.equal(flat_mask(net), flat_mask(other))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b.to(dtype))
