"""Re-iterable batches: validation, caching, splitting, and change detection."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hesscurv.linalg.process_settings import LOCK
from hesscurv.objective.changes import Written, marks_of_batches
from hesscurv.objective.data.samples import (
    describe,
    is_cuttable,
    map_tensors,
    num_rows,
    tensors_of,
)

_END = object()


class Batches:
    """The data of an operator: a re-iterable of batches, the same in every pass.

    Batches are cached on the operator's device while they fit in `keep_bytes`, so a product does no
    input work. Larger data are read in every pass, each time from the same state of torch's random
    number generator, so that a shuffling loader still defines one operator; a pass that differs
    from the first raises an error. The state of the generator is restored. Tensors of a list are
    used without copies if device and dtype allow, and later writes to them are detected; batches
    from other iterables are copied.

    Args:
        source: An iterable that can be iterated again, such as a list or a DataLoader; or None for
            a closure without data, which counts as one batch.
        device: Device of the tensors.
        cast: The dtype that floating tensors are converted to; None leaves them.
        keep_bytes: Maximal bytes to cache, in addition to a list's own.
        may_be_empty: Whether there may be no batch, if other ranks have some.

    Attributes:
        count: Number of batches.
        reads: Number of calls of `first_pass`.
        kept: The cached batches, if any.
        ordered: Whether the assignment of samples to batches matters, so that a pass that shuffles
            them raises an error too.

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
        may_be_empty: bool = False,
    ) -> None:
        check_source(source)
        self._source: Iterable[Any] = [None] if source is None else source
        self._listed = isinstance(self._source, (list, tuple))
        self._device = device
        self._cast = cast
        self._keep_bytes = keep_bytes
        self._may_be_empty = may_be_empty
        self._random_state = _random_state(device)
        self._sums = (0.0, 0.0)
        self._marks: Written | None = None
        self.ordered = False
        self.count = 0
        self.reads = 0
        self.kept: list[Any] | None = None

    def first_pass(self) -> Iterator[Any]:
        """Yield the batches, cache them while they fit, and record the checksum of the pass.

        Raises:
            ValueError: If there is no batch.
        """
        self._marks = self._read_marks()
        self._sums, self.count = (0.0, 0.0), 0
        self.reads += 1
        kept: list[Any] | None = []
        size = 0
        for raw, batch in self._read():
            self.count += 1
            if not self._listed:
                self._sums = _add_to(self._sums, self.count, batch)
            size += _added_bytes(raw, batch)
            if kept is not None:
                kept.append(batch)
                if size > self._keep_bytes:
                    kept = None
            yield batch
        if self.count == 0 and not self._may_be_empty:
            raise ValueError(
                "expected at least one batch, got an empty iterable; pass a list of batches or a "
                "DataLoader over some data"
            )
        self.kept = kept

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches on the device; a pass over the source is verified at its end."""
        if self.kept is not None:
            yield from self.kept
            return
        sums, count = (0.0, 0.0), 0
        for _, batch in self._read():
            count += 1
            if not self._listed:
                sums = _add_to(sums, count, batch)
            yield batch
        got, expected = sums[self.ordered], self._sums[self.ordered]
        if count != self.count or not math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-6):
            raise ValueError(
                "expected the same batches in every pass, without which there is no one operator: "
                f"{self.count} batches with checksum {expected:.9g}, got {count} with {got:.9g}; "
                "turn off random augmentation, and shuffling where drop_last leaves samples out or "
                "samples in a batch depend on each other, or pass list(loader)"
            )

    def reread_if_written(self, otherwise: bool = False) -> bool:
        """Reread a list if its tensors or numbers were written to; return whether it was.

        Args:
            otherwise: Whether to reread in any case.
        """
        if self.reads == 0 or not (otherwise or self._marks != self._read_marks()):
            return False
        for _ in self.first_pass():
            pass
        return True

    def _read_marks(self) -> Written | None:
        return marks_of_batches(self._source) if self._listed else None

    def read(self) -> Iterator[Any]:
        """Yield the batches of another pass, which may differ from the last.

        Each pass continues the random numbers of the previous one; iterate for equal passes.
        """
        for _, batch in self._read(self._random_state):
            yield batch

    def _read(self, state: list[Tensor] | None = None) -> Iterator[tuple[Any, Any]]:
        state = list(self._random_state) if state is None else state
        with _drawing_from(state, self._device):
            iterator = iter(self._source)
        while True:
            with _drawing_from(state, self._device):
                raw = next(iterator, _END)
            if raw is _END:
                return
            yield raw, map_tensors(raw, self._convert)

    def _convert(self, tensor: Tensor) -> Tensor:
        dtype = self._cast if tensor.is_floating_point() else None
        # A loader may reuse one buffer; an inference tensor cannot take part in a graph.
        copy = not self._listed or tensor.is_inference()
        out = tensor.detach().to(device=self._device, dtype=dtype or tensor.dtype, copy=copy)
        return out.requires_grad_(tensor.requires_grad)


def split(batch: Any, size: int) -> list[Any]:
    """Split a batch into parts of at most `size` samples.

    Tensors of another length, and sparse ones, stay whole. A batch with an unknown number of
    samples is one part.

    Raises:
        ValueError: If its samples cannot be separated: graphs, packed sequences.
    """
    n = num_rows(batch)
    if n <= size:
        return [batch]

    return [part_of(batch, start, start + size) for start in range(0, n, size)]


def part_of(batch: Any, start: int, stop: int) -> Any:
    """Return a range of samples of a batch; see `split`."""
    return select(batch, slice(start, stop))


def select(batch: Any, which: slice | Tensor) -> Any:
    """Return the samples selected by a slice, a mask or indices; see `split`."""
    return select_rows(batch, which, num_rows(batch))


def select_rows(batch: Any, which: slice | Tensor, n: int) -> Any:
    """Return a batch with the selected rows of each tensor that has n rows; see `split`."""
    if not is_cuttable(batch):
        raise ValueError(
            f"expected a batch that can be cut into samples, got {describe(batch)}, which is "
            "one whole (graphs, a packed sequence, a list of samples); use smaller batches, or, "
            "where a number of samples was asked for, whole batches"
        )

    def cut(t: Tensor) -> Tensor:
        if t.ndim == 0 or t.shape[0] != n or t.layout is not torch.strided:
            return t
        index = which.to(t.device) if isinstance(which, Tensor) else which
        return t[index].detach().requires_grad_(t.requires_grad)

    return map_tensors(batch, cut)


def _random_state(device: torch.device) -> list[Tensor]:
    with LOCK:  # not while another thread has replaced the state temporarily
        state = [torch.get_rng_state()]
        return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def _drawing_from(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw random numbers from a saved state, and update it in place."""
    with LOCK:  # the generator is global, and loaders of other threads draw from it too
        outside = _random_state(device)
        _set_random_state(state, device)
        try:
            yield
        finally:
            state[:] = _random_state(device)
            _set_random_state(outside, device)


def _added_bytes(raw: Any, batch: Any) -> int:
    """Count the bytes of a batch that are not shared with the source."""
    total = 0
    for given, used in zip(tensors_of(raw), tensors_of(batch), strict=True):
        if used.layout is torch.strided and given.data_ptr() != used.data_ptr():
            total += used.numel() * used.element_size()
    return total


def _add_to(sums: tuple[float, float], index: int, batch: Any) -> tuple[float, float]:
    """Add to two checksums: one independent of the order of samples, one by batch."""
    total = 0.0
    for t in tensors_of(batch):
        if t.layout is torch.strided and t.numel() and not t.is_complex():
            rows = t.detach().reshape(t.shape[0] if t.ndim else 1, -1).double().nan_to_num()
            pattern = torch.arange(rows.shape[1], dtype=torch.float64, device=t.device).cos()
            samples = rows @ pattern
            # Nonlinear, since mixing two samples would preserve a linear sum.
            total += float((samples + 0.5 * samples.abs()).sum())
    return sums[0] + total, sums[1] + index * total


def check_source(source: Any) -> None:
    """Require batches that can be iterated repeatedly; None passes.

    Raises:
        TypeError: If it is a one-shot iterator or not iterable.
        ValueError: If it is a single batch.
    """
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
