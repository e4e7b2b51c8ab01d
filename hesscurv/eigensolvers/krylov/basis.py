"""Growing basis: m vectors of length D, in slabs allocated on demand."""

from __future__ import annotations

from contextlib import closing
from typing import Protocol

import torch
from torch import Tensor

from hesscurv.linalg.device_memory import chunk_entries
from hesscurv.linalg.precision import full_precision
from hesscurv.linalg.transfers import CopyStream, copy_stream, prefetched, to_device_of
from hesscurv.storage.pinned_memory import release_pinned
from hesscurv.storage.placement import Placement

# Entries of the temporaries in `rotate_`: 16 MiB in float32, and longer reads for vectors that come
# from a file or over a bus.
_TEMPORARY_NUMEL, _FAR_TEMPORARY_NUMEL = 2**22, 2**25


class Journal(Protocol):
    """Log of all changes of a basis, from which they can be replayed."""

    def append(self, rows: list[Tensor]) -> None:
        """Record appended vectors, in their storage dtype."""

    def rotate(self, start: int, stop: int, Y_nk: Tensor) -> None:
        """Record `Basis.rotate_`."""

    def truncate(self, size: int) -> None:
        """Record `Basis.truncate`."""


class Basis:
    """Up to `capacity` vectors of length D, each contiguous, in slabs of shape (m_i, D).

    The first slab has `first` rows and is all that remains after `shrink`; others are added when
    vectors are appended, so a run that ends early never allocates its full capacity. All sums are
    in the dtype and on the device of the computation, not those of the storage.

    Copies of appended vectors to pinned memory overlap with the next work. Until they are done,
    `block` reads from the device; `slabs` and `shrink` wait for them.

    Args:
        placement: Location, dtype, length and maximal number of the vectors.
        first: Rows of the first slab: the number of wanted vectors.
        grow: Rows of every other slab.
        dtype: Dtype of the computation.
    """

    def __init__(self, placement: Placement, first: int, grow: int, dtype: torch.dtype) -> None:
        self.placement = placement
        self.dim, self.capacity = placement.dim, placement.capacity
        self.size = 0
        self.journal: Journal | None = None
        self._dtype, self._device = dtype, placement.device
        self._grow = max(1, grow)
        self._copies: CopyStream | None = None  # set if slabs are pinned
        # The vectors appended last, in their storage dtype, and the index of the first.
        self._recent: tuple[int, Tensor] | None = None
        self._slabs: list[Tensor] = []
        self._add_slab(min(first, self.capacity))

    def slabs(self, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Return views of vectors start, ..., stop - 1, slab by slab."""
        self._finish_copies()
        return self._views(start, stop)

    def _views(self, start: int, stop: int | None = None) -> list[Tensor]:
        stop = self.size if stop is None else stop
        out: list[Tensor] = []
        offset = 0
        for slab in self._slabs:
            low, high = max(start - offset, 0), min(stop - offset, len(slab))
            if low < high:
                out += self.placement.pieces(slab[low:high])
            offset += len(slab)
        return out

    def block(self, start: int, stop: int) -> Tensor:
        """Return a copy of a few vectors, (b, D), for the computation."""
        if self._recent is not None and start >= self._recent[0]:
            first, rows_rD = self._recent
            self._recent = None  # usually read once; frees their memory on the device
            return rows_rD[start - first : stop - first].to(self._dtype, copy=True)
        out_BD = torch.empty(stop - start, self.dim, dtype=self._dtype, device=self._device)
        self._fill(self.slabs(start, stop), out_BD, from_slabs=True)
        return out_BD

    def append(self, Q_rD: Tensor) -> None:
        """Add vectors at the end.

        Raises:
            ValueError: If they exceed the capacity.
            DiskFullError: If the storage is on a disk that is full.
        """
        if self.size + len(Q_rD) > self.capacity:
            raise ValueError(
                f"expected at most {self.capacity} vectors, got {self.size} + {len(Q_rD)}"
            )
        while self.size + len(Q_rD) > sum(map(len, self._slabs)):
            left = self.capacity - sum(map(len, self._slabs))
            self._add_slab(min(self._grow, left))
        views = self._views(self.size, self.size + len(Q_rD))
        if views and not self._store_beside(views, Q_rD):
            self._finish_copies()
            self._fill(views, Q_rD, from_slabs=False)
        self.size += len(Q_rD)
        if self.journal is not None:
            self._finish_copies()
            self.journal.append(views)

    def rotate_(self, start: int, stop: int, Y_nk: Tensor) -> None:
        """Replace vectors start, ..., stop - 1 by k <= stop - start combinations of them.

        ``V_Dk = Q_Dn Y_nk``, formed in place by chunks of D. Vectors after `stop` move forward, and
        the basis shrinks by n - k.
        """
        n, k = Y_nk.shape
        if n != stop - start or k > n:
            raise ValueError(f"expected coefficients ({stop - start}, k), got {(n, k)}")
        views, targets = self.slabs(start, stop), self._views(start, start + k)
        like = torch.empty(0, device=self._device, dtype=self._dtype)
        Y_kn = to_device_of(Y_nk.mT, like).contiguous()
        parts = Y_kn.split([len(v) for v in views], dim=1)
        far = self.placement.kind == "disk" or self._slabs[0].device != self._device
        numel = _FAR_TEMPORARY_NUMEL if far else _TEMPORARY_NUMEL
        chunk = max(1024, chunk_entries(self._device, numel) // max(k, 1))
        ranges = [slice(low, low + chunk) for low in range(0, self.dim, chunk)]
        # Safe in place: the chunk copied ahead has other columns than the one being written.
        read = prefetched(
            (view[:, columns] for columns in ranges for view in views), like.device, self._dtype
        )
        with full_precision(self._device), closing(read):
            for columns in ranges:
                new_kC = parts[0] @ next(read)
                for part in parts[1:]:
                    new_kC.addmm_(part, next(read))
                for target, piece in zip(
                    targets, new_kC.split([len(t) for t in targets]), strict=True
                ):
                    target[:, columns] = piece
        if k < n:
            moved = [row for view in self.slabs(stop) for row in view]
            rows = [row for view in self._views(start + k, start + k + len(moved)) for row in view]
            # Row by row in ascending order, since source and target ranges may overlap.
            for row, source in zip(rows, moved, strict=True):
                row.copy_(source)
            self.size -= n - k
        if self.journal is not None:
            self.journal.rotate(start, stop, Y_nk)

    def truncate(self, size: int) -> None:
        """Drop the vectors from index `size` on; their memory is reused by later ones."""
        if self.journal is not None and size < self.size:
            self.journal.truncate(size)
        self.size = min(self.size, size)

    def shrink(self) -> Tensor:
        """Free all slabs except the first and return its filled rows, (k, D)."""
        self._finish_copies()
        del self._slabs[1:]
        if self._copies is not None:
            release_pinned()
        self.size = min(self.size, len(self._slabs[0]))
        return self._slabs[0][: self.size]

    def _add_slab(self, rows: int) -> None:
        self._slabs.append(self.placement.allocate(rows))
        on_host = self._slabs[-1].device.type == "cpu" and self._device.type == "cuda"
        if on_host and self._slabs[-1].is_pinned():
            self._copies = copy_stream(self._device)

    def _store_beside(self, views: list[Tensor], Q_rD: Tensor) -> bool:
        """Start an asynchronous copy of vectors to pinned slabs; return whether it was possible."""
        if self._copies is None or Q_rD.device.type != "cuda":
            return False
        if not all(view.is_pinned() for view in views):
            return False
        try:
            # A copy, since the caller may overwrite Q before the transfer is done.
            stored_rD = Q_rD.to(self.placement.dtype, copy=True)
        except torch.OutOfMemoryError:
            return False
        self._copies.store_(views, stored_rD)
        self._recent = self.size, stored_rD
        return True

    def _finish_copies(self) -> None:
        """Wait for copies from and to the slabs, before the host reads or writes them."""
        self._recent = None
        if self._copies is not None:
            self._copies.synchronize()

    def _fill(self, slabs: list[Tensor], block_BD: Tensor, *, from_slabs: bool) -> None:
        done = 0
        for view in slabs:
            part = block_BD[done : done + len(view)]
            if from_slabs:
                part.copy_(view)
            else:
                view.copy_(part)
            done += len(view)
