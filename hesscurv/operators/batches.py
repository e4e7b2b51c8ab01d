"""Re-iterable batches: checked, kept or read again, cut into micro-batches, told apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hesscurv.operators.tasks import describe, map_tensors, num_samples, tensors_of


class Batches:
    """The data of an operator: a re-iterable of batches, the same in every pass.

    Batches are kept in memory, on the operator's device, while they fit `keep_bytes`, so that a
    product does no input work and a shuffled loader still gives one operator; larger data are read
    again in every pass, and a pass that differs from the first is an error.

    Args:
        source: An iterable that can be iterated again, such as a list or a DataLoader; or None for
            a closure without data, which counts as one batch.
        device: Where the tensors go.
        cast: The dtype that floating tensors are converted to; None leaves them.
        keep_bytes: The most bytes to keep in memory.

    Raises:
        TypeError: If `source` is a one-shot iterator or not iterable.
        ValueError: If `source` is a single batch.
    """

    def __init__(
        self,
        source: Iterable[Any] | None,
        device: torch.device,
        cast: torch.dtype | None,
        keep_bytes: int,
    ) -> None:
        _check_source(source)
        self._source: Iterable[Any] = [None] if source is None else source
        self._device = device
        self._cast = cast
        self._keep_bytes = keep_bytes
        self._sum = 0.0
        self.count = 0
        self.kept: list[Any] | None = None

    def first_pass(self) -> Iterator[Any]:
        """Yield the batches, keeping them while they fit, and note what a later pass must match.

        Raises:
            ValueError: If there is no batch.
        """
        kept: list[Any] | None = []
        refills = not isinstance(self._source, (list, tuple))  # some loaders refill one buffer
        seen: set[int] = set()
        size = 0
        for batch in self._read():
            self.count += 1
            self._sum += _checksum(batch)
            if kept is not None:
                size += sum(t.numel() * t.element_size() for t in tensors_of(batch))
                kept = [*kept, _own(batch, seen) if refills else batch]
                if size > self._keep_bytes:
                    kept = None
            yield batch
        if self.count == 0:
            raise ValueError(
                "expected at least one batch, got an empty iterable; pass a list of batches or a "
                "DataLoader over some data"
            )
        self.kept = kept

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches on the device; read from the source, they are compared at the end."""
        if self.kept is not None:
            yield from self.kept
            return
        total, count = 0.0, 0
        for batch in self._read():
            total += _checksum(batch)
            count += 1
            yield batch
        if count != self.count or not math.isclose(total, self._sum, rel_tol=1e-6, abs_tol=1e-6):
            raise RuntimeError(
                "the batches differ from pass to pass, so there is no one operator: expected "
                f"{self.count} batches with checksum {self._sum:.9g}, got {count} with {total:.9g}; "
                "turn off shuffling with drop_last and random augmentation, or pass list(loader)"
            )

    def versions(self) -> tuple[int, ...]:
        """Return what tells whether kept batches were written to."""
        return tuple(t._version for batch in self.kept or [] for t in tensors_of(batch))

    def _read(self) -> Iterator[Any]:
        for batch in self._source:
            yield map_tensors(batch, self._convert)

    def _convert(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():  # such a tensor cannot take part in a graph
            tensor = tensor.clone()
        dtype = self._cast if tensor.is_floating_point() else None
        return tensor.detach().to(device=self._device, dtype=dtype or tensor.dtype)


def split(batch: Any, size: int) -> list[Any]:
    """Cut a batch into parts of at most `size` samples; tensors of another length stay whole."""
    n = num_samples(batch)
    if n <= size:
        return [batch]

    def part(start: int) -> Any:
        return map_tensors(
            batch, lambda t: t[start : start + size] if t.ndim > 0 and t.shape[0] == n else t
        )

    return [part(start) for start in range(0, n, size)]


def _own(batch: Any, seen: set[int]) -> Any:
    """Copy the tensors whose memory an earlier batch shares, and note the memory of all."""
    batch = map_tensors(batch, lambda t: t.clone() if t.data_ptr() in seen else t)
    seen.update(t.data_ptr() for t in tensors_of(batch))
    return batch


def _checksum(batch: Any) -> float:
    total = 0.0
    for t in tensors_of(batch):
        if t.numel() and not t.is_complex():
            total += float(t.double().abs().mean()) * t.shape[0] if t.ndim else float(t)
    return total


def _check_source(source: Any) -> None:
    if source is None:
        return
    remedy = "pass a list of batches or a DataLoader"
    if isinstance(source, (Tensor, Mapping)) or (
        isinstance(source, tuple) and source and all(isinstance(t, Tensor) for t in source)
    ):
        raise ValueError(
            f"expected an iterable of batches, got {describe(source)}, which looks like one "
            "batch; wrap it in a list: [batch]"
        )
    if not isinstance(source, Iterable):
        if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            return  # the old sequence protocol iterates as well
        raise TypeError(f"expected an iterable of batches, got {describe(source)}; {remedy}")
    if isinstance(source, Iterator):
        raise TypeError(
            f"expected batches that can be iterated again, got a one-shot {type(source).__name__}; "
            f"{remedy}, or list(...) of it"
        )
