"""Scores are what the loss still feels of a channel once `compensate_channels_` has been called."""

import copy

import branches
import pytest
import torch
import torch_pruning as tp
from channels import EXAMPLE, TASK, build, data, graph_of
from torch import nn
from torch.func import functional_call

import hesscurv
from hesscurv.integrations import (
    CompensatedImportance,
    FisherImportance,
    compensate_channels_,
    macs_per_entry,
    remove_channels_,
)

# Network and the layer whose outputs are a group.
GROUPS = [("plain", "conv1"), ("plain", "conv2"), ("residual", "inner")]


class Logits(hesscurv.Task):
    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return 0.5 * outputs.square().sum(1).mean()


def going(model, layer, channels):
    graph, module = graph_of(model), model.get_submodule(layer)
    prune = graph.get_pruner_of_module(module).prune_out_channels
    return graph.get_pruning_group(module, prune, channels)


def whole(model, layer):
    return going(model, layer, list(range(model.get_submodule(layer).out_channels)))


def compensated(model, batches, gone):
    """State of a copy after compensation for channels (layer -> indices)."""
    other = copy.deepcopy(model)
    compensate_channels_(other, TASK, batches, [going(other, n, c) for n, c in gone.items() if c])
    return dict(other.state_dict())


def effect(model, batches, state, function, step=1e-6):
    """Derivative of a function of outputs and targets, by sample, towards another state."""
    now = {k: t.detach() for k, t in model.state_dict().items() if t.is_floating_point()}

    def at(t, x, y):
        values = {k: v + t * (state[k] - v) for k, v in now.items()}
        with torch.no_grad():
            return function(functional_call(model, values, (x,)), y)

    # torch's batch norm has no derivative by its running mean.
    return torch.cat([(at(step, x, y) - at(-step, x, y)) / (2 * step) for x, y in batches])


def losses(out, y):
    return nn.functional.cross_entropy(out, y, reduction="none")


@pytest.mark.parametrize(("network", "layer"), GROUPS)
def test_scores_are_the_fisher_along_what_compensation_changes(network, layer):
    model, batches = build(network), data((12, 8))
    group = whole(model, layer)
    scores = CompensatedImportance(model, TASK, batches, rows="fisher")(group)
    for c in range(len(scores)):
        change = effect(model, batches, compensated(model, batches, {layer: [c]}), losses)
        assert float(scores[c]) == pytest.approx(
            float(0.5 * change.square().mean()), rel=1e-5, abs=1e-15
        )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_signs_have_the_gauss_newton_matrix_as_their_mean(seed):
    model, batches = build("plain"), data((6,))
    draws = 400
    scores = CompensatedImportance(
        model, Logits(), batches, draws=draws, generator=torch.Generator().manual_seed(seed)
    )(whole(model, "conv1"))
    for c in range(5):
        change = effect(
            model, batches, compensated(model, batches, {"conv1": [c]}), lambda out, y: out
        )
        # Outputs' squares, whose mean over signs has a relative deviation below sqrt(2 / draws).
        wanted = 0.5 * change.square().sum(1).mean()
        assert float(scores[c]) == pytest.approx(float(wanted), rel=5 * (2 / draws) ** 0.5)


def pruner_of(model, importance):
    return tp.pruner.BasePruner(
        model,
        EXAMPLE.double(),
        importance,
        global_pruning=True,
        pruning_ratio=0.4,
        ignored_layers=[model.fc2],
    )


@pytest.mark.parametrize("costly", [False, True])
def test_a_joint_ranking_chooses_each_channel_given_those_that_are_gone(costly):
    model, batches = build("plain"), data((12, 8))
    costs = macs_per_entry(model, EXAMPLE.double()) if costly else None
    importance = CompensatedImportance(
        model, TASK, batches, rows="fisher", exact=1.0, costs=costs, params=lambda n, p: n != "fc2"
    )
    pruner = pruner_of(model, importance)
    importance.rank_jointly(pruner)
    widths = {"conv1": 5, "conv2": 4, "fc1": 6}
    own = {g[0].dep.target.module: importance(g) for g in pruner.DG.get_all_groups([model.fc2])}
    ranks = {n: own[model.get_submodule(n)] for n in widths}
    per = {"conv1": 1.0, "conv2": 1.0, "fc1": 1.0}
    if costs:
        # What a channel takes along, its bias and batch norm for nothing.
        per["conv1"] = 18 * costs["conv1.weight"] + 36 * costs["conv2.weight"]
        per["conv2"] = 45 * costs["conv2.weight"] + 24 * costs["fc1.weight"]
        per["fc1"] = 16 * costs["fc1.weight"] + 3 * costs["fc2.weight"]
    gone = {n: [] for n in widths}
    value, order = 0.0, []
    for _ in range(6):
        tried = {}
        for n, width in widths.items():
            for c in set(range(width)) - set(gone[n]):
                if len(gone[n]) + 1 < width:
                    trial = {**gone, n: [*gone[n], c]}
                    change = effect(model, batches, compensated(model, batches, trial), losses)
                    tried[n, c] = float(0.5 * change.square().mean())
        best = min(tried, key=lambda key: (tried[key] - value) / per[key[0]])
        value = tried[best]
        gone[best[0]].append(best[1])
        order.append(best)
    place = sorted((float(r), n, c) for n in widths for c, r in enumerate(ranks[n].tolist()))
    assert [(n, c) for _, n, c in place[:6]] == order


def test_of_two_channels_that_stand_in_for_each_other_one_goes_first_and_one_stays():
    model, batches = build("plain"), data((12, 8))
    with torch.no_grad():
        model.bn1.weight.fill_(1.0)
        model.bn1.bias.fill_(0.5)
        model.bn1.running_mean.zero_()  # so that no channel is always off
        for layer in (model.conv1, model.bn1):
            for tensor in layer.state_dict().values():
                if tensor.ndim:
                    tensor[4] = tensor[1]
    importance = CompensatedImportance(model, TASK, batches, damping=1e-8, exact=1.0)
    scores = importance(whole(model, "conv1"))
    assert float(scores[[1, 4]].max()) < 1e-6 * float(scores[[0, 2, 3]].min())
    pruner = pruner_of(model, importance)
    importance.rank_jointly(pruner)
    (group,) = [
        g for g in pruner.DG.get_all_groups([model.fc2]) if g[0].dep.target.module is model.conv1
    ]
    ranks = importance(group)
    assert {float(ranks[1]) == 0, float(ranks[4]) == 0} == {True, False}
    assert float(ranks[[1, 4]].max()) > 1


def test_it_measures_again_after_a_step_and_leaves_the_model_alone():
    model, batches = build("plain"), data((12, 8))
    before = copy.deepcopy(model.state_dict())
    importance = CompensatedImportance(model, TASK, batches)
    pruner = pruner_of(model, importance)
    importance.rank_jointly(pruner)
    groups = list(pruner.step(interactive=True))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    compensate_channels_(model, TASK, batches, groups)
    for group in groups:
        group.prune()
    fresh = CompensatedImportance(model, TASK, batches, rows="fisher")
    again = CompensatedImportance(model, TASK, batches, rows="fisher")
    again(whole(model, "conv1"))
    with torch.no_grad():
        model.conv2.weight.mul_(1.5)
    assert torch.equal(again(whole(model, "conv1")), fresh(whole(model, "conv1")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "positive finite damping"),
        ({"exact": 0.0}, "exact in"),
        ({"draws": 0}, "draws"),
        ({"rows": "hessian"}, "rows"),
        ({"costs": {"conv1.weight": -1.0}}, "costs"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CompensatedImportance(build("plain"), TASK, data(), **options)


def test_a_group_that_nothing_measured_reads_is_refused():
    model = build("plain")
    importance = CompensatedImportance(model, TASK, data(), params="fc1")
    with pytest.raises(ValueError, match="was measured"):
        importance(whole(model, "conv1"))


class Reading(nn.Module):
    """A convolution whose channels a layer of any type reads."""

    def __init__(self, reader):
        super().__init__()
        self.first, self.reader = nn.Conv2d(3, 8, 3, padding=1), reader
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.reader(torch.relu(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("reader", "named"),
    [
        (nn.ConvTranspose2d(8, 8, 2), "a ConvTranspose2d"),
        (nn.Conv2d(8, 8, 3, groups=2), "a Conv2d with groups=2"),
        (nn.Conv2d(8, 8, 3, padding="same"), "a Conv2d with padding='same'"),
    ],
)
def test_a_reader_of_another_type_is_named_with_remedies_that_work(reader, named):
    model = Reading(reader)
    batches = [(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 0]))]

    def prune(importance, *ignored):
        pruner = tp.pruner.BasePruner(
            model, batches[0][0], importance, pruning_ratio=0.25, ignored_layers=[*ignored]
        )
        list(pruner.step(interactive=True))

    importance = CompensatedImportance(model, TASK, batches)
    with pytest.raises(ValueError, match="was measured") as caught:
        prune(importance, model.head)
    text = str(caught.value)
    assert named in text
    assert "select them" not in text
    assert "FisherImportance" in text
    assert "add 'first'" in text
    prune(FisherImportance(model, TASK, batches), model.head)
    prune(importance, model.head, model.first)


def dense_pruner(model, batches, importance, **options):
    return tp.pruner.BasePruner(
        model,
        batches[0][0][:1],
        importance,
        pruning_ratio=0.5,
        ignored_layers=[model[2]],
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", ["one sample", "a sample repeated", "two inputs repeated"])
@pytest.mark.parametrize("bias", [0.0, -100.0])
@pytest.mark.parametrize("jointly", [False, True])
def test_dead_and_constant_inputs_are_scored(dtype, x, bias, jointly):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).to(dtype)
    with torch.no_grad():
        model[0].bias.fill_(bias)
        model[0].weight[3] = model[0].weight[4]
    x = {
        "one sample": torch.randn(1, 8),
        "a sample repeated": torch.randn(1, 8).repeat(30, 1),
        "two inputs repeated": torch.randn(30, 2).repeat(1, 4),
    }[x].to(dtype)
    batches = [(x, torch.randn(len(x), 2).to(dtype))]
    task = hesscurv.supervised(nn.MSELoss())
    importance = CompensatedImportance(model, task, batches)
    pruner = dense_pruner(model, batches, importance, global_pruning=jointly)
    if jointly:
        importance.rank_jointly(pruner)
    (group,) = list(pruner.DG.get_all_groups([model[2]]))
    scores = importance(group)
    assert torch.isfinite(scores).all()
    assert len(scores.unique()) == len(scores) or not (jointly or bias)
    remove_channels_(model, task, batches, pruner)
    assert model[0].out_features == 8
    assert torch.isfinite(model(x)).all()


def test_dead_channels_are_the_first_to_go():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].bias[[1, 4]] = -100
        model[0].weight[2], model[0].bias[2] = 0, 3.0  # constant
    batches = [(torch.randn(40, 8).double(), torch.randint(2, (40,)))]
    before = model(batches[0][0])
    importance = CompensatedImportance(model, TASK, batches)
    pruner = dense_pruner(model, batches, importance)
    (group,) = list(pruner.step(interactive=True))
    assert set(group[0].idxs) == {1, 2, 4}
    remove_channels_(model, TASK, batches, [group])
    # Exact but for rounding: neither takes part in the outputs' variance.
    torch.testing.assert_close(model(batches[0][0]), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_are_ranked_jointly(heads):
    torch.manual_seed(0)
    model, batches = branches.Attention(heads).double().eval(), data((12,))
    ignored = [getattr(model, name) for name in model.ignored]
    importance = CompensatedImportance(model, TASK, batches, exact=1.0)
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE.double(),
        importance,
        global_pruning=True,
        num_heads={model.qkv: heads},
        out_channel_groups={},
        ignored_layers=ignored,
    )
    importance.rank_jointly(pruner)
    groups = {g[0].dep.target.module: (g, count) for g, count in importance._groups()}
    group, count = groups[model.proj]
    assert count == heads
    places = importance(group).view(heads, -1)
    # The same place of all heads goes at once.
    assert (places == places[0]).all()
    assert len(places[0].unique()) == len(places[0])


def test_a_part_of_a_split_is_scored_with_what_it_meets_again():
    torch.manual_seed(0)
    model, batches = branches.Tokens().double().eval(), data((12,))
    importance = CompensatedImportance(model, TASK, batches)
    pruner = tp.pruner.BasePruner(model, EXAMPLE.double(), importance, ignored_layers=[model.head])
    importance.rank_jointly(pruner)  # with the mappings of the graph in place
    importance = CompensatedImportance(model, TASK, batches)
    out = tp.prune_linear_out_channels
    scores = importance(pruner.DG.get_pruning_group(model.gate, out, list(range(10))))
    # Each gate goes with what it gates.
    torch.testing.assert_close(scores[:5], scores[5:], rtol=1e-12, atol=0)
