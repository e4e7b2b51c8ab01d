"""Detection of changed tensor values, with one synchronisation per device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def differ(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Whether any CPU tensor differs from its copy of the same dtype, without temporaries."""
    return not all(torch.equal(t, copy) for t, copy in pairs)


def read_values(
    pairs: Iterable[tuple[Tensor, Tensor]], others: Iterable[Tensor]
) -> tuple[bool, tuple[float, ...]]:
    """Compare some tensors with copies, and compute three numbers of each of the others.

    Writes through `.data` do not change the version counter, but they change these numbers: a
    scale, a sign or a permutation changes at least one.

    Args:
        pairs: Tensors of one device and their copies there.
        others: Tensors of any devices.

    Returns:
        Whether any of the pairs differs, counting NaN as different; and the numbers, by device.

    Cost: one read of all values, one synchronisation per GPU.
    """
    looks: dict[torch.device, list[Tensor]] = {}
    flags = [(t != copy).any() for t, copy in pairs]
    if flags:
        looks[flags[0].device] = [torch.stack(flags).any().double()]
    for t in others:
        looks.setdefault(t.device, []).extend(_numbers(t))
    numbers = [x for look in looks.values() for x in torch.stack(look).tolist()]
    differs = bool(numbers.pop(0)) if flags else False
    return differs, tuple(numbers)


def _numbers(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    flat = t.detach().reshape(-1)
    norm = torch.linalg.vector_norm(flat, dtype=torch.float64)
    neighbours = torch.linalg.vector_norm(flat[1:] - flat[:-1], dtype=torch.float64)
    return norm, flat.sum(dtype=torch.float64), neighbours
