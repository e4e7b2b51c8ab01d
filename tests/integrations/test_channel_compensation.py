"""Layers that lose inputs are fitted anew by least squares on what is left of them."""

import copy

import pytest
import torch
from channels import EXAMPLE, TASK, build, data, graph_of
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv.integrations import compensate_channels_

# Network, the layer whose outputs go and which, the layer that reads them, its batch norm.
CASES = [
    ("plain", "conv1", [0, 3], "conv2", "bn2"),
    ("plain", "conv2", [1], "fc1", None),
    ("residual", "inner", [2], "outer", None),
    ("dense", "a", [0, 2], "b", None),
]


def going(model, layer, channels):
    """A group of torch-pruning with some outputs of a layer, not pruned yet."""
    module = model.get_submodule(layer)
    graph = graph_of(model)
    return graph.get_pruning_group(
        module, graph.get_pruner_of_module(module).prune_out_channels, channels
    )


def inputs_of(model, layer, batches):
    """Rows of what a layer's weight matrix multiplies, all places of all samples."""
    found = []

    def hook(module, args):
        x = args[0]
        if isinstance(module, nn.Conv2d):
            x = F.unfold(x, module.kernel_size, padding=module.padding).mT.flatten(0, 1)
        found.append(x)

    handle = model.get_submodule(layer).register_forward_pre_hook(hook)
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    handle.remove()
    return torch.cat(found)


def intercept(model, layer, norm):
    bias = model.get_submodule(layer).bias
    if bias is not None:
        return bias.detach().clone()
    return -model.get_submodule(norm).running_mean.clone()


def is_gone(model, layer, group):
    """Which inputs of a layer's weight matrix the group takes, read off a pruned copy."""
    weight = model.get_submodule(layer).weight
    numbered = copy.deepcopy(model)
    numbers = torch.arange(weight.numel(), dtype=torch.float64).view_as(weight)
    numbered.get_submodule(layer).weight.data = numbers
    root = {m: n for n, m in model.named_modules()}[group[0].dep.target.module]
    going(numbered, root, group[0].idxs).prune()
    left = numbered.get_submodule(layer).weight.flatten(1)[0].long()
    gone = torch.ones(weight[0].numel(), dtype=torch.bool)
    gone[left] = False
    return gone


@pytest.mark.parametrize(("network", "root", "channels", "reader", "norm"), CASES)
@pytest.mark.parametrize("damping", [1e-8, 1e-1])
def test_weights_and_intercept_are_those_of_dense_ridge_regression(
    network, root, channels, reader, norm, damping
):
    model, batches = build(network), data((40, 30))
    group = going(model, root, channels)
    gone = is_gone(model, reader, group)
    X = inputs_of(model, reader, batches)
    W = model.get_submodule(reader).weight.detach().flatten(1).clone()
    b = intercept(model, reader, norm)
    compensate_channels_(model, TASK, batches, [group], damping=damping)
    # Rows for the data, and rows that hold the kept weights where they were; the last column is
    # the intercept, which nothing holds.
    K, n = X[:, ~gone], len(X)
    variance = (X - X.mean(0)).square().mean(0).mean()
    pull = (n * damping * variance).sqrt() * torch.eye(K.shape[1], K.shape[1] + 1).double()
    rows = torch.cat([torch.cat([K, torch.ones(n, 1).double()], 1), pull])
    wanted = torch.cat([X @ W.T + b, pull[:, :-1] @ W[:, ~gone].T])
    solution = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
    new = model.get_submodule(reader).weight.flatten(1)
    # Normal equations in float64 square the condition, here up to 1e5.
    torch.testing.assert_close(new[:, ~gone], solution[:-1].T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(intercept(model, reader, norm), solution[-1], rtol=1e-5, atol=1e-6)
    assert (new[:, gone] == 0).all()


@pytest.mark.parametrize(("network", "root", "channels", "reader", "norm"), CASES[:3])
def test_the_model_computes_at_once_what_it_does_once_pruned(network, root, channels, reader, norm):
    model, batches = build(network), data()
    group = going(model, root, channels)
    before = model(batches[0][0])
    compensate_channels_(model, TASK, batches, [group])
    compensated = model(batches[0][0])
    group.prune()
    assert not torch.equal(before, compensated)
    torch.testing.assert_close(model(batches[0][0]), compensated, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("network", ["plain", "residual"])
def test_a_channel_that_repeats_another_is_made_up_for(network):
    model, batches = build(network), data((40, 30))
    root, norm, reader = {
        "plain": ("conv1", "bn1", "conv2"),
        "residual": ("inner", None, "outer"),
    }[network]
    with torch.no_grad():
        for layer in filter(None, (root, norm)):
            for tensor in model.get_submodule(layer).state_dict().values():
                if tensor.ndim:
                    tensor[0] = tensor[2]
    before = model(batches[0][0])
    left = compensate_channels_(model, TASK, batches, [going(model, root, [0])], damping=1e-10)
    assert left.keys() == {reader}
    assert left[reader] < 1e-8
    # The ridge leaves 1e-10 of the variance, over the least one of the inputs.
    torch.testing.assert_close(model(batches[0][0]), before, rtol=1e-6, atol=1e-6)


def test_less_of_the_outputs_is_lost_than_without():
    model, batches = build("plain"), data((40, 30))
    X = inputs_of(model, "conv2", batches)
    W = model.conv2.weight.detach().flatten(1).clone()
    group = going(model, "conv1", [0, 3])
    gone = is_gone(model, "conv2", group)
    left = compensate_channels_(model, TASK, batches, [group])["conv2"]
    error = X @ (W - model.conv2.weight.detach().flatten(1)).T
    lost = X[:, gone] @ W[:, gone].T
    ratio = float(error.var(0, correction=0).sum() / lost.var(0, correction=0).sum())
    assert left == pytest.approx(ratio, rel=1e-9)
    assert 0 < left < 1


def test_groups_that_share_a_reader_are_made_up_for_together():
    model, batches = build("dense"), data((40, 30))
    graph = graph_of(model)
    groups = [
        graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, [0])
        for layer in (model.a, model.b)
    ]
    X = inputs_of(model, "head", batches)
    W, b = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    compensate_channels_(model, TASK, batches, groups, damping=1e-10)
    gone = torch.zeros(10, dtype=torch.bool)
    gone[[4, 7]] = True  # behind the stem's four
    rows = torch.cat([X[:, ~gone], torch.ones(len(X), 1).double()], 1)
    solution = torch.linalg.lstsq(rows, X @ W.T + b).solution
    torch.testing.assert_close(model.head.weight[:, ~gone], solution[:-1].T, rtol=1e-5, atol=1e-6)
    assert (model.head.weight[:, gone] == 0).all()


def test_without_an_intercept_the_means_are_fitted_as_well():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(108, 3)).double()
    batches = data((20,))
    X, W = inputs_of(model, "2", batches), model[2].weight.detach().flatten(1).clone()
    compensate_channels_(model, TASK, batches, [going(model, "0", [1])], damping=1e-10)
    solution = torch.linalg.lstsq(X[:, [0, 2, 3]], X @ W.T).solution
    new = model[2].weight.detach().flatten(1)
    torch.testing.assert_close(new[:, [0, 2, 3]], solution.T, rtol=1e-5, atol=1e-6)


def test_a_sample_of_weight_two_counts_as_two():
    class Weighed(hesscurv.Task):
        def outputs(self, model, batch):
            return model(batch[0])

        def loss(self, outputs, batch):
            losses = F.cross_entropy(outputs, batch[1], reduction="none")
            return (batch[2] * losses).sum() / batch[2].sum()

        def weight(self, batch):
            return float(batch[2].sum())

    one, other = build("plain"), build("plain")
    (x, y) = data((20,))[0]
    weights = torch.ones(20).double()
    weights[:5] = 2
    compensate_channels_(one, Weighed(), [(x, y, weights)], [going(one, "conv1", [0])])
    twice = (torch.cat([x, x[:5]]), torch.cat([y, y[:5]]))
    compensate_channels_(other, TASK, [twice], [going(other, "conv1", [0])])
    torch.testing.assert_close(one.conv2.weight, other.conv2.weight, rtol=1e-9, atol=1e-10)


def test_nothing_else_of_the_model_changes():
    model, batches = build("plain"), data()
    group = going(model, "conv1", [3])
    model.train()
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    compensate_channels_(model, TASK, batches, [group])
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"conv2.weight", "bn2.running_mean"}
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_readers_of_other_kinds_are_left_alone():
    model, batches = build("depthwise"), data()
    before = copy.deepcopy(model.state_dict())
    assert compensate_channels_(model, TASK, batches, [going(model, "widen", [0])]) == {}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert compensate_channels_(model, TASK, batches, []) == {}


def refused(kind):
    """What is passed, the error, and what its message says."""
    model, batches = build("plain"), data()
    groups, damping = [going(model, "conv1", [0])], 1e-3
    if kind == "damping":
        return (model, batches, groups, 0.0), ValueError, "positive finite damping"
    if kind == "group":
        return (model, batches, ["conv1"], damping), TypeError, "groups of torch-pruning"
    if kind == "another model's group":
        return (copy.deepcopy(model), batches, groups, damping), ValueError, "groups of this model"
    if kind == "all inputs":
        return (
            (model, batches, [going(model, "conv1", list(range(5)))], damping),
            ValueError,
            "keep",
        )
    if kind == "NaN":
        batches[1][0][0, 0, 0, 0] = float("nan")
        return (model, batches, groups, damping), ValueError, "finite"
    return (model.state_dict(), batches, groups, damping), TypeError, "torch.nn.Module"


@pytest.mark.parametrize(
    "kind", ["damping", "group", "another model's group", "all inputs", "NaN", "model"]
)
def test_what_cannot_work_is_refused_and_changes_nothing(kind):
    (model, batches, groups, damping), error, message = refused(kind)
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=message):
        compensate_channels_(model, TASK, batches, groups, damping=damping)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())


def test_a_whole_pruning_step_goes_through():
    import torch_pruning as tp

    from hesscurv.integrations import FisherImportance

    model, batches = build("plain"), data((20,))
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE.double(),
        FisherImportance(model, TASK, batches),
        pruning_ratio=0.5,
        ignored_layers=[model.fc2],
    )
    groups = list(pruner.step(interactive=True))
    left = compensate_channels_(model, TASK, batches, groups)
    for group in groups:
        group.prune()
    assert left.keys() == {"conv2", "fc1", "fc2"}
    assert model.conv2.weight.shape == (2, 2, 3, 3)
    assert torch.isfinite(model(batches[0][0])).all()


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_constant_inputs_cost_nothing_where_there_is_an_intercept(value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:2] = value
    batches = [(torch.randn(20, 5).double(), torch.randint(3, (20,)))]
    before = model(batches[0][0])
    group = tp_group(model, batches, [0, 1])
    left = compensate_channels_(model, TASK, batches, [group])
    assert left == {"2": 0.0}
    torch.testing.assert_close(model(batches[0][0]), before, rtol=1e-10, atol=1e-10 * (1 + value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_fewer_samples_than_inputs_are_fitted_exactly(dtype, samples, bias):
    torch.manual_seed(0)
    layers = nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3, bias=bias)
    model = nn.Sequential(*layers).to(dtype)
    batches = [(torch.randn(samples, 5, dtype=dtype), torch.randint(3, (samples,)))]
    before = model(batches[0][0])
    group = tp_group(model, batches, [0, 5, 7])
    compensate_channels_(model, TASK, batches, [group], damping=1e-9)
    # As many equations as samples: solved exactly, but for the ridge, at least eps of the variance.
    tol = 1e-6 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(model(batches[0][0]), before, rtol=tol, atol=tol)


@pytest.mark.parametrize("bias", [-100.0, 0.0])
def test_a_dead_layer_stays_as_it_is(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    with torch.no_grad():
        model[0].bias.fill_(bias)
        model[0].weight.mul_(bias == -100)
    batches = [(torch.randn(9, 5).double(), torch.randint(3, (9,)))]
    kept = model[2].weight[:, [1, 2, 3, 4]].detach().clone()
    assert compensate_channels_(model, TASK, batches, [tp_group(model, batches, [0, 5])]) == {
        "2": 0.0
    }
    assert torch.equal(model[2].weight[:, [1, 2, 3, 4]], kept)
    assert (model[2].weight[:, [0, 5]] == 0).all()


def tp_group(model, batches, channels):
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, batches[0][0][:1])
    return graph.get_pruning_group(model[0], tp.prune_linear_out_channels, channels)
