"""Checksums of tensors, compared between ranks in place of the entries."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK_NUMEL = 2**20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensors: Iterable[Tensor]) -> int:
    r"""Return an order-sensitive checksum of the bits of some tensors.

    :math:`\sum_i (2 i + 1)\, (k x_i \oplus (k x_i \gg 29)) \bmod 2^{64}` over all entries, read as
    integers. Integer sums do not depend on the order of summation or on the device, so ranks with
    different hardware agree; it is not a cryptographic hash.

    Args:
        tensors: Dense tensors of any dtype; sparse and quantised ones are skipped.

    Cost: one read of the entries, in chunks of 8 MiB, on their device.
    """
    total, offset = 0, 0
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            continue
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.is_complex():
            flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
        bits = flat.view(_INTEGERS[flat.element_size()])
        for part in bits.split(_CHUNK_NUMEL) if bits.numel() else ():
            mixed = part.long() * 0x5851F42D4C957F2D
            mixed ^= mixed >> 29
            places = torch.arange(offset, offset + part.numel(), device=part.device)
            total += int((mixed * (2 * places + 1)).sum())
            offset += part.numel()
        offset += 1  # the same entries, split into tensors differently, give another checksum
    return total % 2**64


def sample_checksum(tensor: Tensor, count: int = 4096) -> int:
    """Return the `checksum` of about `count` entries, evenly spread over a contiguous tensor."""
    flat = tensor.detach().reshape(-1)
    return checksum([flat[:: max(1, flat.numel() // count)]])
