"""Batches are the same in every pass, reading them leaves no trace, and cutting them loses none."""

import dataclasses
import random

import cases
import oracles
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hesscurv
from hesscurv import HessianOperator
from hesscurv.objective.data.batches import Batches, split
from hesscurv.objective.tasks import tensors_of

CPU = torch.device("cpu")
TASK = hesscurv.supervised(nn.CrossEntropyLoss())
FITS, TOO_LARGE = 1 << 20, 1


def read(source, keep_bytes=FITS, cast=None):
    batches = Batches(source, CPU, cast, keep_bytes)
    return batches, list(batches.first_pass())


def dataset(n=20):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 4, generator=generator).double(), torch.arange(n) % 3)


class Augmented(Dataset):
    """Adds noise by torch's own random numbers, or by Python's."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.full((4,), float(index)) + self.draw(), index % 3


def assert_same(first, second):
    for a, b in zip(tensors_of(first), tensors_of(second), strict=True):
        assert torch.equal(a, b)


# -- the same in every pass -------------------------------------------------------------------


@pytest.mark.parametrize("keep_bytes", [FITS, TOO_LARGE])
@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True}, {"num_workers": 1}],
    ids=str,
)
def test_a_loader_that_draws_from_torch_is_the_same_in_every_pass(options, keep_bytes):
    loader = DataLoader(Augmented(lambda: torch.randn(4)), batch_size=4, **options)
    before = torch.get_rng_state()
    batches, first = read(loader, keep_bytes)
    assert (batches.kept is None) == (keep_bytes == TOO_LARGE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    before = torch.get_rng_state()
    for _ in range(2):
        assert_same(first, list(batches))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_reader_of_a_batch_draws_does_not_reach_the_loader():
    batches = Batches(DataLoader(dataset(), batch_size=4, shuffle=True), CPU, None, TOO_LARGE)
    first = list(batches.first_pass())
    second = []
    for batch in batches:
        torch.manual_seed(5)
        second.append(batch)
    assert_same(first, second)


def own_generator():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Augmented(random.random), batch_size=4),
        DataLoader(dataset(10), 4, shuffle=True, drop_last=True, generator=own_generator()),
        DataLoader(dataset(11), 4, sampler=[0, 1, 2], shuffle=False),
    ],
    ids=["augmentation", "samples left out", "another length"],
)
def test_passes_that_differ_are_an_error_with_a_remedy(loader):
    batches, _ = read(loader, TOO_LARGE)
    if isinstance(loader.sampler, list):
        loader.sampler.append(3)
    with pytest.raises(ValueError, match=r"same batches in every pass.*pass list\(loader\)"):
        list(batches)


def test_samples_in_another_order_are_the_same_data_but_not_the_same_batches():
    loader = DataLoader(dataset(), 4, shuffle=True, generator=own_generator())
    batches, first = read(loader, TOO_LARGE)
    assert len(list(batches)) == len(first)
    batches.ordered = True  # as where samples of a batch depend on each other
    with pytest.raises(ValueError, match="samples in a batch depend on each other"):
        list(batches)


@pytest.mark.parametrize(
    "change",
    [
        torch.neg,
        lambda t: t.flip(1),
        lambda t: torch.cat([t[:1].flip(1), t[1:]]),
        lambda t: (t + t.flip(0)) / 2,
    ],
    ids=["negated", "mirrored", "one sample mirrored", "mixed"],
)
def test_data_of_the_same_size_are_told_apart(change):
    source = [torch.randn(50, 4)]
    batches, _ = read(Source(source), TOO_LARGE)
    source[0] = change(source[0])
    with pytest.raises(ValueError, match="same batches in every pass"):
        list(batches)


def test_missing_values_in_data_do_not_make_passes_differ():
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]])
    batches, _ = read(Source([x]), TOO_LARGE)
    assert len(list(batches)) == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_data_of_any_dtype_are_told_apart(dtype):
    source = [torch.tensor([[0, 1, 1, 0]]).to(dtype)]
    batches, _ = read(Source(source), TOO_LARGE)
    assert len(list(batches)) == 1
    source[0] = torch.tensor([[0, 1, 0, 1]]).to(dtype)
    with pytest.raises(ValueError, match="same batches in every pass"):
        list(batches)


# -- what is kept -----------------------------------------------------------------------------


class Source:
    """An iterable that is no list."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class OldProtocol:
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def test_a_sequence_of_the_old_protocol_is_read():
    assert len(read(OldProtocol([torch.ones(2), torch.ones(1)]))[1]) == 2


def test_a_loader_that_refills_one_buffer_is_copied():
    class Refilling:
        def __iter__(self):
            buffer = torch.empty(3)
            for value in range(3):
                yield buffer.fill_(value)

    batches, _ = read(Refilling())
    assert [float(b[0]) for b in batches] == [0.0, 1.0, 2.0]


def test_tensors_of_a_list_are_not_copied_and_always_kept():
    x = torch.ones(100)
    batches, _ = read([x], TOO_LARGE)
    assert batches.kept is not None
    assert batches.kept[0].data_ptr() == x.data_ptr()


def test_tensors_of_a_list_that_are_converted_are_kept_while_they_fit():
    x = torch.ones(100)
    assert read([x], FITS, torch.float64)[0].kept[0].dtype == torch.float64
    batches, _ = read([x], TOO_LARGE, torch.float64)
    assert batches.kept is None
    assert next(iter(batches)).dtype == torch.float64


def test_only_floating_tensors_are_cast():
    _, (batch,) = read([(torch.ones(2), torch.ones(2, dtype=torch.int64))], cast=torch.float64)
    assert [t.dtype for t in batch] == [torch.float64, torch.int64]


@pytest.mark.parametrize("cast", [None, torch.float64])
def test_writes_to_a_list_are_noticed(cast):
    source = [torch.ones(2), torch.ones(3)]
    batches, _ = read(source, cast=cast)
    assert not batches.reread_if_written()
    source[1].mul_(2)
    assert batches.reread_if_written()
    assert not batches.reread_if_written()
    assert float(list(batches)[1][0]) == 2.0
    source.append(torch.ones(1))
    assert batches.reread_if_written()
    assert batches.count == 3


def test_batches_made_in_inference_mode_are_usable():
    with torch.inference_mode():
        data = [(torch.randn(4, 4), torch.arange(4) % 3)]
        model = nn.Linear(4, 3)
    H = HessianOperator(model, TASK, data)
    torch.testing.assert_close(H.to_dense(), H.to_dense())


def test_inputs_that_require_grad_do_so_for_the_loss():
    model, points = cases.pinn_net()
    x = points[0].requires_grad_()

    def residual(model, batch):
        u = model(batch)
        (slope,) = torch.autograd.grad(u.sum(), batch, create_graph=True)
        return (slope**2 + u).mean()

    H = HessianOperator(model, residual, [x], compute_dtype=torch.float64)
    assert H.to_dense().norm() > 0
    assert x.grad is None


# -- micro-batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10])
def test_parts_make_up_the_batch(size):
    batch = {"x": torch.arange(10.0).view(5, 2), "y": torch.arange(5), "scale": torch.tensor(2.0)}
    parts = split(batch, size)
    assert len(parts) == -(-5 // size)
    assert torch.equal(torch.cat([p["x"] for p in parts]), batch["x"])
    assert all(p["scale"] == 2.0 for p in parts)
    assert max(len(p["y"]) for p in parts) <= size


def test_tensors_of_another_length_stay_whole():
    parts = split((torch.ones(4, 2), torch.ones(8)), 2)
    assert [(len(x), len(y)) for x, y in parts] == [(2, 8), (2, 8)]


class GraphNet(nn.Module):
    """Mixes neighbours by a sparse matrix, so that no sample stands for itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, neighbours):
        return self.last(torch.sparse.mm(neighbours, torch.tanh(self.first(x))))


@pytest.mark.parametrize("budget", [None, 2000])
def test_sparse_tensors_in_a_batch_are_left_whole(budget):
    dense = (torch.rand(20, 20) > 0.8).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    model = GraphNet().double()
    H = HessianOperator(model, TASK, [((x, dense.to_sparse()), y)], memory_budget=budget)
    plain = cases.supervised(model, [])
    plain.batches = [(x, y)]
    plain.loss = lambda m, b: nn.functional.cross_entropy(m(b[0], dense), b[1])
    expected = oracles.dense_hessian(plain)
    torch.testing.assert_close(H.to_dense(), expected, rtol=1e-10, atol=1e-13)


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "sample"


def test_batches_that_are_dataclasses_are_weighted_cast_and_cut():
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch.x), batch.y)

    problem = cases.build("mlp").cast(torch.float32)
    batches = [Sample(*batch) for batch in problem.batches]
    H = HessianOperator(problem.model, loss, batches, compute_dtype=torch.float64)
    expected = oracles.dense_hessian(problem.cast(torch.float64))
    problem.model.float()
    torch.testing.assert_close(H.to_dense(), expected, rtol=1e-10, atol=1e-13)
    assert [part.x.shape[0] for part in split(batches[0], 3)] == [3, 1]


def test_remembered_weights_follow_the_batches():
    """Targets that are written to, so that others count, change each batch's share."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4).double()
    batches = [(torch.randn(4, 3, dtype=torch.float64), torch.randint(4, (4,))) for _ in range(2)]
    task = hesscurv.supervised(torch.nn.CrossEntropyLoss(ignore_index=-1))
    H = hesscurv.HessianOperator(model, task, batches)
    V = torch.randn(H.shape[0], 2, dtype=torch.float64)
    before = H @ V
    batches[0][1][:3] = -1
    after = H @ V
    fresh = hesscurv.HessianOperator(model, task, batches) @ V
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh, rtol=1e-12, atol=1e-14)
