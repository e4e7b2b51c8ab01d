"""The samples that curvature is measured on: some from the front of what was given, kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hesscurv.operators.batches import part_of
from hesscurv.operators.tasks import num_samples


def take_samples(batches: Iterable[Any], counts: list[int | None], seed: int) -> list[list[Any]]:
    """Read consecutive parts of the given sizes from the front of some batches.

    A loader that shuffles by torch's generators is read as if `torch.manual_seed(seed)` had been
    called before, so that it gives the same samples in another process too; the generators, its
    own one included, are left as found.

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
    with _drawing_from_seed(batches, seed):
        index, taken = 0, 0
        for batch in batches:
            start, size = 0, num_samples(batch)
            while start < size and index < len(counts):
                count = counts[index]
                stop = size if count is None else min(size, start + count - taken)
                whole = start == 0 and stop == size
                out[index].append(batch if whole else part_of(batch, start, stop))
                taken += stop - start
                start = stop
                if count is not None and taken >= count:
                    index, taken = index + 1, 0
            if index >= len(counts):
                break
    return out


@contextmanager
def _drawing_from_seed(batches: Any, seed: int) -> Iterator[None]:
    """Seed torch's generators, and those of a loader, for a while."""
    holders = (batches, getattr(batches, "sampler", None))
    own = [getattr(holder, "generator", None) for holder in holders]
    generators = [g for g in own if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for generator in generators:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
