"""Storage of the growing basis: m vectors of length D, in slabs that are allocated as needed."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hesscurv.linalg.device_memory import chunk_entries
from hesscurv.linalg.precision import full_precision
from hesscurv.linalg.transfers import to_device_of
from hesscurv.storage.placement import Placement

# Entries of the temporaries in `rotate_`: 16 MiB in float32. Where vectors come from a file or over
# a bus, in longer stretches.
_TEMPORARY_NUMEL, _FAR_TEMPORARY_NUMEL = 2**22, 2**25


class Journal(Protocol):
    """What is told every change of a basis, so that the changes can be made again."""

    def append(self, rows: list[Tensor]) -> None:
        """Take note of vectors that were added, as they are stored."""

    def rotate(self, start: int, stop: int, Y_nk: Tensor) -> None:
        """Take note of `Basis.rotate_`."""

    def truncate(self, size: int) -> None:
        """Take note of `Basis.truncate`."""


class Basis:
    """Up to `capacity` vectors of length D, each contiguous, in slabs of shape (m_i, D).

    The first slab has `first` rows and is all that remains after `shrink`; others are added when
    vectors are appended, so that a run that ends early never takes the memory of its cap. All
    sums are in the dtype and on the device of the computation, whatever the storage's own are.

    Args:
        placement: Where the vectors live, their dtype, length and largest number.
        first: Rows of the first slab: the number of vectors that are wanted in the end.
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
        self._slabs = [placement.allocate(min(first, self.capacity))]

    def slabs(self, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Return views of vectors start, ..., stop - 1, slab by slab."""
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
        out_bD = torch.empty(stop - start, self.dim, dtype=self._dtype, device=self._device)
        self._fill(self.slabs(start, stop), out_bD, from_slabs=True)
        return out_bD

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
            self._slabs.append(self.placement.allocate(min(self._grow, left)))
        views = self.slabs(self.size, self.size + len(Q_rD))
        self._fill(views, Q_rD, from_slabs=False)
        self.size += len(Q_rD)
        if self.journal is not None:
            self.journal.append(views)

    def rotate_(self, start: int, stop: int, Y_nk: Tensor) -> None:
        """Replace vectors start, ..., stop - 1 by k <= stop - start combinations of them.

        ``V_Dk = Q_Dn Y_nk``, formed in place by chunks of D. Vectors after `stop` move up, and the
        basis shrinks by what was dropped.
        """
        n, k = Y_nk.shape
        if n != stop - start or k > n:
            raise ValueError(f"expected coefficients ({stop - start}, k), got {(n, k)}")
        views, targets = self.slabs(start, stop), self.slabs(start, start + k)
        like = torch.empty(0, device=self._device, dtype=self._dtype)
        Y_kn = to_device_of(Y_nk.mT, like).contiguous()
        parts = Y_kn.split([len(v) for v in views], dim=1)
        far = self.placement.kind == "disk" or self._slabs[0].device != self._device
        numel = _FAR_TEMPORARY_NUMEL if far else _TEMPORARY_NUMEL
        chunk = max(1024, chunk_entries(self._device, numel) // max(k, 1))
        with full_precision(self._device):
            for low in range(0, self.dim, chunk):
                columns = slice(low, low + chunk)
                new_kC = parts[0] @ views[0][:, columns].to(self._device, self._dtype)
                for part, view in zip(parts[1:], views[1:], strict=True):
                    new_kC.addmm_(part, view[:, columns].to(self._device, self._dtype))
                for target, piece in zip(
                    targets, new_kC.split([len(t) for t in targets]), strict=True
                ):
                    target[:, columns] = piece
        if k < n:
            moved = [row for view in self.slabs(stop) for row in view]
            rows = [row for view in self.slabs(start + k, start + k + len(moved)) for row in view]
            for row, source in zip(rows, moved, strict=True):
                row.copy_(source)
            self.size -= n - k
        if self.journal is not None:
            self.journal.rotate(start, stop, Y_nk)

    def truncate(self, size: int) -> None:
        """Drop the vectors from `size` on; their memory is used again by later ones."""
        if self.journal is not None and size < self.size:
            self.journal.truncate(size)
        self.size = min(self.size, size)

    def shrink(self) -> Tensor:
        """Free all slabs but the first and return its filled rows, (k, D)."""
        del self._slabs[1:]
        self.size = min(self.size, len(self._slabs[0]))
        return self._slabs[0][: self.size]

    def _fill(self, slabs: list[Tensor], block_bD: Tensor, *, from_slabs: bool) -> None:
        done = 0
        for view in slabs:
            part = block_bD[done : done + len(view)]
            if from_slabs:
                part.copy_(view)
            else:
                view.copy_(part)
            done += len(view)
