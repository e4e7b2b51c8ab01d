"""What is changed beside the weights, between two products of one operator, is noticed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv import HessianOperator


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.frozen = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.act, self.scale = nn.Tanh(), 1.0

    def forward(self, x):
        return self.scale * self.b(self.frozen(self.act(self.a(x))))


def setting(dtype=torch.float64):
    torch.manual_seed(0)
    batches = [
        {"x": torch.randn(n, 3, dtype=dtype), "y": torch.randint(4, (n,)), "t": 1.0} for n in (6, 2)
    ]
    return Net().to(dtype), batches


class Scaled(hesscurv.Task):
    def outputs(self, model, batch):
        return model(batch["x"]) * batch["t"]

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["y"])


def columns(H):
    return torch.eye(H.shape[0], dtype=H.dtype)


def check(H, build):
    """The next product is that of an operator built now."""
    expected = build().to_dense()
    got = H @ columns(H)
    assert float((got - expected).norm() / expected.norm()) < 1e-9


@pytest.mark.parametrize("round_", range(3))
def test_a_list_that_is_refilled(round_):
    model, batches = setting()

    def build():
        return HessianOperator(model, Scaled(), batches)

    H = build()
    for _ in range(4):  # freed tensors' addresses come again
        H @ columns(H)
        batches.clear()
        for _ in range(2):
            batches.append({"x": torch.randn(6, 3).double(), "y": torch.randint(4, (6,)), "t": 1.0})
        check(H, build)


def test_a_number_in_a_batch():
    model, batches = setting()
    H = HessianOperator(model, Scaled(), batches)
    H @ columns(H)
    batches[0]["t"] = 3.0
    check(H, lambda: HessianOperator(model, Scaled(), batches))


@pytest.mark.parametrize("how", ["written", "replaced", "option"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weight_of_a_loss(how, dtype):
    model, batches = setting(torch.float64)
    pairs = [(b["x"], b["y"]) for b in batches]
    loss = nn.CrossEntropyLoss(weight=torch.rand(4, dtype=dtype) + 0.5)

    def build():
        return HessianOperator(model, task, pairs)

    task = hesscurv.supervised(loss)
    H = build()
    H @ columns(H)
    new = torch.tensor([1.0, 5.0, 0.2, 2.0], dtype=dtype)
    if how == "written":
        loss.weight.copy_(new)
    elif how == "replaced":
        loss.weight = new
    else:
        loss.label_smoothing = 0.4
    check(H, build)


@pytest.mark.parametrize("change", ["sign", "order"])
def test_a_frozen_weight_written_past_the_version_counter(change):
    model, batches = setting()
    H = HessianOperator(model, Scaled(), batches)
    H @ columns(H)
    data = model.frozen.weight.data
    data.copy_(-data if change == "sign" else data.flip(0).clone())
    check(H, lambda: HessianOperator(model, Scaled(), batches))


@pytest.mark.parametrize("change", ["attribute", "activation", "captured"])
def test_what_leaves_no_mark_is_noticed_by_the_next_solve(change):
    model, batches = setting()
    captured = [1.0]

    def task(m, b):
        return F.cross_entropy(captured[0] * m(b["x"]), b["y"])

    H = HessianOperator(model, task, batches)
    hesscurv.eigsh(H, 4)
    if change == "attribute":
        model.scale = 2.0
    elif change == "activation":
        model.act = nn.Sigmoid()
    else:
        captured[0] = 2.0
    expected = hesscurv.eigsh(HessianOperator(model, task, batches), 4)
    got = hesscurv.eigsh(H, 4)
    torch.testing.assert_close(got.eigenvalues, expected.eigenvalues, rtol=1e-6, atol=0)


def test_without_changes_nothing_is_set_up_again():
    model, batches = setting()
    calls = [0]

    def task(m, b):
        calls[0] += 1
        return F.cross_entropy(m(b["x"]), b["y"])

    H = HessianOperator(model, task, batches, way="retained", check=False)
    for _ in range(2):
        hesscurv.eigsh(H, 4)
    seen = calls[0]
    hesscurv.eigsh(H, 4)
    assert calls[0] == seen + 1  # the loss of the first batch
