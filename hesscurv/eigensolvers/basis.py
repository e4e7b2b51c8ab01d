"""Storage of the growing basis: m vectors of length D, in slabs that are allocated as needed."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscurv.linalg.precision import full_precision

_TEMPORARY_NUMEL = 2**22  # entries of the temporaries in `rotate_`: 16 MiB in float32


class Basis:
    """Up to `capacity` vectors of length D, each contiguous, in slabs of shape (m_i, D).

    The first slab has `first` rows and is all that remains after `shrink`; others are added when
    vectors are appended, so that a run that ends early never takes the memory of its cap.

    Args:
        dim: The length D of a vector.
        capacity: The most vectors.
        first: Rows of the first slab: the number of vectors that are wanted in the end.
        grow: Rows of every other slab.
        dtype: Dtype of the entries.
        device: Device of the entries.
    """

    def __init__(
        self,
        dim: int,
        capacity: int,
        first: int,
        grow: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dim, self.capacity = dim, capacity
        self.size = 0
        self._grow = max(1, grow)
        self._slabs = [torch.empty(min(first, capacity), dim, dtype=dtype, device=device)]

    def slabs(self, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Return views of vectors start, ..., stop - 1, slab by slab."""
        stop = self.size if stop is None else stop
        out, offset = [], 0
        for slab in self._slabs:
            low, high = max(start - offset, 0), min(stop - offset, len(slab))
            if low < high:
                out.append(slab[low:high])
            offset += len(slab)
        return out

    def append(self, Q_rD: Tensor) -> None:
        """Add vectors at the end.

        Raises:
            ValueError: If they exceed the capacity.
        """
        if self.size + len(Q_rD) > self.capacity:
            raise ValueError(
                f"expected at most {self.capacity} vectors, got {self.size} + {len(Q_rD)}"
            )
        while self.size + len(Q_rD) > sum(map(len, self._slabs)):
            left = self.capacity - sum(map(len, self._slabs))
            self._slabs.append(self._slabs[0].new_empty(min(self._grow, left), self.dim))
        self.size += len(Q_rD)
        done = 0
        for view in self.slabs(self.size - len(Q_rD)):
            view.copy_(Q_rD[done : done + len(view)])
            done += len(view)

    def rotate_(self, start: int, stop: int, Y_nk: Tensor) -> None:
        """Replace vectors start, ..., stop - 1 by k <= stop - start combinations of them.

        ``V_Dk = Q_Dn Y_nk``, formed in place by chunks of D. Vectors after `stop` move up, and the
        basis shrinks by what was dropped.
        """
        n, k = Y_nk.shape
        if n != stop - start or k > n:
            raise ValueError(f"expected coefficients ({stop - start}, k), got {(n, k)}")
        views, targets = self.slabs(start, stop), self.slabs(start, start + k)
        Y_kn = Y_nk.mT.to(self._slabs[0]).contiguous()
        parts = Y_kn.split([len(v) for v in views], dim=1)
        chunk = max(1024, _TEMPORARY_NUMEL // max(k, 1))
        with full_precision(self._slabs[0].device):
            for low in range(0, self.dim, chunk):
                columns = slice(low, low + chunk)
                new_kC = parts[0] @ views[0][:, columns]
                for part, view in zip(parts[1:], views[1:], strict=True):
                    new_kC.addmm_(part, view[:, columns])
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

    def truncate(self, size: int) -> None:
        """Drop the vectors from `size` on; their memory is used again by later ones."""
        self.size = min(self.size, size)

    def shrink(self) -> Tensor:
        """Free all slabs but the first and return its filled rows, (k, D)."""
        del self._slabs[1:]
        self.size = min(self.size, len(self._slabs[0]))
        return self._slabs[0][: self.size]
