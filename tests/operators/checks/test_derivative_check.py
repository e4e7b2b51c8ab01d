"""Derivatives that are not the functions' own are refused, and right ones are never."""

import cases
import networks
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}


class KeepsOnCtx(torch.autograd.Function):
    """SiLU whose backward takes its sigmoid from ctx, where no graph leads to it."""

    @staticmethod
    def forward(ctx, x):
        ctx.x, ctx.s = x, torch.sigmoid(x)
        return x * ctx.s

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.s * (1 + ctx.x * (1 - ctx.s)))


class DetachesInBackward(networks.Sine):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.detach().cos()


class HasAWrongFormula(networks.Sine):
    """Off by a tenth: a factor leaves the second derivative symmetric."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 1.1 * g * x.cos()


class Net(nn.Module):
    def __init__(self, activation, width=6):
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)
        self.activation = activation

    def forward(self, x):
        return self.last(self.activation(self.first(x)))


def data(n=20, dtype=torch.float32):
    torch.manual_seed(1)
    return [(torch.randn(n, 5, dtype=dtype), torch.arange(n) % 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [KeepsOnCtx, DetachesInBackward, HasAWrongFormula])
def test_a_wrong_second_derivative_is_refused_by_name(function, dtype):
    torch.manual_seed(0)
    model = Net(function.apply).to(dtype)
    with pytest.raises(ValueError, match=rf"{function.__name__}.*ctx\.saved_tensors.*check=False"):
        HessianOperator(model, TASK, data(dtype=dtype))
    HessianOperator(model, TASK, data(dtype=dtype), check=False)


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_a_wrong_first_derivative_is_refused_where_no_second_is_needed(kind):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="HasAWrongFormula"):
        KINDS[kind](Net(HasAWrongFormula.apply), TASK, data())


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
@pytest.mark.parametrize("function", [KeepsOnCtx, DetachesInBackward])
def test_what_a_backward_hides_does_not_matter_where_no_second_derivative_is_needed(kind, function):
    torch.manual_seed(0)
    model, twin = Net(function.apply), Net(F.silu if function is KeepsOnCtx else torch.sin)
    twin.load_state_dict(model.state_dict())
    got, expected = (KINDS[kind](net, TASK, data()).to_dense() for net in (model, twin))
    # Both are float32 products of the same formula.
    assert float((got - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_right_custom_function_passes(kind, dtype):
    torch.manual_seed(0)
    KINDS[kind](Net(networks.Sine.apply).to(dtype), TASK, data(dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "leaky_relu", "elu", "hardshrink"])
def test_kinks_are_no_wrong_derivatives(kind, name):
    """Also at zero biases and zero inputs, where the kinks lie right at the weights."""
    torch.manual_seed(0)
    model = Net(getattr(F, name), width=500)
    nn.init.zeros_(model.first.bias)
    batches = data(64)
    batches[0][0][::2] = 0
    KINDS[kind](model, TASK, batches)


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_and_batch_norm_pass(kind):
    torch.manual_seed(0)
    batches = [(torch.randn(16, 1, 6, 6).relu(), torch.arange(16) % 3)]
    for training in (False, True):
        KINDS[kind](networks.ConvNet(), TASK, batches, training=training)


def test_a_checkpointed_model_passes_in_float32():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    model = Net(lambda x: x.tanh())
    model.activation = nn.Identity()
    model.first = inner
    model.first.forward = lambda x: checkpoint(nn.Sequential.forward, inner, x, use_reentrant=False)
    HessianOperator(model, TASK, data())


class InFloat32(nn.Module):
    """Computes its activation in float32, as norms of language models do."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x.float()).to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_in_float32_pass_where_right_and_are_refused_where_wrong(kind):
    torch.manual_seed(0)
    KINDS[kind](Net(InFloat32(torch.tanh)), TASK, data())
    with pytest.raises(ValueError, match="ReturnsADifferentGradient"):
        KINDS[kind](Net(InFloat32(ReturnsADifferentGradient.apply)), TASK, data())


class ReturnsADifferentGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 3 * x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return -4 * g * x.cos()


class StopsAGradient(nn.Module):
    """Torch's own functions, and a part that is detached on purpose."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h * h.detach())


def test_a_detached_part_is_told_of_and_counts_as_constant():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="the gradient of the loss differs .* is detached"):
        HessianOperator(StopsAGradient(), TASK, data())


def test_nothing_is_left_changed_by_a_refusal():
    torch.manual_seed(0)
    model = Net(KeepsOnCtx.apply).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batches, state = data(), torch.get_rng_state()
    with pytest.raises(ValueError, match="KeepsOnCtx"):
        HessianOperator(model, TASK, batches)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["pinn", "pinn_of_model", "weight_norm", "lstm", "transformer"])
def test_models_of_every_kind_pass_in_float32(name):
    problem = cases.build(name).cast(torch.float32)
    for kind in cases.kinds(name):
        problem.operator(KINDS[kind])


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Narrow(nn.Module):
    """Computes parts of its own in float32, as language models do."""

    def __init__(self, where):
        super().__init__()
        self.a, self.b, self.where = nn.Linear(3, 5), nn.Linear(5, 4), where

    def forward(self, x):
        h = Square.apply(self.a(x))
        if self.where == "inside":
            h = h.float().tanh().to(h.dtype)
        out = self.b(h)
        return out.float() if self.where == "outputs" else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["inside", "outputs"])
def test_right_derivatives_are_not_refused_where_digits_are_lost_on_the_way(where, dtype):
    for seed in range(12):  # short steps change nothing in float32, or by chance too much
        torch.manual_seed(seed)
        data = [(torch.randn(8, 3), torch.randint(4, (8,)))]
        hesscurv.HessianOperator(
            Narrow(where), hesscurv.supervised(nn.CrossEntropyLoss()), data, compute_dtype=dtype
        )


def test_a_wrong_derivative_is_still_refused_there(monkeypatch):
    def constant(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * g

    monkeypatch.setattr(Square, "backward", staticmethod(constant))
    data = [(torch.randn(8, 3), torch.randint(4, (8,)))]
    with pytest.raises(ValueError, match="Square"):
        hesscurv.HessianOperator(
            Narrow("outputs"), hesscurv.supervised(nn.CrossEntropyLoss()), data
        )
