"""Covariances of layers' inputs against the layers' own gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import hesscurv
from hesscurv.objective.objective import Objective
from hesscurv.pruning.curvature.layer_inputs import has_covariance, input_covariances, num_blocks
from hesscurv.pruning.curvature.sample_weights import weigh
from hesscurv.pruning.weights import find_weights

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums of some hundred terms


class Layer(nn.Module):
    """A layer behind another one, so that its inputs are not the data."""

    def __init__(self, layer, channels):
        super().__init__()
        self.first = nn.Conv2d(2, channels, 1) if isinstance(layer, nn.Conv2d) else None
        self.layer = layer
        self.norm = nn.BatchNorm1d(1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = x if self.first is None else torch.tanh(self.first(x))
        return self.norm(self.drop(self.layer(x)).flatten(1).sum(1, keepdim=True))


def objective_of(model, batches):
    objective = Objective(
        model,
        hesscurv.supervised(nn.MSELoss()),
        batches,
        None,
        training=False,
        compute_dtype=None,
        budget=None,
    )
    objective.refresh()
    return objective


def covariances(model, batches, names, largest=1000):
    objective = objective_of(model, batches)
    weights = find_weights(model, names)
    samples = weigh(objective, batches)
    return input_covariances(objective, objective.parameters(), samples, weights, largest)


def gradients_at_places(model, x):
    """For each sample and place of the layer's output, the gradient of that place's channel 0."""
    seen = []
    handle = model.layer.register_forward_hook(lambda module, args, out: seen.append(out))
    model.eval()(x)
    handle.remove()
    (out,) = seen
    # A convolution has its channels second, a linear layer last.
    places = (out[:, 0] if out.ndim == 4 else out[..., 0]).flatten()
    for entry in places:
        (slope,) = torch.autograd.grad(entry, model.layer.weight, retain_graph=True)
        yield slope[0].flatten()


def by_loop(model, batches):
    """The mean over samples of the sum over places of a a^T: with delta_t = e_1, dL/dW is a_t."""
    model = copy.deepcopy(model)
    total, n = 0, 0
    for x, _ in batches:
        total = total + sum(torch.outer(a, a) for a in gradients_at_places(model, x))
        n += len(x)
    return total / n


def data(*shape, sizes=(3, 2)):
    return [(torch.randn(n, *shape).double(), torch.randn(n, 1).double()) for n in sizes]


CONVOLUTIONS = {
    "plain": {},
    "padding": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": (2, 1)},
    "oblong": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular", "dilation": 2},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolutions_covariance_is_that_of_its_patches(kind):
    layer = nn.Conv2d(3, 2, **({"kernel_size": 3} | CONVOLUTIONS[kind]))
    model, batches = Layer(layer, 3).double(), data(2, 6, 5)
    found = covariances(model, batches, ["layer.weight"])["layer.weight"]
    torch.testing.assert_close(found, by_loop(model, batches)[None], **CLOSE)


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=["vectors", "sequences"])
def test_a_linear_layers_covariance_is_that_of_its_inputs(shape):
    model, batches = Layer(nn.Linear(4, 2), 4).double(), data(*shape)
    found = covariances(model, batches, ["layer.weight"])["layer.weight"]
    torch.testing.assert_close(found, by_loop(model, batches)[None], **CLOSE)


@pytest.mark.parametrize(("largest", "count"), [(27, 1), (26, 3), (9, 3), (3, 9), (1, 27)])
def test_blocks_are_the_diagonal_blocks_of_the_whole(largest, count):
    model, batches = Layer(nn.Conv2d(3, 2, 3), 3).double(), data(2, 4, 4)
    found = covariances(model, batches, ["layer.weight"], largest)["layer.weight"]
    i = 27 // count
    whole = by_loop(model, batches)
    expected = torch.stack([whole[b * i :, b * i :][:i, :i] for b in range(count)])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_the_number_of_blocks_is_the_least_divisor():
    assert [num_blocks(12, m) for m in (100, 12, 11, 5, 3, 1)] == [1, 1, 2, 3, 4, 12]
    assert num_blocks(7, 6) == 7


def test_a_layer_that_runs_twice_counts_both_times():
    layer = nn.Linear(3, 3).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(5, 3).double()
    batches = [(x, torch.randn(5, 3).double())]
    objective = objective_of(model, batches)
    weights = find_weights(model, ["0.weight"])
    samples = weigh(objective, batches)
    found = input_covariances(objective, objective.parameters(), samples, weights, 10)
    second = torch.tanh(layer(x)).detach()
    torch.testing.assert_close(found["0.weight"][0], (x.T @ x + second.T @ second) / 5, **CLOSE)


def test_it_is_taken_at_the_given_parameters():
    model, batches = Layer(nn.Conv2d(3, 2, 3), 3).double(), data(2, 4, 4)
    objective = objective_of(model, batches)
    moved = tuple(p + 0.3 for p in objective.parameters())
    weights = find_weights(model, ["layer.weight"])
    samples = weigh(objective, batches)
    found = input_covariances(objective, moved, samples, weights, 1000)["layer.weight"]
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3
    torch.testing.assert_close(found, by_loop(model, batches)[None], **CLOSE)


def test_samples_taken_a_few_at_a_time_give_the_same(monkeypatch):
    model, batches = Layer(nn.Conv2d(3, 2, 3), 3).double(), data(2, 4, 4)
    whole = covariances(model, batches, ["layer.weight"])["layer.weight"]
    monkeypatch.setattr("hesscurv.pruning.curvature.layer_inputs._SAMPLES_AT_ONCE", 2)
    found = covariances(model, batches, ["layer.weight"])["layer.weight"]
    torch.testing.assert_close(found, whole, **CLOSE)


def test_layers_that_do_not_run_are_left_out():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.used(x)

    model = Unused().double()
    assert list(covariances(model, data(3), None)) == ["used.weight"]


def test_only_layers_whose_inputs_can_be_read_have_a_covariance():
    layers = {
        "linear": (nn.Linear(2, 2), True),
        "conv": (nn.Conv2d(2, 2, 3, padding_mode="reflect", padding=1), True),
        "depthwise": (nn.Conv2d(2, 2, 3, groups=2), False),
        "same": (nn.Conv2d(2, 2, 3, padding="same"), False),
        "signal": (nn.Conv1d(2, 2, 3), False),
        "embedding": (nn.Embedding(2, 2), False),
    }
    weights = find_weights(nn.ModuleDict({name: layer for name, (layer, _) in layers.items()}))
    found = {name: has_covariance(weights[f"{name}.weight"]) for name in layers}
    assert found == {name: expected for name, (_, expected) in layers.items()}
    bias = find_weights(layers["linear"][0], ["bias"])["bias"]
    assert not has_covariance(bias)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training, fails):
    model = Layer(nn.Conv2d(3, 2, 3), 3).double().train(training)
    with torch.no_grad():  # else the module cannot be copied
        prune.random_unstructured(model.layer, "weight", 0.5)
    model.first.eval()
    batches = data(2, 4, 4)
    hooks = {name: list(m._forward_pre_hooks) for name, m in model.named_modules()}
    modes = {name: m.training for name, m in model.named_modules()}
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    if fails:
        objective = objective_of(model, batches)
        weights = find_weights(model, ["layer.weight"])
        wrong = [(torch.randn(2, 5, 4, 4).double(), batches[0][1])]
        samples = weigh(objective, wrong)
        rng = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="channels"):
            input_covariances(objective, objective.parameters(), samples, weights, 1000)
    else:
        found = covariances(model, batches, ["layer.weight"])["layer.weight"]
        assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()
    assert {n: list(m._forward_pre_hooks) for n, m in model.named_modules()} == hooks
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
