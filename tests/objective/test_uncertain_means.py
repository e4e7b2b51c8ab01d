"""Losses and batches of which the present outputs, or shapes, do not tell what is averaged."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv import GGNOperator, HessianOperator

WEIGHTS = torch.tensor([1.0, 5.0, 0.2, 2.0])


def net(head=1.0, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    with torch.no_grad():
        for p in model[2].parameters():
            p.mul_(head)
    return model


def data(*sizes, classes=4):
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, generator=draw), torch.randint(classes, (n,), generator=draw))
        for n in sizes
    ]


def weighted(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=WEIGHTS.to(outputs.dtype))


def ignoring(outputs, targets):
    return F.cross_entropy(outputs, targets, ignore_index=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("loss", [weighted, ignoring])
def test_a_small_last_layer_does_not_hide_what_a_loss_averages(loss, head, dtype):
    """At a last layer of zeros all samples have the same loss, of which any mean is the same."""
    batches = data(6, 6, 3, 1)
    for task in (hesscurv.supervised(lambda o, y: loss(o, y)), lambda m, b: loss(m(b[0]), b[1])):
        with pytest.raises(ValueError, match="weight"):
            HessianOperator(net(head), task, batches, compute_dtype=dtype)
    with pytest.raises(ValueError, match="weight"):
        GGNOperator(net(head), hesscurv.supervised(lambda o, y: loss(o, y)), batches)


@pytest.mark.parametrize("head", [0.0, 1e-3, 1.0])
def test_and_a_right_mean_passes_there(head):
    batches = data(6, 6, 3, 1)
    known = hesscurv.supervised(nn.CrossEntropyLoss())
    expected = HessianOperator(net(head), known, batches, way="batched").to_dense()
    for task in (
        hesscurv.supervised(lambda o, y: F.cross_entropy(o, y)),
        lambda m, b: F.cross_entropy(m(b[0]), b[1]),
    ):
        got = HessianOperator(net(head), task, batches, way="batched")
        torch.testing.assert_close(got.to_dense(), expected)


def test_a_single_batch_is_not_cut_where_a_cut_would_weigh_it_otherwise():
    """A lone batch is what it is; within a small budget it must stay whole."""
    ((x, y),) = data(24)
    H = HessianOperator(
        net(0.0), lambda m, b: weighted(m(b[0]), b[1]), [(x, y)], memory_budget=20_000
    )
    whole = HessianOperator(net(0.0), lambda m, b: weighted(m(b[0]), b[1]), [(x, y)])
    torch.testing.assert_close(H.to_dense(), whole.to_dense())


def test_losses_on_probabilities_are_tested_in_their_range():
    task = hesscurv.supervised(lambda o, y: F.binary_cross_entropy(o, y))
    model = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x, y = torch.randn(6, 3), torch.randint(2, (6, 1)).float()
    HessianOperator(model, task, [(x, y), (x[:2], y[:2])])
    positives = hesscurv.supervised(lambda o, y: (F.relu(o.log() * -y)).sum() / y.sum())
    with pytest.raises(ValueError, match="weight"):
        HessianOperator(model, positives, [(x, y), (x[:2], y[:2])])


@pytest.mark.parametrize("first", [{"image_size": [224, 224]}, {"table": [[0.0] * 7] * 5}])
def test_a_tensor_of_constant_size_is_not_taken_for_the_samples(first):
    constant = {key: torch.tensor(value) for key, value in first.items()}
    batches = [{**constant, "pixels": x, "class": y} for x, y in data(6, 6, 2)]
    task = lambda m, b: F.cross_entropy(m(b["pixels"]), b["class"])  # noqa: E731
    with pytest.raises(ValueError, match=r"number of samples is known.*weight"):
        HessianOperator(net(), task, batches)


def sequences(*sizes, length=4):
    draw = torch.Generator().manual_seed(2)
    return [
        (torch.randn(length, n, 3, generator=draw), torch.randint(4, (length, n), generator=draw))
        for n in sizes
    ]


@pytest.mark.parametrize(
    "task",
    [
        hesscurv.supervised(lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten())),
        lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()),
    ],
    ids=["supervised", "callable"],
)
def test_time_before_samples_is_not_counted_silently(task):
    with pytest.raises(ValueError, match=r"mean over the first dimension, 4, and over another"):
        HessianOperator(net(), task, sequences(6, 6, 1))
    # Of one size, what is counted does not matter.
    HessianOperator(net(), task, sequences(6, 6))


def test_images_of_other_sizes_one_by_one_are_samples():
    images = [(torch.randn(1, 1, s, s), torch.randn(1, 1, s, s)) for s in (4, 6, 5)]
    task = hesscurv.supervised(lambda o, y: (o - y).square().mean())
    H = HessianOperator(nn.Conv2d(1, 1, 3, padding=1), task, images)
    assert H.total_weight == 3


def test_sequences_that_the_loss_pools_are_samples():
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return self.inner(x.tanh().mean(1).sin())

    batches = [(torch.randn(6, t, 3), torch.randint(4, (6,))) for t in (5, 7)]
    for task in (
        hesscurv.supervised(lambda o, y: F.cross_entropy(o, y)),
        lambda m, b: F.cross_entropy(m(b[0]), b[1]),
    ):
        assert HessianOperator(Pooling(), task, batches).total_weight == 12


class Graphs(types.SimpleNamespace):
    """Joined graphs, like torch-geometric's."""

    def to(self, device):
        return self


def graphs(nodes, **extra):
    x = torch.randn(nodes, 3)
    return Graphs(x=x, num_graphs=2, batch=torch.arange(nodes) % 2, **extra)


def test_graphs_count_where_a_tensor_has_as_many_rows():
    batches = [graphs(n, y=torch.tensor([0, 1])) for n in (5, 7)]

    def task(m, b):
        pooled = torch.zeros(2, 4).index_add(0, b.batch, m(b.x))
        return F.cross_entropy(pooled, b.y)

    assert HessianOperator(net(), task, batches).total_weight == 4


@pytest.mark.parametrize("masked", [False, True])
def test_graphs_whose_nodes_are_averaged_ask_for_the_weight(masked):
    def extra(n):
        labels = torch.randint(4, (n,))
        return {"y": labels, "train_mask": labels > 1} if masked else {"labels_of_nodes": labels}

    batches = [graphs(n, **extra(n)) for n in (5, 9)]

    def task(m, b):
        if masked:
            return F.cross_entropy(m(b.x)[b.train_mask], b.y[b.train_mask])
        return F.cross_entropy(m(b.x), b.labels_of_nodes)

    with pytest.raises(ValueError, match="weight"):
        HessianOperator(net(), task, batches)


def test_lists_of_single_samples_may_end_with_a_smaller_one():
    samples = [[(torch.randn(3), y) for y in range(n)] for n in (3, 3, 2)]

    def task(m, b):
        x, y = zip(*b, strict=True)
        return F.cross_entropy(m(torch.stack(x)), torch.tensor(y))

    assert HessianOperator(net(), task, samples).total_weight == 8


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_in_float32_is_no_other_mean_in_float64(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    batches = [(torch.randn(n, 3), torch.randint(4, (n,))) for n in (6, 3)]
    for task in (
        lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]),
        hesscurv.supervised(lambda o, y: F.cross_entropy(o.float(), y)),
    ):
        HessianOperator(model, task, batches, compute_dtype=torch.float64)
