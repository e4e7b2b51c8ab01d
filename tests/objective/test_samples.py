"""Samples are counted, moved and cut alike, whatever holds a batch's tensors."""

import dataclasses
import types
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import hesscurv
from hesscurv import HessianOperator
from hesscurv.objective.data.batches import Batches, part_of, select, split
from hesscurv.objective.data.samples import (
    is_cuttable,
    map_tensors,
    num_rows,
    num_samples,
    tensors_of,
)

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6) % 3
Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor = dataclasses.field(init=False, default=None)

    def __post_init__(self):
        self.x = self.x / 2  # not to be done again where a batch is moved or cut


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


class Holder:
    """Any class with attributes."""

    def __init__(self, x, y, name="some"):
        self.x, self.y, self.name = x, {"targets": [y]}, name


class Graphs:
    """Like torch-geometric's batches: nodes of several graphs, edges, and a target a graph."""

    def __init__(self, counts, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.store = {
            "x": torch.randn(sum(counts), 3, generator=g),
            "edge_index": torch.randint(sum(counts), (2, 9), generator=g),
            "batch": torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
            "y": torch.randint(2, (len(counts),), generator=g),
        }

    def __getattr__(self, name):
        try:
            return self.store[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __len__(self):
        return len(self.y)

    @property
    def num_graphs(self):
        return len(self.y)

    def to(self, device):
        return self.apply(lambda t: t.to(device))


class AppliedGraphs(Graphs):
    """Whose `apply` writes in place, as torch-geometric's does."""

    def apply(self, fn):
        for name, value in self.store.items():
            self.store[name] = fn(value)
        return self


class Edges:
    """A single graph, with no target and no number of graphs."""

    def __init__(self):
        self.x, self.edge_index = torch.ones(5, 3), torch.ones(2, 9)

    def to(self, device):
        return self.apply(lambda t: t.to(device))

    def apply(self, fn):
        self.x, self.edge_index = fn(self.x), fn(self.edge_index)
        return self


# -- how many ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, Y),
        [X, Y],
        [[X], [Y]],
        [[X, [2 * X]], Y],
        Pair(X, Y),
        {"x": X, "y": Y},
        UserDict(x=X, y=Y),
        Sample(X, Y),
        Frozen(X, Y),
        Holder(X, Y),
        types.SimpleNamespace(x=X, y=Y),
        {"temperature": torch.tensor(2.0), "x": X, "y": Y},
        {"position_ids": torch.ones(1, 9), "input_ids": X, "labels": Y},
        {"x_time_first": torch.ones(9, 6, 2), "labels": Y},
        (torch.ones(1, 9), X, Y),
        {"nested": {"x": X}, "name": "text"},
        (X.to_sparse(), Y),
        Graphs([3] * 6),
        AppliedGraphs([2] * 6),
        (Graphs([2] * 6), torch.ones(6)),
        (pack_sequence([X[:3]] * 6), Y),
        pack_sequence([X[:3]] * 6),
        [(torch.ones(4), torch.tensor(1))] * 6,
        [{"image": torch.ones(3, 4, 4), "label": 1}] * 6,
        ([torch.ones(3, 4, 4)] * 6, [{"boxes": torch.ones(2, 4)}] * 6),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_the_samples_of_a_batch_are_counted(batch):
    assert num_samples(batch) == 6
    assert hesscurv.Task().weight(batch) == 6


@pytest.mark.parametrize(
    "batch",
    [torch.tensor(1.0), "text", 3, {"name": "text"}, object(), Edges(), [], [[X[0], 1]]],
    ids=lambda batch: type(batch).__name__,
)
def test_a_number_that_is_not_known_is_said_so(batch):
    with pytest.raises(ValueError, match=r"number of samples is known.*weight\(batch\)"):
        num_samples(batch)
    assert num_rows(batch) == 1
    if not isinstance(batch, (list, Edges)):
        assert split(batch, 1) == [batch]


def test_an_own_weight_counts_what_is_not_known():
    class Numbers(hesscurv.Task):
        def __call__(self, model, batch):
            return (model.weight**4).sum() * batch

        def weight(self, batch):
            return 2.0

    model = nn.Linear(2, 1, bias=False).double()
    H = HessianOperator(model, Numbers(), [1.0, 3.0])
    expected = torch.diag(24 * model.weight.detach()[0] ** 2)
    torch.testing.assert_close(H.to_dense(), expected)
    with pytest.raises(ValueError, match=r"got a float.*weight\(batch\)"):
        HessianOperator(model, lambda m, b: Numbers()(m, b), [1.0, 3.0])


def test_a_closure_has_one():
    assert num_samples(None) == num_rows(None) == 1


# -- moved, cast and cut ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [Sample(X, Y), Frozen(X, Y), Holder(X, Y), Graphs([3, 2]), AppliedGraphs([3, 2]), Pair(X, Y)],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_of_any_class_are_cast_and_left_as_found(batch):
    before = [t.clone() for t in tensors_of(batch)]
    held = tensors_of(batch)
    assert held
    batches = Batches([batch], torch.device("cpu"), torch.float64, 1 << 20)
    (cast,) = batches.first_pass()
    assert type(cast) is type(batch)
    for old, new in zip(before, tensors_of(cast), strict=True):
        assert new.dtype == (torch.float64 if old.is_floating_point() else old.dtype)
        assert torch.equal(new, old.to(new.dtype))
    assert all(a is b for a, b in zip(held, tensors_of(batch), strict=True))
    assert getattr(cast, "name", "some") == getattr(batch, "name", "some")


@pytest.mark.parametrize(
    "batch", [Sample(X, Y), Frozen(X, Y), types.SimpleNamespace(x=X, y=Y), Pair(X, Y)]
)
def test_batches_of_any_class_are_cut(batch):
    part = part_of(batch, 2, 5)
    assert torch.equal(part.x, batch.x[2:5])
    assert torch.equal(part.y, Y[2:5])


@pytest.mark.parametrize(
    "batch",
    [
        Graphs([3, 2]),
        (AppliedGraphs([3, 2]), torch.ones(2)),
        pack_sequence([X, X[:3]]),
        [(torch.ones(4), torch.tensor(1))] * 3,
    ],
    ids=["graphs", "graphs and targets", "packed", "list of samples"],
)
def test_what_is_joined_up_cannot_be_cut(batch):
    assert not is_cuttable(batch)
    assert split(batch, 100) == [batch]
    with pytest.raises(ValueError, match="can be cut into samples"):
        select(batch, slice(0, 1))


def test_a_container_that_holds_itself_ends():
    batch = {"x": X}
    batch["self"] = batch
    assert len(tensors_of(batch)) == 1
    assert map_tensors(batch, torch.neg)["x"][0, 1] == -1


# -- graphs -----------------------------------------------------------------------------------


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, data):
        h = torch.tanh(self.first(data.x))
        h = h + torch.zeros_like(h).index_add(0, data.edge_index[1], h[data.edge_index[0]])
        pooled = h.new_zeros(data.num_graphs, 4).index_add(0, data.batch, h)
        return self.last(pooled)


class GraphTask(hesscurv.Task):
    def outputs(self, model, batch):
        return model(batch)

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch.y)


@pytest.mark.parametrize("kind", [Graphs, AppliedGraphs])
@pytest.mark.parametrize("task", [GraphTask(), lambda m, b: F.cross_entropy(m(b), b.y)])
def test_batches_of_graphs_count_by_their_graphs(kind, task):
    torch.manual_seed(0)
    model = GraphNet()
    batches = [kind([3, 2, 4, 3], 1), kind([5], 2), kind([2, 2], 3)]
    H = HessianOperator(model, task, batches, compute_dtype=torch.float64, memory_budget=2000)
    found = H.to_dense()
    model.double()
    cast = [map_tensors(b, lambda t: t.double() if t.is_floating_point() else t) for b in batches]
    parts = [HessianOperator(model, task, [b]).to_dense() for b in cast]
    expected = (4 * parts[0] + parts[1] + 2 * parts[2]) / 7
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
