"""Networks whose loss is flat: their curvature is below rounding, and no function is to blame."""

import pytest
import torch
from torch import nn

import hesscurv

OPERATORS = [hesscurv.HessianOperator, hesscurv.GGNOperator]


def flat(seed, factor=None, activation=nn.Tanh):
    """A network that is sure of its classes, and a batch of them: a loss of 0.0 in float32."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 64), activation(), nn.Linear(64, 64), nn.Tanh())
    model.append(nn.Linear(64, 4))
    inputs, targets = torch.randn(64, 10), torch.randint(4, (64,))
    if factor is None:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    with torch.no_grad():
        while factor is not None or nn.functional.cross_entropy(model(inputs), targets) > 0:
            for p in model[-1].parameters():
                p.mul_(factor or 1.5)
            if factor is not None:
                break
    return model, [(inputs, targets)]


# Differences of a loss that is 0.0 tell nothing of its gradient, and say so.
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("kind", OPERATORS)
def test_an_overfit_network_has_an_operator(kind, activation, seed):
    model, batches = flat(seed, activation=activation)
    H = kind(model, hesscurv.supervised(nn.CrossEntropyLoss()), batches)
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0))
    # p (1 - p) where p is 1 - eps: about eps, times squares of the outputs' slopes.
    assert float((H @ v).norm()) < 1e-2 * float(v.norm())


@pytest.mark.parametrize("factor", [1e3, 1e5])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", OPERATORS)
def test_saturated_outputs_have_an_operator(kind, seed, factor):
    model, batches = flat(seed, factor)
    H = kind(model, hesscurv.supervised(nn.CrossEntropyLoss()), batches)
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0))
    assert bool((H @ v).isfinite().all())


class OneSided(torch.autograd.Function):
    """A product whose backward hides what it depends on: its Hessian is not symmetric."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        return grad @ weight.detach().mT, inputs.mT @ grad


class OneSidedLinear(nn.Linear):
    def forward(self, inputs):
        return OneSided.apply(inputs, self.weight.mT) + self.bias


@pytest.mark.parametrize("factor", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_backward_is_beyond_the_floor(dtype, factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), OneSidedLinear(16, 16), nn.Tanh())
    model.append(nn.Linear(16, 4)).to(dtype)
    with torch.no_grad():
        model[-1].weight.mul_(factor)
    batch = torch.randn(40, 10, dtype=dtype), torch.randint(4, (40,))
    with pytest.raises(ValueError, match=r"not symmetric.*autograd.Function"):
        hesscurv.HessianOperator(model, hesscurv.supervised(nn.CrossEntropyLoss()), [batch])
