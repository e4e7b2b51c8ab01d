"""The GGN and the Fisher need no second derivative of the model, nor any kind of first one."""

import numpy as np
import pytest
import torch
from networks import Once, Sine
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
KINDS = {"ggn": GGNOperator, "fisher": EmpiricalFisherOperator}


class Numpy(Sine):
    """Leaves torch on the way back: no derivative of the backward pass, and no forward mode."""

    @staticmethod
    def backward(ctx, slope):
        return torch.from_numpy(slope.numpy() * np.cos(ctx.saved_tensors[0].numpy()))


class Detached(Sine):
    """A right first derivative whose own derivative is silently cut."""

    @staticmethod
    def backward(ctx, slope):
        return slope.detach() * ctx.saved_tensors[0].cos()


class WithForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()


class Wrong(Sine):
    """A backward that is not the derivative, without a derivative of its own."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope * 1.5 * ctx.saved_tensors[0].cos()


@torch.library.custom_op("hesscurv_tests::sine", mutates_args=())
def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@torch.library.custom_op("hesscurv_tests::sine_backward", mutates_args=())
def sine_backward(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return slope * x.cos()


sine.register_autograd(
    lambda ctx, slope: sine_backward(ctx.saved_tensors[0], slope),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Net(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn
        self.before, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.fn(self.before(x)))


def net(fn):
    return Net(fn).double()


def data(sizes=(6, 3)):
    return [(torch.randn(n, 4).double(), torch.arange(n) % 3) for n in sizes]


def dense(model, batches, kind):
    """J^T C J by a backward pass for each output; a Hessian of the loss in the outputs."""
    params, total = list(model.parameters()), 0
    count = sum(len(y) for _, y in batches)
    for x, y in batches:
        z = model(x)
        outputs = z if kind == "ggn" else F.cross_entropy(z, y, reduction="none")
        rows = [torch.autograd.grad(e, params, retain_graph=True) for e in outputs.flatten()]
        J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        C = torch.eye(len(J)).double() / len(y)
        if kind == "ggn":
            C = torch.autograd.functional.hessian(
                lambda flat, z=z, y=y: F.cross_entropy(flat.view_as(z), y), z.detach().flatten()
            )
        total = total + len(y) / count * J.T @ C @ J
    return total


CASES = {
    "hardsigmoid": (F.hardsigmoid, "forward"),
    "numpy": (Numpy.apply, "rows"),
    "once differentiable": (Once.apply, "rows"),
    "detached": (Detached.apply, "rows"),
    "with forward mode": (WithForwardMode.apply, "forward"),
    # Forward mode drops it without a word, which differences of the outputs tell.
    "torch.library": (sine, "rows"),
    "tanh": (torch.tanh, "retained"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", [True, False])
def test_products_need_first_derivatives_alone(name, kind, check):
    fn, reference = CASES[name]
    if name == "detached" and not check:
        pytest.skip("what is silently wrong is found by the checks")
    model, batches = net(fn), data()
    operator = KINDS[kind](model, TASK, batches, check=check)
    # Exact to rounding: nothing but first derivatives on either side.
    # Few enough for the reference way, which is the one that is looked at.
    vectors = torch.randn(operator.shape[0], 5).double()
    expected = dense(model, batches, kind) @ vectors
    torch.testing.assert_close(operator @ vectors, expected, rtol=1e-9, atol=1e-12)
    assert operator.ways[0] == reference


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_computed_again_where_memory_is_short(kind):
    model, batches = net(Numpy.apply), data()
    operator = KINDS[kind](model, TASK, batches, memory_budget=2000)
    vectors = torch.randn(operator.shape[0], 5).double()
    expected = dense(model, batches, kind) @ vectors
    torch.testing.assert_close(operator @ vectors, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_eigenpairs_are_those_of_the_dense_matrix(kind):
    model, batches = net(Numpy.apply), data()
    pairs = hesscurv.eigsh(KINDS[kind](model, TASK, batches), k=3, tol=1e-8)
    expected = torch.linalg.eigvalsh(dense(model, batches, kind)).flip(0)[:3]
    torch.testing.assert_close(pairs.eigenvalues, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_that_is_no_derivative_is_refused(kind):
    with pytest.raises(ValueError, match="backward is not its derivative"):
        KINDS[kind](net(Wrong.apply), TASK, data())


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_way_without_derivative_is_refused(kind):
    operator = KINDS[kind](net(Numpy.apply), TASK, data(), way="vmapped")
    with pytest.raises(ValueError, match=r"way='vmapped' cannot be used.*way='auto'"):
        operator @ torch.ones(operator.shape[0]).double()


def test_a_later_batch_may_take_another_branch():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            fn = torch.tanh if len(x) > 4 else Numpy.apply
            return self.head(fn(self.before(x)))

    model, batches = Branching().double(), data((6, 3))
    operator = GGNOperator(model, TASK, batches, check=False)
    vectors = torch.randn(operator.shape[0], 3).double()
    expected = dense(model, batches, "ggn") @ vectors
    torch.testing.assert_close(operator @ vectors, expected, rtol=1e-9, atol=1e-12)


def test_the_hessian_of_a_hidden_dependence_is_refused():
    with pytest.raises(ValueError, match="not symmetric"):
        HessianOperator(net(Detached.apply), TASK, data())


@pytest.mark.parametrize("method", ["obs", "obd"])
def test_pruning_needs_no_second_derivative(method):
    model = nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 6), nn.Hardsigmoid(), nn.Linear(6, 3))
    batches = [(torch.arange(24).view(6, 4) % 7, torch.arange(6) % 3)]
    report = hesscurv.pruning.prune_model(
        model, TASK, batches, sparsity=0.3, stages=1, method=method
    )
    assert report is not None
    zeros = sum(int((m.weight == 0).sum()) for m in (model[1], model[3]))
    assert zeros > 0
