"""Batches that list their samples: each is taken out by its number."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv import EmpiricalFisherOperator
from hesscurv.objective.data.sample_lists import select_listed

X, Y = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
COUNTS = torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0, 1.0]).double()


def pairs():
    return [(x, int(y)) for x, y in zip(X, Y, strict=True)]


def dicts():
    return [{"x": x, "y": int(y), "count": 1} for x, y in zip(X, Y, strict=True)]


def two_lists():
    # Inputs of two sizes, as images in detection have: more than one first dimension.
    images = [F.pad(x, (0, i % 2)) for i, x in enumerate(X)]
    return [images, [{"y": y} for y in Y]]


def read(batch):
    """Return inputs and targets of any of these, as tensors."""
    if isinstance(batch[0], list):
        return torch.stack([x[:4] for x in batch[0]]), torch.stack([t["y"] for t in batch[1]])
    rows = [(s["x"], s["y"]) if isinstance(s, dict) else s[:2] for s in batch]
    return torch.stack([x for x, _ in rows]), torch.tensor([int(y) for _, y in rows])


class Listed(hesscurv.Task):
    def outputs(self, model, batch):
        return model(read(batch)[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, read(batch)[1])

    def weight(self, batch):
        return float(len(read(batch)[1]))


def fisher_of(net, weights=None):
    """The oracle: the outer products of gradients, one backward pass each."""
    weights = torch.ones(len(X)).double() if weights is None else weights
    rows = []
    for x, y in zip(X, Y, strict=True):
        loss = F.cross_entropy(net(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())]))
    J = torch.stack(rows)
    return J.mT @ (weights[:, None] * J) / weights.sum()


@pytest.mark.parametrize("batch", [pairs, dicts, two_lists])
def test_the_fisher_of_a_list_of_samples_is_the_dense_one(batch):
    net = nn.Linear(4, 3).double()
    F_op = EmpiricalFisherOperator(net, Listed(), [batch()])
    found = F_op @ torch.eye(F_op.shape[0]).double()
    torch.testing.assert_close(found, fisher_of(net), rtol=1e-10, atol=1e-12)


def test_batches_of_any_lengths_give_the_same_fisher():
    net, samples = nn.Linear(4, 3).double(), pairs()
    F_op = EmpiricalFisherOperator(net, Listed(), [samples[:3], samples[3:5], samples[5:]])
    found = F_op @ torch.eye(F_op.shape[0]).double()
    torch.testing.assert_close(found, fisher_of(net), rtol=1e-10, atol=1e-12)


def test_listed_samples_count_by_their_weight():
    class Weighed(Listed):
        def loss(self, outputs, batch):
            w = torch.stack([s[2] for s in batch])
            losses = F.cross_entropy(outputs, read(batch)[1], reduction="none")
            return (w * losses).sum() / w.sum()

        def weight(self, batch):
            return float(sum(s[2] for s in batch))

    net = nn.Linear(4, 3).double()
    batch = [(*pair, count) for pair, count in zip(pairs(), COUNTS, strict=True)]
    F_op = EmpiricalFisherOperator(net, Weighed(), [batch])
    found = F_op @ torch.eye(F_op.shape[0]).double()
    torch.testing.assert_close(found, fisher_of(net, COUNTS), rtol=1e-10, atol=1e-12)


def test_two_samples_are_told_from_inputs_and_targets():
    x = torch.zeros(2, 3)
    assert select_listed([(x[0], 1), (x[1], 0)], 2, [1])[0][1] == 0
    images, targets = [x[0], x[1][:2]], [{"y": 1}, {"y": 0}]
    inputs, labels = select_listed([images, targets], 2, [1])
    assert len(inputs) == len(labels) == 1
    assert inputs[0].shape == (2,)
    assert labels == [{"y": 0}]


def test_tensors_with_rows_list_no_samples():
    x = torch.zeros(2, 3)
    assert select_listed((x, torch.zeros(2)), 2, [0]) is None
    assert select_listed((x[:1], torch.zeros(1)), 2, [0]) is None  # rows of tokens, say
    assert select_listed({"x": x, "names": ["a", "b"]}, 2, [0]) is None
