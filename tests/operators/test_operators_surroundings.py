"""Models with memory, hooks and helpers of their own, and processes with unusual settings."""

import copy
import warnings

import cases
import oracles
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}
TASK = hesscurv.supervised(nn.CrossEntropyLoss())


def gap(got, expected):
    return float((got - expected).norm() / expected.norm())


def data(n=6):
    return [(torch.randn(n, 4), torch.arange(n) % 3)]


def work(model, **options):
    """All that an operator does with a model."""
    for kind in KINDS.values():
        H = kind(model, TASK, data(), **options)
        H.calibrate()
        for way in H.ways:
            if options.get("way", "auto") == "auto":
                H.products.local.product_on(data()[0], torch.ones(2, H.shape[0]), way)
        H @ torch.ones(H.shape[0], 3)


# -- what a model carries ---------------------------------------------------------------------


class Remembering(nn.Module):
    """Sets attributes of every kind in its forward."""

    def __init__(self):
        super().__init__()
        self.layer, self.cache, self.calls, self.history = nn.Linear(4, 3), None, 0, ()
        self.kept = torch.zeros(2)

    def forward(self, x):
        self.cache = self.layer(x)
        self.kept = self.cache.mean()
        self.calls += 1
        self.history = (*self.history, self.cache)
        self.new = x
        return self.cache


def test_attributes_that_a_forward_sets_are_as_before():
    model = Remembering()
    kept = model.kept
    work(model)
    assert (model.cache, model.calls, model.history) == (None, 0, ())
    assert model.kept is kept
    assert not hasattr(model, "new")
    copy.deepcopy(model)


@pytest.mark.parametrize("name", ["lstm", "pruned", "weight_norm", "encoder_layer", "conv_bn"])
def test_a_measured_model_can_be_copied_and_saved(name):
    problem = cases.build(name)
    problem.model.eval()
    expected = problem.loss(copy.deepcopy(problem.model), problem.batches[0])
    for kind in KINDS.values():
        H = problem.operator(kind)
        H.calibrate()
        H @ torch.ones(H.shape[0], dtype=torch.float64)
    twin = copy.deepcopy(problem.model)
    assert torch.equal(problem.loss(twin, problem.batches[0]), expected)
    assert not any(getattr(p, "grad_fn", None) for p in twin.state_dict().values())


def test_an_lstm_keeps_its_own_flat_weights():
    model = cases.build("lstm").model
    problem = cases.build("lstm")
    problem.model = model
    H = problem.operator(HessianOperator)
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    flat = {id(w) for w in model.lstm._flat_weights}
    assert flat == {id(p) for p in model.lstm.parameters()}


def test_weight_norm_of_the_older_kind_is_exact_and_as_before():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Linear(4, 3).double())
    batches = [(x.double(), y) for x, y in data()]
    layer(batches[0][0])
    before = layer.weight
    H = HessianOperator(layer, TASK, batches)

    def loss(model, batch):
        g, v = model.weight_g, model.weight_v
        weight = g * v / v.square().sum(1, keepdim=True).sqrt()
        return nn.functional.cross_entropy(batch[0] @ weight.T + model.bias, batch[1])

    with torch.no_grad():  # so that the oracle can copy it
        layer(batches[0][0])
    problem = cases.Problem(layer, TASK, batches, loss)
    assert gap(H.to_dense(), oracles.dense_hessian(problem)) < 1e-10
    assert before is not layer.weight
    after = layer.weight
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert layer.weight is after


def test_power_iterations_of_spectral_norm_leave_no_trace():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for training in (False, None):
        HessianOperator(model, TASK, data(), training=training, check=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class CheckpointedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("own", [True, False])
def test_a_forward_run_again_in_a_backward_leaves_no_trace(own, training):
    model = CheckpointedNorm().double().train(own)
    problem = cases.supervised(model, [(x.double(), y) for x, y in data()], training=training)
    expected = oracles.dense_hessian(copy.deepcopy(problem))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    H = problem.operator(HessianOperator)
    assert gap(H.to_dense(), expected) < 1e-10
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training == own


class Odd(nn.Module):
    """Parameters of no dimension, of no entries, and of other strides than the usual ones."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.conv = nn.Conv2d(2, 3, 2)

    def forward(self, x):
        return self.scale**2 * torch.tanh(self.conv(x)).mean((2, 3)) + self.empty.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["retained", "batched", "vmapped", "linearized_batched"])
def test_parameters_of_any_shape_and_strides(kind, way):
    model = Odd().double().to(memory_format=torch.channels_last)
    assert not model.conv.weight.is_contiguous()
    problem = cases.supervised(model, [(torch.randn(4, 2, 3, 3).double(), torch.arange(4) % 3)])
    operator = problem.operator(KINDS[kind], way=way, check=False)
    expected = oracles.MATRICES[kind](problem)
    assert gap(operator @ torch.eye(len(expected)).double(), expected) < 1e-10


@pytest.mark.parametrize("params", ["body.0", "body.3.weight", "head"])
def test_part_of_a_checkpointed_models_parameters(params):
    problem = cases.build("checkpointed")
    problem.params = params
    problem.names = [n for n in problem.selected() if n.startswith(params)]
    H = problem.operator(HessianOperator)
    assert gap(H.to_dense(), oracles.dense_hessian(problem)) < 1e-10


def test_hooks_stay_and_those_of_gradients_change_nothing():
    problem = cases.build("mlp")
    model = problem.model
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    hooks = [(dict(m._forward_hooks), dict(m._backward_hooks)) for m in model.modules()]
    H = problem.operator(HessianOperator)
    assert gap(H.to_dense(), oracles.dense("mlp", "hessian")) < 1e-10
    assert "backward" not in seen
    assert hooks == [(dict(m._forward_hooks), dict(m._backward_hooks)) for m in model.modules()]
    seen.clear()
    model(problem.batches[0][0].requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]


def test_tensors_of_the_batches_are_untouched():
    x = torch.randn(6, 4, requires_grad=True)
    batches = [(x, torch.arange(6) % 3)]
    version = x._version
    H = HessianOperator(nn.Linear(4, 3), TASK, batches)
    H @ torch.ones(H.shape[0])
    assert (x.grad, x.grad_fn, x._version, x.requires_grad) == (None, None, version, True)


def test_two_models_in_one_closure_count_the_selected_one():
    first, second = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def closure():
        return second(torch.tanh(first(x))).square().mean()

    both = nn.ModuleList([first, second])
    whole = HessianOperator(both, closure).to_dense()
    H = HessianOperator(first, closure)
    torch.testing.assert_close(H.to_dense(), whole[:8, :8], rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        second.weight.mul_(2)  # not the operator's model, but its loss
    changed = HessianOperator(both, closure).to_dense()
    torch.testing.assert_close(H.to_dense(), changed[:8, :8], rtol=1e-10, atol=1e-14)
    assert first.weight.grad is second.weight.grad is None


# -- the loss does not depend on what is measured ----------------------------------------------


def test_a_closure_over_another_model_is_warned_of():
    model = nn.Linear(3, 1)
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"does not depend on any of \['weight', 'bias'\]"):
        H = HessianOperator(model, lambda: twin(torch.ones(2, 3)).square().mean())
    assert torch.equal(H.to_dense(), torch.zeros(4, 4))


@pytest.mark.parametrize("way", HessianOperator.ways)
def test_a_selection_of_unused_parameters_is_zero_in_every_way(way):
    problem = cases.build("unused")
    problem.params = "unused"
    with pytest.warns(UserWarning, match="does not depend on any"):
        H = problem.operator(HessianOperator, way=way)
    assert torch.equal(H @ torch.eye(6).double(), torch.zeros(6, 6).double())


# -- the process ------------------------------------------------------------------------------


def test_torchs_random_numbers_go_on_as_if_nothing_had_been():
    dataset = TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
    loader = DataLoader(dataset, batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3))
    for budget in (None, 2000):
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        H = HessianOperator(model, TASK, loader, memory_budget=budget)
        H.calibrate()
        H @ torch.ones(H.shape[0], 2)
        assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("way", HessianOperator.ways)
def test_another_default_device_and_dtype_do_not_matter(way):
    problem = cases.build("mlp", batches=1)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            H = problem.operator(HessianOperator, way=way)
            got = H.to_dense()
            G = problem.operator(GGNOperator)
            G.calibrate()
            G @ torch.ones(G.shape[0], 2, dtype=torch.float64, device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert gap(got, oracles.dense("mlp", "hessian", 1)) < 1e-10


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("way", HessianOperator.ways)
def test_every_way_works_in_any_grad_mode(mode, way):
    problem = cases.build("mlp", batches=1)
    with mode():
        H = problem.operator(HessianOperator, way=way)
        got = H @ torch.eye(H.shape[0], dtype=torch.float64)
        H.calibrate()
    assert not got.is_inference()
    assert gap(got, oracles.dense("mlp", "hessian", 1)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_in_inference_mode_is_measured(kind):
    with torch.inference_mode():
        problem = cases.build("conv_bn")
        vectors = torch.randn(problem.operator(KINDS[kind]).shape[0], 2, dtype=torch.float64)
        inside = problem.operator(KINDS[kind]) @ vectors
    expected = oracles.dense("conv_bn", kind) @ vectors.clone()
    assert gap(inside, expected) < 1e-10
    operator = problem.operator(KINDS[kind])
    assert gap(operator @ vectors, expected) < 1e-10
    with torch.inference_mode():
        problem.model.head.weight.mul_(2)
    assert gap(operator @ vectors, expected) > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_random_numbers_and_settings_are_as_before():
    problem = cases.build("lstm")
    problem.model.cuda()
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state(), torch.backends.cudnn.enabled
    H = problem.operator(HessianOperator)
    H.calibrate()
    H @ torch.ones(H.shape[0], dtype=torch.float64, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.backends.cudnn.enabled == before[1]
