"""NewtonCG on operations without a second derivative: Gauss-Newton works, the Hessian says why."""

import pytest
import torch
from networks import Once
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv.operators.checks.missing_derivatives import MissingDerivativeError
from hesscurv.optim import NewtonCG, PreconditionedOptimizer
from hesscurv.optim.newton.closure_gauss_newton import ClosureGaussNewton
from hesscurv.optim.newton.closure_loss import ClosureLoss

X, TOKENS = torch.randn(6, 4), torch.arange(18).view(6, 3) % 7
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Hard(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.act, self.head = nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.act(self.before(x)))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bag(x)))


class Custom(nn.Module):
    """Autograd leaves out what is before the function, and says nothing."""

    def __init__(self):
        super().__init__()
        self.before, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(Once.apply(self.before(x)))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, slope):
        raise NotImplementedError("no derivative of this function")


class Forward(Custom):
    def forward(self, x):
        return self.head(NoBackward.apply(self.before(x)))


CASES = [
    (Hard, X, r"hardsigmoid in module 'act' \(Hardsigmoid\)"),
    (Bag, TOKENS, r"embedding_bag in module 'bag' \(EmbeddingBag\)"),
    (Custom, X, r"Once in the model \(Custom\)"),
]
TASK = hesscurv.supervised(nn.CrossEntropyLoss())


def made(model, inputs):
    net = model().double()
    return net, inputs.double() if inputs.is_floating_point() else inputs


@pytest.mark.parametrize("calls_backward", [True, False])
@pytest.mark.parametrize(("model", "inputs", "place"), CASES)
def test_the_hessian_names_the_operation_and_remedies_that_work(
    model, inputs, place, calls_backward
):
    net, x = made(model, inputs)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), Y)
        if calls_backward:
            loss.backward()
        return loss

    optimizer = NewtonCG(net.parameters(), rank=3)
    before = [p.detach().clone() for p in net.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(MissingDerivativeError, match=f"no second derivative of {place}") as caught:
        optimizer.step(closure)
    text = str(caught.value)
    assert caught.value.__cause__ is not None
    assert all(map(torch.equal, before, net.parameters()))
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())
    # What it says can be done.
    assert "['head.weight', 'head.bias']" in text
    optimizer = NewtonCG(net.head.parameters(), rank=3)
    first = float(optimizer.step(closure))
    assert float(closure().detach()) < first
    for curvature in ("ggn", "fisher"):
        assert curvature in text
        sgd = torch.optim.SGD(net.parameters(), 1e-2)
        optimizer = PreconditionedOptimizer(sgd, net, TASK, [(x, Y)], curvature=curvature)
        F.cross_entropy(net(x), Y).backward()
        optimizer.step()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("model", "inputs", "place"), CASES)
def test_gauss_newton_is_that_of_the_dense_jacobian(model, inputs, place, vectorize, monkeypatch):
    net, x = made(model, inputs)
    params = list(net.parameters())

    def residuals():
        return net(x) - F.one_hot(Y, 3)

    r = residuals().flatten()
    rows = [torch.autograd.grad(entry, params, retain_graph=True) for entry in r]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    vectors = torch.randn(J.shape[1], 3).double()
    # Kept rows, and rows that are computed for each product.
    for fits in (True, False):
        graph = ClosureLoss(residuals, params, residuals=True).differentiate()
        G = ClosureGaussNewton(graph, vectorize=vectorize)
        monkeypatch.setattr(G, "_fits", lambda fits=fits: fits)
        torch.testing.assert_close(G @ vectors, 2 * J.mT @ (J @ vectors), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(graph.gradient(), 2 * J.mT @ r.detach())


@pytest.mark.parametrize(("model", "inputs", "place"), CASES)
def test_gauss_newton_steps_lower_the_loss(model, inputs, place):
    net, x = made(model, inputs)
    optimizer = NewtonCG(net.parameters(), rank=3, curvature="gauss_newton")
    losses = [float(optimizer.step(lambda: net(x) - F.one_hot(Y, 3))) for _ in range(4)]
    assert losses[-1] < 0.5 * losses[0]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_an_operation_without_any_derivative_leaves_the_parameters_after_it(curvature):
    net, x = made(Forward, X)

    def closure():
        out = net(x) - F.one_hot(Y, 3)
        return out if curvature == "gauss_newton" else out.square().sum()

    optimizer = NewtonCG(net.parameters(), rank=3, curvature=curvature)
    with pytest.raises(MissingDerivativeError, match=r"no derivative of NoBackward.*head\.weight"):
        optimizer.step(closure)
    NewtonCG(net.head.parameters(), rank=3, curvature=curvature).step(closure)


def test_an_operation_of_the_loss_leaves_the_fisher():
    net = nn.Linear(4, 5).double()

    def closure():
        out = net(X.double()).log_softmax(-1)[:, None]
        return nn.CTCLoss()(out, torch.tensor([[1, 2]]), torch.tensor([6]), torch.tensor([2]))

    with pytest.raises(MissingDerivativeError, match="ctc_loss in the loss") as caught:
        NewtonCG(net.parameters(), rank=3).step(closure)
    assert "curvature='fisher'" in str(caught.value)
    assert "'ggn'" not in str(caught.value)


def test_errors_of_the_closure_itself_come_out_as_they_are():
    net, calls = nn.Linear(4, 3), []

    def closure():
        calls.append(1)
        return net(torch.randn(2, 5)).sum()

    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        NewtonCG(net.parameters(), rank=3).step(closure)
    assert len(calls) == 1
