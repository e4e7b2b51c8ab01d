"""Which samples curvature is measured on: as many as asked, the same each time, without a trace."""

import copy
import random
from pathlib import Path

import pytest
import torch
from optim.training import TASK, data, net, sgd, train
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from hesscurv.objective.data.curvature_samples import take_samples


def numbered(count=40):
    """A data set in which each sample is its number."""
    numbers = torch.arange(count)
    return TensorDataset(numbers[:, None].double(), numbers)


def numbers_in(part):
    return [int(n) for batch in part for n in batch[1]]


def taken(loader, *counts, seed=0):
    return [numbers_in(part) for part in take_samples(loader, list(counts), seed)]


# -- how many ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8, 100])
@pytest.mark.parametrize("counts", [(8,), (5, 7), (10, 10), (40,), (39, 5), (None,)])
def test_parts_are_consecutive_and_no_longer_than_asked(size, counts):
    loader = DataLoader(numbered(), size)
    parts, start = taken(loader, *counts), 0
    for count, part in zip(counts, parts, strict=True):
        stop = 40 if count is None else min(40, start + count)
        assert part == list(range(start, stop))
        start = stop


def test_targets_stay_with_their_inputs():
    for batch in take_samples(DataLoader(numbered(), 7, shuffle=True), [19], 3)[0]:
        assert torch.equal(batch[0][:, 0].long(), batch[1])


def test_no_more_is_read_than_is_needed():
    class Counting(IterableDataset):
        read = 0

        def __iter__(self):
            for i in range(1000):
                self.read += 1
                yield torch.tensor([float(i)]), i

    source = Counting()
    assert taken(DataLoader(source, 4), 6) == [[0, 1, 2, 3, 4, 5]]
    assert source.read == 8


def test_samples_of_a_list_are_the_lists_own_and_others_copies():
    batches = [(torch.ones(4, 2), torch.arange(4))]
    (part,) = take_samples(batches, [4], 0)
    assert part[0] is batches[0]
    buffer = (torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))

    class Refilled:
        """A loader with one buffer."""

        def __iter__(self):
            for i in range(3):
                buffer[1].fill_(i)
                yield buffer

    assert taken(Refilled(), 6) == [[0, 0, 1, 1, 2, 2]]


def test_points_that_require_grad_still_do():
    class Points:
        def __iter__(self):
            yield torch.ones(4, 1, requires_grad=True)

    (part,) = take_samples(Points(), [3], 0)
    assert part[0].shape == (3, 1)
    assert part[0].requires_grad
    assert part[0].is_leaf


@pytest.mark.parametrize("samples", [5, 8, 20])
def test_the_optimizer_measures_on_as_many_samples_as_asked(samples):
    model = net()
    optimizer = sgd(model, samples=samples)
    train(model, optimizer, 1)
    assert optimizer._tracker.operator.total_weight == samples
    # The same as an optimizer that has these alone.
    twin = net()
    inputs, targets = (torch.cat(parts)[:samples] for parts in zip(*data(), strict=True))
    alone = sgd(twin, [(inputs, targets)], samples=None)
    train(twin, alone, 1)
    assert alone.report().eigenvalues == pytest.approx(optimizer.report().eigenvalues, rel=1e-6)


# -- the same each time -----------------------------------------------------------------------


class Epochs(Sampler):
    """Shuffles by its epoch, as samplers of distributed training do."""

    def __init__(self):
        self.epoch = 0

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(40, generator=generator).tolist())

    def __len__(self):
        return 40


def generator():
    return torch.Generator().manual_seed(77)


def batch_sampled():
    return BatchSampler(RandomSampler(numbered(), generator=generator()), 8, drop_last=False)


LOADERS = {
    "global generator": lambda: DataLoader(numbered(), 8, shuffle=True),
    "own generator": lambda: DataLoader(numbered(), 8, shuffle=True, generator=generator()),
    "sampler's generator": lambda: DataLoader(
        numbered(),
        8,
        sampler=WeightedRandomSampler(torch.ones(40), 40, replacement=False, generator=generator()),
    ),
    "batch sampler's": lambda: DataLoader(numbered(), batch_sampler=batch_sampled()),
    "with replacement": lambda: DataLoader(
        numbered(), 8, sampler=RandomSampler(numbered(), replacement=True, generator=generator())
    ),
    "epochs": lambda: DataLoader(numbered(), 8, sampler=Epochs()),
    "distributed": lambda: DataLoader(
        numbered(), 8, sampler=DistributedSampler(numbered(), 2, 0, seed=3)
    ),
}


def generators_of(loader):
    holders = [loader, loader.sampler, loader.batch_sampler, loader.batch_sampler.sampler]
    found = [getattr(holder, "generator", None) for holder in holders]
    return [g for g in found if g is not None]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_shuffling_loader_gives_the_same_samples_each_time(name, seed):
    loader = LOADERS[name]()
    first = taken(loader, 6, 6, seed=seed)
    torch.rand(5)  # the global generator goes on,
    for _ in loader:  # and so does the loader's own,
        pass
    for holder in (loader.sampler, loader.batch_sampler):
        if hasattr(holder, "epoch"):
            holder.epoch += 3  # and training
    assert taken(loader, 6, 6, seed=seed) == first
    torch.manual_seed(999)
    assert taken(LOADERS[name](), 6, 6, seed=seed) == first  # in another process


@pytest.mark.parametrize("name", ["global generator", "own generator", "batch sampler's"])
def test_another_seed_gives_other_samples(name):
    loader = LOADERS[name]()
    assert len({tuple(taken(loader, 12, seed=seed)[0]) for seed in range(3)}) == 3


@pytest.mark.parametrize("name", LOADERS)
def test_all_generators_are_left_as_found(name):
    loader = LOADERS[name]()
    found = generators_of(loader)
    states = [g.get_state() for g in found]
    before, python = torch.get_rng_state(), random.getstate()
    epoch = getattr(loader.sampler, "epoch", None)
    taken(loader, 12)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert all(torch.equal(g.get_state(), s) for g, s in zip(found, states, strict=True))
    assert getattr(loader.sampler, "epoch", None) == epoch


def test_generators_are_left_as_found_by_a_loader_that_fails():
    class Broken(TensorDataset):
        def __getitem__(self, index):
            raise ZeroDivisionError("a damaged file")

    loader = DataLoader(Broken(torch.ones(4)), 2, shuffle=True, generator=generator())
    before, own = torch.get_rng_state(), loader.generator.get_state()
    with pytest.raises(ZeroDivisionError):
        take_samples(loader, [4], 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loader.generator.get_state(), own)


# -- in the midst of training -----------------------------------------------------------------


@pytest.mark.parametrize("name", LOADERS)
def test_a_loop_over_the_same_loader_goes_on_as_without(name):
    torch.manual_seed(5)
    expected = [numbers_in([batch]) for batch in LOADERS[name]()]
    torch.manual_seed(5)
    loader, got = LOADERS[name](), []
    for batch in loader:
        got.append(numbers_in([batch]))
        take_samples(loader, [9], 0)
    assert got == expected


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_a_loop_with_worker_processes_goes_on_as_without(persistent):
    def loader():
        return DataLoader(
            numbered(24), 4, shuffle=True, num_workers=1, persistent_workers=persistent
        )

    torch.manual_seed(5)
    plain = loader()
    expected = [[numbers_in([batch]) for batch in plain] for _ in range(2)]
    torch.manual_seed(5)
    read, got = loader(), []
    for epoch in range(2):
        got.append([])
        for i, batch in enumerate(read):
            if epoch == 0 and i == 2:
                assert len(taken(read, 6)[0]) == 6
            got[-1].append(numbers_in([batch]))
    assert got == expected


def test_training_on_the_curvatures_own_loader_reads_what_it_would_alone():
    def loader():
        inputs, targets = (torch.cat(parts) for parts in zip(*data(6), strict=True))
        return DataLoader(TensorDataset(inputs, targets), 8, shuffle=True)

    def read(wrapped):
        torch.manual_seed(11)
        model, batches, seen = net(), loader(), []
        torch.manual_seed(12)
        optimizer = sgd(model, batches, refresh_every=1, samples=16)
        for _ in range(2):
            for batch in batches:
                seen.append(batch[0].sum().item())
                TASK(model, batch).backward()
                (optimizer if wrapped else optimizer.base).step()
        return seen, torch.get_rng_state()

    (seen, state), (expected, expected_state) = read(True), read(False)
    assert seen == expected
    assert torch.equal(state, expected_state)


def test_a_copied_optimizer_draws_the_same_samples():
    inputs, targets = (torch.cat(parts) for parts in zip(*data(6), strict=True))
    loader = DataLoader(TensorDataset(inputs, targets), 8, shuffle=True, generator=generator())
    model = net()
    optimizer = sgd(model, loader, samples=16)
    train(model, optimizer, 2)
    other = copy.deepcopy(optimizer)
    train(model, optimizer, 4, first=2)
    train(other.model, other, 4, first=2)
    for p, q in zip(model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_folder_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = net()
    train(model, sgd(model), 2)
    assert list(Path().iterdir()) == []
