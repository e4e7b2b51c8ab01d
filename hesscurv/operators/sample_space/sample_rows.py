"""Rows R of a Gauss-Newton or Fisher matrix H = R^T R, parameter by parameter, within memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.sample_space.captured_rows import capture_rows
from hesscurv.operators.sample_space.layer_rules import Factors
from hesscurv.operators.sample_space.output_rows import NoRowsError
from hesscurv.operators.sample_space.parameter_rows import DenseRows, OuterRows, ParameterRows

MOST_ROWS = 20_000  # of a Gram matrix: 3.2 GB, and its eigendecomposition minutes


def require_rows(H: LinearOperator) -> CurvatureOperator:
    """Return an operator that is a sum over samples, in this process alone.

    Raises:
        NoRowsError: If it is not.
    """
    if not isinstance(H, CurvatureOperator) or not H.curvature.needs_parts:
        raise NoRowsError(
            f"expected a GGNOperator or an EmpiricalFisherOperator, got {type(H).__name__}: "
            "other matrices are no sums over samples; use method='block_krylov'"
        )
    if H.communicator.size > 1:
        raise NoRowsError(
            "expected a single process, got batches spread over several; use method='block_krylov'"
        )
    return H


class SampleRows:
    """Rows of an operator at the present weights, as factors of each layer.

    Args:
        H: A `GGNOperator` or an `EmpiricalFisherOperator`, in a single process.

    Attributes:
        num_rows: n, samples times the rank of the curvature in a sample's outputs.

    Raises:
        NoRowsError: If the matrix has no rows by sample, or batches are spread over processes.

    Memory: of a layer inputs and slopes at all places, n T (i + c o) numbers; as many layers at
    once as fit the operator's budget. Of what has no rule, the rows themselves.
    """

    def __init__(self, H: LinearOperator) -> None:
        self._H = H = require_rows(H)
        H.refresh()
        self.layout, self.dtype, self.device = H.layout, H.dtype, H.device
        self._kept: dict[str, ParameterRows] = {}
        self._bytes: dict[str, float] = {}
        self._sizes: list[int] = []
        self._look()

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return sum(self._sizes)

    def _shares(self) -> Iterator[tuple[Any, float]]:
        for _, batch, share in self._H.products.local.shares():
            yield batch, share

    def _look(self) -> None:
        """Capture everything, unless the first batch shows that it would not fit."""
        curvature, budget = self._H.products.local.curvature, self._H.memory_plan.budget
        names, pieces = list(self.layout.names), dict[str, list[Factors]]()
        total = 0
        for batch, share in self._shares():
            found = capture_rows(curvature, batch, share, names)
            first = next(iter(found.values())).slopes
            self._sizes.append(first.shape[0] * first.shape[1])
            if self.num_rows > MOST_ROWS:
                raise NoRowsError(
                    f"expected at most {MOST_ROWS:,} rows, samples times their outputs, got more; "
                    "take fewer samples, or method='block_krylov'"
                )
            for name, factors in found.items():
                size = _bytes(factors)
                self._bytes[name] = self._bytes.get(name, 0) + size
                total += size
                if total <= budget:
                    pieces.setdefault(name, []).append(factors)
            if not total <= budget:
                pieces.clear()
        if pieces and total <= budget:
            left = budget - total
            for name in names:
                rows = _as_rows(pieces.pop(name))
                if isinstance(rows, OuterRows):
                    rows = rows.multiplied_out(left)
                    if isinstance(rows, DenseRows):
                        left -= rows.num_rows * rows.numel * self.dtype.itemsize
                self._kept[name] = rows
        elif max(self._bytes.values()) > budget:
            worst = max(self._bytes, key=lambda n: self._bytes[n])
            raise NoRowsError(
                f"expected rows of each parameter within {budget:,} bytes, got "
                f"{int(self._bytes[worst]):,} for {worst!r}; take fewer samples, a larger "
                "memory_budget, or method='block_krylov'"
            )

    def parameters(self) -> Iterator[tuple[slice, ParameterRows]]:
        """Yield each parameter's place in the flat vector, and its rows."""
        places = self.layout.slices()
        if self._kept:
            for name, rows in self._kept.items():
                yield places[name], rows
            return
        curvature = self._H.products.local.curvature
        for group in self._groups():
            pieces: dict[str, list[Factors]] = {name: [] for name in group}
            for batch, share in self._shares():
                for name, factors in capture_rows(curvature, batch, share, group).items():
                    pieces[name].append(factors)
            for name in group:
                yield places[name], _as_rows(pieces.pop(name))

    def _groups(self) -> Iterator[list[str]]:
        group: list[str] = []
        size = 0.0
        for name in self.layout.names:
            if group and size + self._bytes[name] > self._H.memory_plan.budget:
                yield group
                group, size = [], 0.0
            group.append(name)
            size += self._bytes[name]
        if group:
            yield group

    # -- what is made of the rows -----------------------------------------------------------------

    def gram(self, mask_D: Tensor | None = None) -> Tensor:
        """Return R R^T, or that of the columns that a mask picks; (n, n), float64."""
        gram_nn = torch.zeros(self.num_rows, self.num_rows, dtype=torch.float64, device=self.device)
        for place, rows in self.parameters():
            rows.add_gram(gram_nn, None if mask_D is None else mask_D[place])
        return gram_nn

    def combine(self, weights_nk: Tensor) -> Tensor:
        """Return R^T W as rows, shape (k, D), in the operator's dtype."""
        weights_nk = weights_nk.to(self.dtype)
        out_kD = torch.empty(
            weights_nk.shape[1], self.layout.numel, dtype=self.dtype, device=self.device
        )
        for place, rows in self.parameters():
            rows.combine_into(out_kD[:, place], weights_nk)
        return out_kD

    def apply(self, vectors_kD: Tensor) -> Tensor:
        """Return R V of vectors that are rows (k, D); shape (n, k), float64."""
        out_nk = torch.zeros(
            self.num_rows, len(vectors_kD), dtype=torch.float64, device=self.device
        )
        for place, rows in self.parameters():
            rows.add_products(out_nk, vectors_kD[:, place])
        return out_nk

    def at(self, index_m: Tensor) -> Tensor:
        """Return the columns of R at some coordinates, in their order; shape (n, m)."""
        out_nm = torch.empty(self.num_rows, len(index_m), dtype=self.dtype, device=self.device)
        for here, rows in self.columns_at(index_m):
            out_nm[:, here] = rows
        return out_nm

    def columns_at(self, index_m: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some places in an index of coordinates, and the columns of R there, few at once."""
        for place, parameter in self.parameters():
            for columns, rows in parameter.chunks():
                start, stop = place.start + columns.start, place.start + columns.stop
                here = ((index_m >= start) & (index_m < stop)).nonzero()[:, 0]
                yield here, rows[:, index_m[here] - start]


def _bytes(factors: Factors) -> int:
    tensors = [t for t in (factors.inputs, factors.slopes) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def _as_rows(pieces: list[Factors]) -> ParameterRows:
    if any(p.inputs is None for p in pieces):
        return DenseRows([_dense(p).transpose(0, 1) for p in pieces])
    inputs = [p.inputs for p in pieces if p.inputs is not None]
    slopes = [p.slopes.transpose(0, 1) for p in pieces]
    return OuterRows(inputs, slopes, is_transposed=pieces[0].is_transposed)


def _dense(factors: Factors) -> Tensor:
    """Return rows (c, n, numel) multiplied out: a batch's, where another one's have no factors."""
    if factors.inputs is None:
        return factors.slopes
    equation = "nti,cnto->cnio" if factors.is_transposed else "nti,cnto->cnoi"
    return torch.einsum(equation, factors.inputs, factors.slopes).flatten(2)
