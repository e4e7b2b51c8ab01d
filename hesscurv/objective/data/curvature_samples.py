"""The samples that curvature is measured on: some from the front of what was given, kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hesscurv.linalg.process_settings import LOCK
from hesscurv.objective.data.batches import part_of
from hesscurv.objective.data.samples import map_tensors, num_rows, num_samples


def take_samples(batches: Iterable[Any], counts: list[int | None], seed: int) -> list[list[Any]]:
    """Read consecutive parts of the given sizes from the front of some batches.

    A loader that shuffles by torch's generators is read as if `torch.manual_seed(seed)` had been
    called before, and in epoch 0, so that it gives the same samples in another process too; the
    generators, its own one included, are left as found, and a training loop in the midst of it.

    Args:
        batches: Re-iterable batches.
        counts: How many samples each part has at most; None takes all that are left.
        seed: Of the order in which a loader shuffles.

    Returns:
        A list of batches for each count; the last ones are short or empty where samples run out.
    """
    out: list[list[Any]] = [[] for _ in counts]
    if all(count == 0 for count in counts):
        return out
    is_list = isinstance(batches, (list, tuple))
    batches = _apart(batches)
    with _drawing_from_seed(batches, seed):
        index, taken = 0, 0
        for batch in batches:
            # Where all are taken, nobody needs to know how many there are.
            size = num_rows(batch) if counts == [None] else num_samples(batch)
            start = 0
            while start < size and index < len(counts):
                count = counts[index]
                stop = size if count is None else min(size, start + count - taken)
                whole = start == 0 and stop == size
                part = batch if whole else part_of(batch, start, stop)
                # A loader may refill one buffer, and a part would keep all of its batch.
                out[index].append(part if is_list else map_tensors(part, _copied))
                taken += stop - start
                start = stop
                if count is not None and taken >= count:
                    index, taken = index + 1, 0
            if index >= len(counts):
                break
    return out


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _apart(batches: Any) -> Any:
    """Return batches that can be read while they are being read elsewhere, in a training loop."""
    # Accelerate's loaders announce their beginning and end to all of it; those beneath do not.
    batches = getattr(batches, "base_dataloader", batches)
    if isinstance(batches, DataLoader):
        batches = copy.copy(batches)
        batches._iterator = None  # persistent workers serve one reader at a time
    return batches


def _samplers(batches: Any) -> list[Any]:
    """Return a loader and all that its order comes from."""
    found: list[Any] = []
    waiting = [batches]
    while waiting:
        holder = waiting.pop()
        if holder is not None and not any(holder is other for other in found):
            found.append(holder)
            waiting += [getattr(holder, name, None) for name in ("sampler", "batch_sampler")]
    return found


@contextmanager
def _drawing_from_seed(batches: Any, seed: int) -> Iterator[None]:
    """Seed torch's generators, and those of a loader, for a while."""
    holders = _samplers(batches)
    own = [getattr(holder, "generator", None) for holder in holders]
    generators = [g for g in own if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    # Samplers of distributed training shuffle by the epoch.
    epochs = [h for h in holders if isinstance(getattr(h, "epoch", None), int)]
    numbers = [h.epoch for h in epochs]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    # The generators are the process's: no other thread is to save them meanwhile.
    with LOCK, torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for generator in generators:
            generator.manual_seed(seed)
        try:
            for holder in epochs:
                holder.epoch = 0
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            for holder, number in zip(epochs, numbers, strict=True):
                holder.epoch = number
