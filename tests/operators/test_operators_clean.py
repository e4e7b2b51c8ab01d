"""The model and the process are as before: after a construction, a product, and an error."""

import copy

import cases
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}


def snapshot(model):
    """All that a model holds, and all that a process may have switched."""
    return {
        "flags": [m.training for m in model.modules()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "identities": [id(p) for p in [*model.parameters(), *model.buffers()]],
        "versions": [p._version for p in [*model.parameters(), *model.buffers()]],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in all_of(model)],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "attributes": [set(vars(m)) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "sdp": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        ),
        "cudnn": torch.backends.cudnn.enabled,
    }


def all_of(model):
    return list(model.parameters())


def assert_same(before, after):
    for key, value in before.items():
        if key == "rng":
            assert torch.equal(value, after[key]), key
        elif key == "state":
            assert value.keys() == after[key].keys()
            assert all(torch.equal(v, after[key][k]) for k, v in value.items()), key
        elif key == "grads":
            for old, new in zip(value, after[key], strict=True):
                assert (old is None) == (new is None)
                if old is not None:
                    assert old[0] == new[0]
                    assert torch.equal(old[1], new[1])
        else:
            assert value == after[key], key


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["conv_bn", "transformer", "lstm", "pruned", "weight_norm"])
def test_a_model_is_left_as_found(name, kind, train):
    problem = cases.build(name)
    model = problem.model.train(train)
    for p in list(model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    if name == "pruned":  # pruning sets plain attributes in every forward: as after a training step
        with torch.no_grad():
            problem.loss(model, problem.batches[0])
    numel = sum(p.numel() for p in model.parameters())
    vectors = torch.randn(numel, 5, dtype=torch.float64)
    before = snapshot(model)
    operator = problem.operator(KINDS[kind])
    operator.calibrate()
    operator @ vectors[: operator.shape[0]]
    assert_same(before, snapshot(model))


def test_flags_of_single_modules_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model.train()
    model[1].eval()
    batches = [(torch.randn(6, 4), torch.arange(6) % 3)]
    before = snapshot(model)
    H = HessianOperator(model, hesscurv.supervised(nn.CrossEntropyLoss()), batches)
    H @ torch.ones(H.shape[0])
    assert_same(before, snapshot(model))


class FailsAt(nn.Module):
    """A model that raises from its n-th forward on, having drawn numbers and set an attribute."""

    def __init__(self, n):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.calls, self.n = [], n

    def forward(self, x):
        self.calls.append(1)
        self.cache = self.norm(self.layer(x))
        if len(self.calls) >= self.n:
            torch.randn(3)
            raise RuntimeError("the model's own error")
        return self.cache


@pytest.mark.parametrize("n", range(1, 15))
def test_an_error_in_the_models_forward_leaves_no_trace(n):
    model = FailsAt(n)
    batches = [(torch.randn(6, 4), torch.arange(6) % 3)]
    task = hesscurv.supervised(nn.CrossEntropyLoss())

    def work():
        for _ in range(n):  # every product runs the forward once at least
            H = HessianOperator(model, task, batches, way="retained")
            H @ torch.ones(H.shape[0])

    before = snapshot(model)
    with pytest.raises(RuntimeError, match="own error"):
        work()
    assert_same(before, snapshot(model))


def test_an_error_in_the_loss_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
    batches = [torch.randn(2, 4)]
    before = snapshot(model)

    def task(model, batch):
        model(batch)
        raise KeyError("labels")

    with pytest.raises(KeyError):
        HessianOperator(model, task, batches)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_are_the_same_in_any_grad_mode(mode):
    problem = cases.build("conv_bn")
    H = problem.operator(HessianOperator)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    expected = H @ v
    with mode():
        before = snapshot(problem.model)
        torch.testing.assert_close(H @ v, expected, rtol=1e-12, atol=0)
        fresh = problem.operator(HessianOperator)
        torch.testing.assert_close(fresh @ v.clone(), expected, rtol=1e-12, atol=0)
        assert_same(before, snapshot(problem.model))


def test_autocast_around_a_product_does_not_reach_it():
    problem = cases.build("mlp").cast(torch.float32)
    H = problem.operator(HessianOperator)
    v = torch.randn(H.shape[0])
    expected = H @ v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = snapshot(problem.model)
        torch.testing.assert_close(H @ v, expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(problem.operator(HessianOperator) @ v, expected)
        assert_same(before, snapshot(problem.model))


def test_the_model_trains_and_copies_as_before():
    problem = cases.build("conv_bn")
    H = problem.operator(HessianOperator)
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    copy.deepcopy(problem.model)
    problem.loss(problem.model, problem.batches[0]).backward()
    assert all(p.grad is not None for p in problem.model.parameters())


def test_hooks_on_parameters_never_fire():
    problem = cases.build("mlp")
    fired = []
    for p in problem.model.parameters():
        p.register_hook(lambda grad: fired.append(1))
        p.register_post_accumulate_grad_hook(lambda p: fired.append(2))
    H = problem.operator(HessianOperator)
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert fired == []


@pytest.mark.parametrize("how", ["step", "data", "load", "copy", "assign"])
def test_changed_weights_are_noticed(how):
    problem = cases.build("mlp")
    model = problem.model
    H = problem.operator(HessianOperator)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    old = H @ v
    if how == "step":
        problem.loss(model, problem.batches[0]).backward()
        torch.optim.SGD(model.parameters(), 0.5).step()
    elif how == "data":
        model[0].weight.data[0, 0] += 0.3
    elif how == "load":
        model.load_state_dict({k: 2 * p for k, p in model.state_dict().items()})
    elif how == "copy":
        with torch.no_grad():
            model[2].bias.copy_(torch.randn_like(model[2].bias))
    else:
        model[0].weight = nn.Parameter(2 * model[0].weight.detach())
    new = H @ v
    assert not torch.allclose(new, old)
    torch.testing.assert_close(new, problem.operator(HessianOperator) @ v, rtol=1e-10, atol=0)


def test_data_written_to_in_place_is_noticed():
    problem = cases.build("mlp")
    H = problem.operator(HessianOperator)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    H @ v
    problem.batches[0][0].mul_(2)
    torch.testing.assert_close(H @ v, problem.operator(HessianOperator) @ v, rtol=1e-10, atol=0)


def test_pruned_weights_stay_pruned():
    problem = cases.build("pruned")
    modules = [m for m in problem.model.modules() if prune.is_pruned(m)]
    masks = {k: b.clone() for k, b in problem.model.named_buffers()}
    H = problem.operator(HessianOperator)
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert modules == [m for m in problem.model.modules() if prune.is_pruned(m)]
    assert all(torch.equal(b, masks[k]) for k, b in problem.model.named_buffers())
