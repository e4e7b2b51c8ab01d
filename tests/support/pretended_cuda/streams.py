"""Streams of the pretended device: what is copied on another than the default one comes late.

The default stream does everything at once. A copy that another stream is given waits, with its
arguments as they will be then, until somebody waits for it: an event of that stream after it, that
stream, or the device. Whoever reads its target without, or has changed its source meanwhile, gets
wrong numbers. That a stream may also be early is shown by tests/linalg/test_transfers.py.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Stream(torch.Stream):
    """Copies that are held back, oldest first."""

    def __new__(cls, device: Any = None, **_: Any) -> Stream:
        index = torch.device("cuda" if device is None else device).index
        index = torch.cuda.current_device() if index is None else index
        return super().__new__(cls, device=torch.device("cuda", index))

    def __init__(self, *_: Any, **__: Any) -> None:
        self.held: deque[Any] = deque()
        self.num_given = self.num_done = 0
        _STREAMS.add(self)

    def give(self, work: Any) -> None:
        self.held.append(work)
        self.num_given += 1

    def run_until(self, number: int) -> None:
        while self.num_done < number:
            self.num_done += 1
            self.held.popleft()()

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.run_until(self.num_given)
        torch.ops.pretended_cuda.synchronize()

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class Event:
    """A place in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._stream: Stream | None = None
        self._number = 0

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or current_stream()
        self._number = self._stream.num_given

    def wait(self, stream: Stream | None = None) -> None:
        """Let the default stream, which is never behind, wait; another one has it in its queue."""
        stream = stream or current_stream()
        if stream is self._stream or self._stream is None:
            return
        if stream is default_stream():
            self._stream.run_until(self._number)
        else:
            waited, number = self._stream, self._number
            stream.give(lambda: waited.run_until(number))

    def query(self) -> bool:
        return self._stream is None or self._stream.num_done >= self._number

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.run_until(self._number)
        torch.ops.pretended_cuda.synchronize()


class _HoldBack(TorchDispatchMode):
    """Gives a stream the copies that are made inside, and refuses whatever else CUDA would do."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.copy_.default:
            if all(r.alias_info is not None for r in func._schema.returns):  # a view
                return func(*args, **kwargs)
            raise AssertionError(f"{func} on another stream: only copies are held back")
        target, source = args[:2]
        if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            raise AssertionError("a copy on another stream that the host waits for")
        _require_direct(target, source)
        self._stream.give(lambda: func(*args, **kwargs))
        return target


def _require_direct(target: Tensor, source: Tensor) -> None:
    """Refuse what CUDA copies by way of pageable memory or a cast: there the host waits."""
    host = [t for t in (target, source) if not t.is_cuda]
    pinned = len(host) == 1 and host[0].is_pinned()
    plain = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
    if target.numel() and not (pinned and plain):
        raise AssertionError(
            f"a copy that is none of contiguous pinned memory in one dtype: {target.dtype} "
            f"{target.stride()} on {target.device} of {source.dtype} {source.stride()}"
        )


_STREAMS: weakref.WeakSet[Stream] = weakref.WeakSet()
_DEFAULT: list[Stream] = []
_CURRENT: list[Stream] = []


def default_stream(_: Any = None) -> Stream:
    if not _DEFAULT:
        _DEFAULT.append(Stream())
    return _DEFAULT[0]


def current_stream(_: Any = None) -> Stream:
    return _CURRENT[-1] if _CURRENT else default_stream()


@contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Let a stream be the current one inside."""
    if chosen is None or chosen is default_stream():
        yield
        return
    _CURRENT.append(chosen)
    try:
        with _HoldBack(chosen):
            yield
    finally:
        _CURRENT.pop()


def synchronize(_: Any = None) -> None:
    """Wait for all streams."""
    for each in list(_STREAMS):
        each.run_until(each.num_given)
    torch.ops.pretended_cuda.synchronize()
