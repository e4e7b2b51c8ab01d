"""Rows of one parameter, by sample: as they are, or as factors that are multiplied out in parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 2**25  # entries of rows that are multiplied out at once
_PAIRS = 2**25  # entries of a table of pairs of positions


class ParameterRows(ABC):
    """The columns of R that belong to one parameter.

    Rows are ordered by batch, sample and column of the root.

    Args:
        numel: Entries of the parameter.
        num_rows: Rows.
    """

    def __init__(self, numel: int, num_rows: int) -> None:
        self.numel, self.num_rows = numel, num_rows

    @abstractmethod
    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield consecutive columns, and the rows there, shape (num_rows, columns)."""

    def add_gram(self, gram_nn: Tensor, mask: Tensor | None = None) -> None:
        """Add the Gram matrix of these columns, or of those that a mask picks, to a matrix."""
        for columns, rows in self.chunks():
            if mask is not None:
                rows = rows[:, mask[columns]]
            _add_square(gram_nn, rows)

    def combine_into(self, out_kP: Tensor, weights_nk: Tensor) -> None:
        """Write R^T W of these columns, as rows (k, numel)."""
        for columns, rows in self.chunks():
            out_kP[:, columns] = weights_nk.mT @ rows

    def add_products(self, out_nk: Tensor, vectors_kP: Tensor) -> None:
        """Add R V of these columns to (n, k), for vectors that are rows (k, numel)."""
        for columns, rows in self.chunks():
            out_nk.add_(rows @ vectors_kP[:, columns].mT)


class DenseRows(ParameterRows):
    """Rows that are held.

    Args:
        pieces: For each batch, shape (n, c, numel).
    """

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        super().__init__(pieces[0].shape[-1], sum(p.shape[0] * p.shape[1] for p in pieces))
        rows = [p.flatten(0, 1) for p in pieces]
        self._rows = rows[0] if len(rows) == 1 else torch.cat(rows)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield all columns at once."""
        yield slice(0, self.numel), self._rows


class OuterRows(ParameterRows):
    r"""Rows that are sums of outer products, :math:`\sum_t g_t a_t^T`, over places t.

    A linear layer's gradient is one for each token, a convolution's for each position, an
    embedding's for each word.

    Args:
        inputs: For each batch the layer's inputs a, shape (n, T, i).
        slopes: For each batch the derivatives g in the layer's outputs, shape (n, c, T, o).
        is_transposed: Whether the parameter is stored (i, o), else (o, i).
    """

    def __init__(
        self, inputs: Sequence[Tensor], slopes: Sequence[Tensor], *, is_transposed: bool = False
    ) -> None:
        i, o = inputs[0].shape[-1], slopes[0].shape[-1]
        super().__init__(i * o, sum(g.shape[0] * g.shape[1] for g in slopes))
        self._inputs, self._slopes, self._is_transposed = inputs, slopes, is_transposed

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some outputs' columns after others, or inputs' where these come first."""
        first = self._inputs if self._is_transposed else self._slopes
        lead = first[0].shape[-1]
        other = self.numel // lead
        width = max(1, _CHUNK // max(1, self.num_rows * other))
        for start in range(0, lead, width):
            stop = min(lead, start + width)
            parts = []
            for a, g in zip(self._inputs, self._slopes, strict=True):
                if self._is_transposed:
                    part = a[:, None, :, start:stop].mT @ g  # (n, c, i, o)
                else:
                    part = g[..., start:stop].mT @ a[:, None]  # (n, c, o, i)
                parts.append(part.flatten(2).flatten(0, 1))
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)  # a copy of all
            yield slice(start * other, stop * other), rows

    def multiplied_out(self, most_bytes: float) -> ParameterRows:
        """Return the rows as they are, where that saves work in each pass and they are not large.

        Args:
            most_bytes: What they may take.
        """
        size = self.num_rows * self.numel * self._slopes[0].element_size()
        if size > most_bytes or not self._multiplying_out_is_cheaper():
            return self
        rows = torch.cat([rows for _, rows in self.chunks()], 1)
        return DenseRows([rows.unsqueeze(1)])

    def add_gram(self, gram_nn: Tensor, mask: Tensor | None = None) -> None:
        """Add the Gram matrix; of all columns from those of the factors where that is cheaper."""
        if mask is not None or not self._pairs_are_cheaper():
            super().add_gram(gram_nn, mask)
            return
        start = 0
        for a, g in zip(self._inputs, self._slopes, strict=True):
            other = 0
            for a2, g2 in zip(self._inputs, self._slopes, strict=True):
                block = _pair_gram(a, g, a2, g2)
                gram_nn[start : start + len(block), other : other + block.shape[1]] += block
                other += block.shape[1]
            start += g.shape[0] * g.shape[1]

    def combine_into(self, out_kP: Tensor, weights_nk: Tensor) -> None:
        """Write R^T W: the slopes are mixed first where there are fewer places than columns."""
        if self._multiplying_out_is_cheaper():
            super().combine_into(out_kP, weights_nk)
            return
        o, i = self._slopes[0].shape[-1], self._inputs[0].shape[-1]
        for part in self._vectors(weights_nk.shape[1]):
            start, total = 0, None
            for a, g in zip(self._inputs, self._slopes, strict=True):
                n, c = g.shape[:2]
                weights = weights_nk[start : start + n * c, part].view(n, c, -1)
                mixed = torch.einsum("ncto,nck->knto", g, weights).reshape(-1, n * a.shape[1], o)
                product = mixed.mT @ a.reshape(-1, i)  # (k, o, i)
                total = product if total is None else total.add_(product)
                start += n * c
            if total is not None:
                total = total.mT if self._is_transposed else total
                out_kP[part] = total.reshape(len(total), -1)

    def add_products(self, out_nk: Tensor, vectors_kP: Tensor) -> None:
        """Add R V, without multiplying out where there are fewer places than columns."""
        if self._multiplying_out_is_cheaper():
            super().add_products(out_nk, vectors_kP)
            return
        o, i = self._slopes[0].shape[-1], self._inputs[0].shape[-1]
        for part in self._vectors(len(vectors_kP)):
            vectors = vectors_kP[part]
            matrices = (
                vectors.view(-1, i, o) if self._is_transposed else vectors.view(-1, o, i).mT
            )  # (k, i, o)
            start = 0
            for a, g in zip(self._inputs, self._slopes, strict=True):
                n, c = g.shape[:2]
                seen = (a.reshape(-1, i) @ matrices).view(len(vectors), n, -1, o)
                product = torch.einsum("ncto,knto->nck", g, seen)
                out_nk[start : start + n * c, part] += product.reshape(n * c, -1)
                start += n * c

    def _vectors(self, count: int) -> Iterator[slice]:
        """Yield some vectors after others, such that what is made of them stays small."""
        places = max(a.shape[0] * a.shape[1] for a in self._inputs)
        size = places * self._slopes[0].shape[-1] + self.numel
        step = max(1, _CHUNK // size)
        for start in range(0, count, step):
            yield slice(start, min(count, start + step))

    def _multiplying_out_is_cheaper(self) -> bool:
        """Whether rows have fewer entries, for all samples, than what sums over columns first."""
        return self._inputs[0].shape[1] >= self._slopes[0].shape[1]

    def _pairs_are_cheaper(self) -> bool:
        T, i = self._inputs[0].shape[1:]
        o = self._slopes[0].shape[-1]
        n, rows = sum(map(len, self._inputs)), self.num_rows
        pairs = (n * T) ** 2 * i + (rows * T) ** 2 * (o + 1)
        return pairs < rows * T * i * o + rows**2 * i * o


def _add_square(gram_nn: Tensor, rows: Tensor) -> None:
    """Add rows @ rows^T, of which only blocks on and above the diagonal are computed."""
    width = max(256, -(-len(rows) // 6))
    for start in range(0, len(rows), width):
        block = slice(start, start + width)
        product = rows[block] @ rows[start:].mT
        gram_nn[block, start:] += product
        below = product[:, width:]
        if below.shape[1]:
            gram_nn[start + width :, block] += below.mT


def _pair_gram(a: Tensor, g: Tensor, a2: Tensor, g2: Tensor) -> Tensor:
    """Return inner products of rows of two batches, by pairs of places: (a.a') (g.g'), summed."""
    (n, c, T, o), (m, d, S, _) = g.shape, g2.shape
    flat2, slopes2 = a2.reshape(m * S, -1), g2.reshape(m * d * S, o)
    step = max(1, _PAIRS // max(1, c * T * m * d * S))
    parts = []
    for start in range(0, n, step):
        x, y = a[start : start + step], g[start : start + step]
        rows = len(x)
        slopes = (y.reshape(-1, o) @ slopes2.mT).view(rows, c, T, m, d, S)
        inputs = (x.reshape(-1, x.shape[-1]) @ flat2.mT).view(rows, 1, T, m, 1, S)
        parts.append((slopes * inputs).sum((2, 5)).view(rows * c, m * d))
    return torch.cat(parts)
