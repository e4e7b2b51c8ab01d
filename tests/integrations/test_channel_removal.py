"""A model that has lost channels computes what the dense one does with them at zero."""

import copy
import logging

import branches
import pytest
import torch
import torch_pruning as tp
from channels import TASK, ViT, build, data, graph_of
from torch import nn

from hesscurv.integrations import (
    CompensatedImportance,
    FisherImportance,
    compensate_channels_,
    remove_channels_,
)

NETWORKS = {
    "joined": branches.Joined,
    "densenet": branches.DenseNet,
    "inception": branches.Inception,
    "flattened": branches.FlattenedBranches,
    "c2f": branches.C2f,
    "c2f in code": lambda: branches.C2f(in_code=True),
    "c2f that adds": lambda: branches.C2f(adds=True, in_code=True),
    "crossed": branches.Crossed,
    "tokens": branches.Tokens,
    "merged": branches.Merged,
    "grouped": branches.Grouped,
    "attention": branches.Attention,
}
READING = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)


def network(name, seed=0):
    torch.manual_seed(seed)
    model = NETWORKS[name]().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for t in (module.weight, module.bias, module.running_mean):
                    t.normal_()
                module.running_var.uniform_(0.5, 2)
    return model, data((12,))


def pruner_of(model, importance, **options):
    ignored = [getattr(model, name) for name in model.ignored]
    options = {"pruning_ratio": 0.4, "global_pruning": True} | model.pruner_options() | options
    # Its own defaults are shared between pruners and written to.
    options = {"out_channel_groups": {}, "in_channel_groups": {}} | options
    example = torch.zeros(1, 2, 6, 6).double()
    return tp.pruner.BasePruner(
        model, example, importance, ignored_layers=ignored, max_pruning_ratio=0.8, **options
    )


def importances(kind, model, batches):
    if kind == "fisher":
        return FisherImportance(model, TASK, batches)
    if kind == "magnitude":
        return tp.importance.MagnitudeImportance()
    return CompensatedImportance(model, TASK, batches)


def masks(model, groups):
    """Ones, and zeros for what the groups' roots say, by stream."""
    names = {module: name for name, module in model.named_modules()}
    keep = {}
    for group in groups:
        dep, idxs = group[0]
        for stream, gone in model.going(names[dep.target.module], idxs).items():
            mask = keep.setdefault(stream, torch.ones(model.width(stream)).double())
            mask[gone] = 0
    return keep


def outputs(model, batches, *keep):
    with torch.no_grad():
        return model(batches[0][0], *keep)


def same(got, wanted):
    # The same sums, in another order.
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("kind", "backwards"), [("jointly", False), ("fisher", True)])
def test_groups_can_be_pruned_in_turn(name, kind, backwards):
    model, batches = network(name)
    importance = importances(kind, model, batches)
    pruner = pruner_of(model, importance, iterative_steps=2)
    if kind == "jointly":
        importance.rank_jointly(pruner)
    for _ in range(2):
        groups = list(pruner.step(interactive=True))
        keep, count = masks(model, groups), sum(p.numel() for p in model.parameters())
        compensate_channels_(model, TASK, batches, groups)
        wanted = outputs(model, batches, keep)
        for group in reversed(groups) if backwards else groups:
            group.prune()
        branches.adapt(model)
        same(outputs(model, batches), wanted)
        # A pruner yields groups without indices as well.
        is_less = any(len(g[0].idxs) for g in groups) and name != "c2f that adds"
        assert (sum(p.numel() for p in model.parameters()) < count) or not is_less


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["alone", "magnitude"])
def test_one_call_takes_a_step_of_the_pruner(name, kind):
    model, batches = network(name, seed=1)
    pruner = pruner_of(model, importances(kind, model, batches), iterative_steps=2)
    step, wanted = pruner.step, []

    def recorded(interactive):
        groups = list(step(interactive=interactive))
        wanted.append(outputs(model, batches, masks(model, groups)))
        return groups

    pruner.step = recorded
    for _ in range(2):
        left = remove_channels_(model, TASK, batches, pruner, damping=None, adapt=branches.adapt)
        assert left == {}
        same(outputs(model, batches), wanted[-1])


@pytest.mark.parametrize("name", ["densenet", "inception", "crossed"])
def test_the_groups_are_those_that_perturbing_the_channels_finds(name):
    model, batches = network(name)
    pruner = pruner_of(model, CompensatedImportance(model, TASK, batches))
    pruner.importance.rank_jointly(pruner)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    read, written = {}, {}
    for layer_name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, args, out, n=layer_name: (
                read.__setitem__(n, args[0]), written.__setitem__(n, out)
            )[2:]
            or None
        )  # fmt: skip
    outputs(model, batches)
    before, fixed = dict(read), dict(written)
    for group in pruner.DG.get_all_groups([model.head]):
        dep = group[0].dep
        for channel in range(dep.target.module.weight.shape[0]):
            # All layers write what they did, but for this channel of the one.
            handles = []
            for layer_name, layer in layers.items():
                out = fixed[layer_name].clone()
                if layer is dep.target.module:
                    out[:, channel] += 1e3 * torch.randn_like(out[:, channel])  # past any ReLU
                handles.append(layer.register_forward_hook(lambda *_, out=out: out))
            outputs(model, batches)
            for handle in handles:
                handle.remove()
            one = pruner.DG.get_pruning_group(dep.target.module, dep.handler, [channel])
            listed = {
                n: set(idxs)
                for d, idxs in one
                for n, layer in layers.items()
                if d.target.module is layer and d.handler in READING
            }
            for n in layers:
                changed = (read[n] != before[n]).transpose(0, 1).flatten(1).any(1)
                assert set(changed.nonzero()[:, 0].tolist()) == listed.get(n, set())


def test_a_group_made_before_others_were_removed_is_made_again():
    model, batches = network("densenet")
    groups = list(pruner_of(model, importances("fisher", model, batches)).step(interactive=True))
    for group in groups:
        compensate_channels_(model, TASK, batches, [group])
        wanted = outputs(model, batches, masks(model, [group]))
        group.prune()
        same(outputs(model, batches), wanted)


def test_some_of_the_groups_can_stay():
    model, batches = network("inception")
    groups = list(pruner_of(model, importances("fisher", model, batches)).step(interactive=True))
    assert len(groups) > 3
    keep = masks(model, groups[1::2])
    compensate_channels_(model, TASK, batches, groups)
    wanted = outputs(model, batches, keep)
    for group in groups[1::2]:
        group.prune()
    same(outputs(model, batches), wanted)


def test_the_graphs_history_builds_the_same_widths_again():
    model, batches = network("densenet")
    dense = copy.deepcopy(model)
    pruner = pruner_of(model, importances("fisher", model, batches))
    remove_channels_(model, TASK, batches, pruner)
    other = pruner_of(dense, importances("fisher", dense, batches))
    other.load_pruning_history(pruner.pruning_history())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in dense.named_parameters()} == shapes


def test_a_group_is_pruned_once():
    model, batches = network("joined")
    groups = list(pruner_of(model, importances("fisher", model, batches)).step(interactive=True))
    compensate_channels_(model, TASK, batches, groups)
    group = next(g for g in groups if len(g[0].idxs))
    group.prune()
    with pytest.raises(ValueError, match="has been pruned"):
        group.prune()


def test_what_was_pruned_in_another_way_in_between_is_noticed():
    model, batches = network("densenet")
    in_block = [layer["conv"] for layer in model.blocks[1][0]]
    pruner = pruner_of(model, importances("fisher", model, batches))
    groups = list(pruner.step(interactive=True))
    first, later = [g for g in groups if len(g[0].idxs) and g[0].dep.target.module in in_block][:2]
    compensate_channels_(model, TASK, batches, groups)
    tp.Group.prune(first)
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="pruned in another way"):
        later.prune()
    assert {name: p.shape for name, p in model.named_parameters()} == before


def test_chunks_stay_equal(caplog):
    model, batches = network("c2f in code")
    groups = list(pruner_of(model, importances("fisher", model, batches)).step(interactive=True))
    group = next(g for g in groups if g[0].dep.target.module is model.cv1)
    halves = [sum(i < 4 for i in group[0].idxs), sum(i >= 4 for i in group[0].idxs)]
    assert halves[0] != halves[1]
    keep = masks(model, groups)
    with caplog.at_level(logging.WARNING):
        compensate_channels_(model, TASK, batches, groups)
    assert "equal chunks" in caplog.text
    wanted = outputs(model, batches, keep)
    for group in groups:
        group.prune()
    assert model.cv1.out_channels == 8 - 2 * min(halves)
    same(outputs(model, batches), wanted)


def test_channel_groups_take_from_all_chunks_alike(caplog):
    model, batches = network("c2f in code")
    importance = importances("jointly", model, batches)
    pruner = pruner_of(model, importance, out_channel_groups={model.cv1: 2})
    importance.rank_jointly(pruner)
    with caplog.at_level(logging.WARNING):
        remove_channels_(model, TASK, batches, pruner)
    assert caplog.text == ""
    assert model.cv1.out_channels < 8


class FlatTokens(branches.Branches):
    """Tokens flattened, so that a channel's entries do not lie together."""

    def __init__(self):
        super().__init__()
        self.a, self.dense, self.head = nn.Linear(12, 6), nn.Linear(36, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.a(x.reshape(len(x), 6, 12))).flatten(1)
        return self.head(torch.relu(self.dense(x)))


class Shuffled(branches.Branches):
    """Channels of one half that go to the next."""

    def __init__(self):
        super().__init__()
        self.a, self.shuffle = self.conv(2, 8), nn.ChannelShuffle(2)
        self.c, self.head = self.conv(8, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.c(self.shuffle(torch.relu(self.a(x))))).mean((2, 3)))


class FixedSizes(branches.Branches):
    """Sizes of a split that are written in the code."""

    def __init__(self):
        super().__init__()
        self.a, self.f, self.g = self.conv(2, 8), self.conv(3, 4), self.conv(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        p, q = torch.relu(self.a(x)).split([3, 5], 1)
        return self.head((self.f(p) + self.g(q)).mean((2, 3)))


class OwnScale(branches.Attention):
    """Attention whose scale follows what is left of the heads."""

    def forward(self, x, keep=None):
        self.scale = self.head_dim**-0.5
        return super().forward(x, keep or {})


@pytest.mark.parametrize("kind", [FlatTokens, Shuffled, FixedSizes, OwnScale])
def test_what_would_compute_something_else_is_refused_and_nothing_changes(kind):
    torch.manual_seed(0)
    model, batches = kind().double().eval(), data((12,))
    pruner = pruner_of(model, tp.importance.MagnitudeImportance())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="computes what it does with them at zero"):
        remove_channels_(model, TASK, batches, pruner, adapt=branches.adapt)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_sizes_that_the_code_keeps_are_asked_for():
    model, batches = network("attention")
    pruner = pruner_of(model, importances("fisher", model, batches))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="in `adapt`"):
        remove_channels_(model, TASK, batches, pruner)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_outputs_that_would_lose_channels_are_refused():
    model, batches = build("plain"), data()
    layer = model.fc2
    group = graph_of(model).get_pruning_group(layer, tp.prune_linear_out_channels, [1])
    with pytest.raises(ValueError, match="whose outputs are the model's"):
        remove_channels_(model, TASK, batches, [group])


def test_indices_that_a_layer_does_not_have_are_refused():
    class Pixels(branches.Branches):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.head = self.conv(2, 8), self.conv(2, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.c(nn.functional.pixel_shuffle(self.a(x), 2)).mean((2, 3)))

    torch.manual_seed(0)
    model, batches = Pixels().double(), data((12,))
    pruner = pruner_of(model, importances("fisher", model, batches))
    with pytest.raises(ValueError, match=r"the channels of c.*ignored_layers"):
        list(pruner.step(interactive=True))


def test_a_layer_that_shares_its_weight_is_not_fitted_anew():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 3),
    ).double()  # fmt: skip
    model[3].weight = model[1].weight
    batches, weight = data((12,)), model[1].weight.detach().clone()
    graph = graph_of(model)
    group = graph.get_pruning_group(model[3], tp.prune_conv_out_channels, [1])
    assert compensate_channels_(model, TASK, batches, [group]).keys() == {"6"}
    assert torch.equal(model[1].weight, weight)


def attention_groups(heads, channels):
    torch.manual_seed(0)
    model = ViT(width=8, heads=heads, depth=1).double().eval()
    graph = graph_of(model)
    return model, graph.get_pruning_group(model.patch, tp.prune_conv_out_channels, channels)


def test_the_heads_of_torchs_attention_keep_their_scale():
    model, group = attention_groups(2, [1, 3, 5, 6])  # two of either head
    batches, attention = data((12,)), model.blocks[0][1].attention
    x = torch.randn(3, 4, 8).double()
    x[..., [1, 3, 5, 6]] = 0
    dense = copy.deepcopy(attention)
    with torch.no_grad():
        for t in (dense.in_proj_weight, dense.in_proj_bias):
            t.unflatten(0, (3, 8))[:, [1, 3, 5, 6]] = 0
        wanted = dense(x, x, x)[0][..., [0, 2, 4, 7]]
    remove_channels_(model, TASK, batches, [group], damping=None)
    x = x[..., [0, 2, 4, 7]]
    same(attention(x, x, x)[0], wanted)


def test_heads_that_would_lose_different_numbers_are_refused():
    model, group = attention_groups(2, [0, 1])
    with pytest.raises(ValueError, match="heads without num_heads"):
        remove_channels_(model, TASK, data((12,)), [group])
