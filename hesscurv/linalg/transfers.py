"""Copies between the host and a device: small matrices, and long vectors beside the computation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


def to_device_of(small: Tensor, like: Tensor) -> Tensor:
    """Return a small matrix of the host on another tensor's device, in its dtype.

    An ordinary copy to a GPU waits until all work before it is done, so that a solver which sends
    coefficients after each block would never have more than one block in its queue. From pinned
    memory the copy takes its turn in the queue.

    Args:
        small: A tensor of any device; of the CPU where the copy is not to wait.
        like: A tensor of the dtype and device to have.

    Returns:
        The same values, rounded to the dtype of `like`; `small` itself where nothing changes.

    Cost: for a GPU, two copies on the host.
    """
    if like.device.type != "cuda" or small.device.type != "cpu":
        return small.to(like)
    small = small.to(like.dtype).contiguous()
    try:
        # PyTorch keeps the pinned memory until the copy is done.
        return small.pin_memory().to(like.device, non_blocking=True)
    except RuntimeError:  # no more memory can be pinned: then the copy waits
        return small.to(like.device)


def all_finite(*tensors: Tensor) -> bool:
    """Whether no tensor has NaN or inf entries: one reading of each, and one of the device."""
    # NaN propagates to both bounds; no tensor of flags is made.
    bounds = [bound for t in tensors if t.numel() for bound in t.detach().aminmax()]
    return not bounds or bool(torch.stack(bounds).isfinite().all())


class CopyStream:
    """A stream of a CUDA device that copies from and to pinned memory beside the computation.

    Copies run in the order of their calls. Towards the computation and the host there is no order
    but what `wait_event`, `record_event` and `synchronize` make.

    Args:
        device: The CUDA device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)

    def wait_event(self, event: Any) -> None:
        """Let all later copies wait for an event of another stream; the host does not wait."""
        self._stream.wait_event(event)

    def record_event(self) -> Any:
        """Return an event that comes when all copies so far are done."""
        return self._stream.record_event()

    def synchronize(self) -> None:
        """Let the host wait until all copies so far are done."""
        self._stream.synchronize()

    def copy_(self, target: Tensor, source: Tensor) -> None:
        """Copy a matrix between pinned memory and the device, both of one dtype.

        Only contiguous memory is copied without a detour through pageable memory, for which the
        host would wait: a range of columns goes row by row.
        """
        with torch.cuda.stream(self._stream):
            if target.is_contiguous() and source.is_contiguous():
                target.copy_(source, non_blocking=True)
                return
            for to, row in zip(target.unbind(), source.unbind(), strict=True):
                to.copy_(row, non_blocking=True)

    def store_(self, targets: Sequence[Tensor], rows: Tensor) -> None:
        """Copy what the current stream has computed to pinned memory, beside what it does next.

        Args:
            targets: Matrices in pinned memory. Until `synchronize` has returned, the host must
                neither read nor write them.
            rows: Shape (r, D), on the device, in the dtype of the targets, which have r rows
                together. They must not change until then either; they may be freed.
        """
        # Whoever frees them: their memory is not given away before the copy is done.
        rows.record_stream(self._stream)
        self.wait_event(torch.cuda.current_stream(self._device).record_event())
        for target, part in zip(targets, rows.split([len(t) for t in targets]), strict=True):
            self.copy_(target, part)


def copy_stream(device: torch.device) -> CopyStream:
    """Return the copy stream of a CUDA device, one for the whole process."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _copy_stream(index)


@functools.cache
def _copy_stream(index: int) -> CopyStream:
    return CopyStream(torch.device("cuda", index))


def prefetched(
    chunks: Iterable[Tensor], device: torch.device, dtype: torch.dtype
) -> Generator[Tensor, None, None]:
    """Yield matrices on a device, one after the other, the next being copied meanwhile.

    From pinned memory to a CUDA device, each is copied by the device's copy stream into one of two
    buffers while the current stream works with the one before. In all other cases this is
    ``chunk.to(device, dtype)``: the chunk itself where nothing changes.

    Args:
        chunks: Matrices. The host must not write to those in pinned memory until the current
            stream has used them.
        device: Where they are needed.
        dtype: The dtype in which they are needed.

    Yields:
        Each chunk in turn, to be used on the stream that was current at the first. It is valid
        until the next is asked for, or the iterator is closed: close it (`contextlib.closing`)
        where an error may end its use early.

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
    """Return two buffers on a device for chunks in pinned memory; none where chunks are not."""
    filled = [chunk for chunk in chunks if chunk.numel()]
    if not filled or any(
        chunk.dtype != filled[0].dtype or chunk.device.type != "cpu" or not chunk.is_pinned()
        for chunk in filled
    ):
        return []
    numel = max(chunk.numel() for chunk in filled)
    try:
        return [torch.empty(numel, dtype=filled[0].dtype, device=device) for _ in range(2)]
    except torch.OutOfMemoryError:  # one at a time may fit
        return []


class Stream(Protocol):
    """What orders the work of one stream after that of another."""

    def wait_event(self, event: Any) -> None:
        """Let all later work of this stream wait for an event."""

    def record_event(self) -> Any:
        """Return an event that comes when all work of this stream so far is done."""


class Copies(Stream, Protocol):
    """A stream that copies."""

    def copy_(self, target: Tensor, source: Tensor) -> None:
        """Copy after all earlier work of this stream."""


def pipelined(
    chunks: Sequence[Tensor], buffers: Sequence[Tensor], main: Stream, copies: Copies
) -> Generator[Tensor, None, None]:
    """Yield copies of chunks in two buffers by turns, each made while the one before is in use.

    Args:
        chunks: The matrices.
        buffers: Two vectors with room for the largest, free to be written after all work that
            `main` has been given so far.
        main: The stream that uses what is yielded.
        copies: The stream that copies.

    Yields:
        The copies, views of a buffer, for work that is given to `main` before the next is asked
        for. When this ends, in whatever way, later work of `main` comes after all copies, so that
        the buffers' memory may serve that work.
    """
    used = [main.record_event()] * 2
    ready: list[Any] = [None, None]
    num_copied = 0
    try:
        for i in range(len(chunks)):
            for j in range(num_copied, min(i + 2, len(chunks))):
                copies.wait_event(used[j % 2])
                copies.copy_(_view(buffers[j % 2], chunks[j]), chunks[j])
                ready[j % 2] = copies.record_event()
                num_copied = j + 1
            main.wait_event(ready[i % 2])
            yield _view(buffers[i % 2], chunks[i])
            used[i % 2] = main.record_event()
    finally:
        # Where it ends early, a copy is on its way to a buffer whose memory is about to be freed.
        main.wait_event(copies.record_event())


def _view(buffer: Tensor, chunk: Tensor) -> Tensor:
    return buffer[: chunk.numel()].view(chunk.shape)
