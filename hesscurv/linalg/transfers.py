"""Transfers between host and device that overlap with the computation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


def to_device_of(small: Tensor, like: Tensor) -> Tensor:
    """Copy a small matrix to another tensor's device and dtype, without synchronisation.

    An ordinary copy to a GPU waits for all earlier work, so a solver that sends coefficients after
    each block would never have more than one block queued. A copy from pinned memory is queued.

    Args:
        small: A tensor on any device; only copies from the CPU are asynchronous.
        like: A tensor of the target dtype and device.

    Returns:
        The same values, rounded to the dtype of `like`; `small` itself if nothing changes.

    Cost: for a GPU, two copies on the host.
    """
    if like.device.type != "cuda" or small.device.type != "cpu":
        return small.to(like)
    small = small.to(like.dtype).contiguous()
    try:
        # PyTorch keeps the pinned memory until the copy is done.
        return small.pin_memory().to(like.device, non_blocking=True)
    except RuntimeError:  # no more memory can be pinned: copy synchronously
        return small.to(like.device)


def all_finite(*tensors: Tensor) -> bool:
    """Whether no tensor has NaN or inf entries: one pass over each, one synchronisation."""
    # NaN propagates to both bounds; isfinite() on the tensor would allocate a mask of its size.
    bounds = [bound for t in tensors if t.numel() for bound in t.detach().aminmax()]
    return not bounds or bool(torch.stack(bounds).isfinite().all())


class CopyStream:
    """A CUDA stream for copies from and to pinned memory that overlap with the computation.

    Copies run in call order. They are ordered with respect to the computation and the host only by
    `wait_event`, `record_event` and `synchronize`.

    Args:
        device: The CUDA device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)

    def wait_event(self, event: Any) -> None:
        """Make all later copies wait for an event of another stream; the host does not wait."""
        self._stream.wait_event(event)

    def record_event(self) -> Any:
        """Return an event that fires when all copies so far are done."""
        return self._stream.record_event()

    def synchronize(self) -> None:
        """Block the host until all copies so far are done."""
        self._stream.synchronize()

    def copy_(self, target: Tensor, source: Tensor) -> None:
        """Copy a matrix of one dtype between pinned memory and the device.

        Only contiguous memory is copied without staging in pageable memory, which would block the
        host: a range of columns is copied row by row.
        """
        with torch.cuda.stream(self._stream):
            if target.is_contiguous() and source.is_contiguous():
                target.copy_(source, non_blocking=True)
                return
            for to, row in zip(target.unbind(), source.unbind(), strict=True):
                to.copy_(row, non_blocking=True)

    def store_(self, targets: Sequence[Tensor], rows: Tensor) -> None:
        """Copy results of the current stream to pinned memory, overlapping its next work.

        Args:
            targets: Matrices in pinned memory. The host must neither read nor write them until
                `synchronize` has returned.
            rows: Shape (r, D), on the device, in the dtype of the targets, which have r rows
                together. They must not change until then either, but may be freed.
        """
        # The caching allocator must not reuse their memory before the copy is done.
        rows.record_stream(self._stream)
        self.wait_event(torch.cuda.current_stream(self._device).record_event())
        for target, part in zip(targets, rows.split([len(t) for t in targets]), strict=True):
            self.copy_(target, part)


def copy_stream(device: torch.device) -> CopyStream:
    """Return the copy stream of a CUDA device, one per process."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _copy_stream(index)


@functools.cache
def _copy_stream(index: int) -> CopyStream:
    return CopyStream(torch.device("cuda", index))


def prefetched(
    chunks: Iterable[Tensor], device: torch.device, dtype: torch.dtype
) -> Generator[Tensor, None, None]:
    """Yield matrices on a device in turn, copying the next one ahead.

    From pinned memory to a CUDA device, the copy stream fills one of two buffers while the current
    stream works with the other. In all other cases this is ``chunk.to(device, dtype)``.

    Args:
        chunks: Matrices. The host must not write to those in pinned memory until the current
            stream has used them.
        device: The target device.
        dtype: The target dtype.

    Yields:
        Each chunk in turn, for use on the stream that was current at the first. It is valid until
        the next one is requested or the iterator is closed: close it (`contextlib.closing`) if an
        error may end its use early.

    Cost: two buffers of the largest chunk on the device; the host waits for no copy.
    """
    if device.type == "cuda":
        chunks = list(chunks)
        buffers = _buffers(chunks, device)
        if buffers:
            main = torch.cuda.current_stream(device)
            copies = copy_stream(device)
            with contextlib.closing(pipelined(chunks, buffers, main, copies)) as found:
                for chunk in found:
                    yield chunk.to(dtype)
            return
    for chunk in chunks:
        yield chunk.to(device, dtype)


def _buffers(chunks: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return two buffers on a device for chunks in pinned memory; none if any is not pinned."""
    filled = [chunk for chunk in chunks if chunk.numel()]
    if not filled or any(
        chunk.dtype != filled[0].dtype or chunk.device.type != "cpu" or not chunk.is_pinned()
        for chunk in filled
    ):
        return []
    numel = max(chunk.numel() for chunk in filled)
    try:
        return [torch.empty(numel, dtype=filled[0].dtype, device=device) for _ in range(2)]
    except torch.OutOfMemoryError:  # unbuffered, one chunk at a time may fit
        return []


class Stream(Protocol):
    """Ordering of a stream's work after that of another."""

    def wait_event(self, event: Any) -> None:
        """Make all later work of this stream wait for an event."""

    def record_event(self) -> Any:
        """Return an event that fires when all work of this stream so far is done."""


class Copies(Stream, Protocol):
    """A stream that copies."""

    def copy_(self, target: Tensor, source: Tensor) -> None:
        """Copy after all earlier work of this stream."""


def pipelined(
    chunks: Sequence[Tensor], buffers: Sequence[Tensor], main: Stream, copies: Copies
) -> Generator[Tensor, None, None]:
    """Yield copies of chunks in two alternating buffers, each made while the other is in use.

    Args:
        chunks: The matrices.
        buffers: Two vectors with room for the largest, writable after all work queued on `main` so
            far.
        main: The stream that uses the copies.
        copies: The stream that makes them.

    Yields:
        The copies, views of a buffer, for work queued on `main` before the next one is requested.
        However this ends, later work of `main` runs after all copies, so it may reuse the memory of
        the buffers.
    """
    used = [main.record_event()] * 2
    ready: list[Any] = [None, None]
    num_copied = 0
    try:
        for i in range(len(chunks)):
            for j in range(num_copied, min(i + 2, len(chunks))):
                # Chunk j overwrites the buffer of chunk j - 2: wait for its last use.
                copies.wait_event(used[j % 2])
                copies.copy_(_view(buffers[j % 2], chunks[j]), chunks[j])
                ready[j % 2] = copies.record_event()
                num_copied = j + 1
            main.wait_event(ready[i % 2])
            yield _view(buffers[i % 2], chunks[i])
            used[i % 2] = main.record_event()
    finally:
        # On an early exit a copy may still be writing to a buffer that is about to be freed.
        main.wait_event(copies.record_event())


def _view(buffer: Tensor, chunk: Tensor) -> Tensor:
    return buffer[: chunk.numel()].view(chunk.shape)
