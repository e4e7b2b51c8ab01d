"""Uniform representation of subspaces: bool masks, bases and eigenpairs.

A mask spans coordinate axes and is kept as indices, never as a D x k matrix of zeros and ones; a
basis is read in blocks of rows, never copied. Products of float32 blocks are float32, and sums over
blocks float64. They ignore autocast and follow `torch.get_float32_matmul_precision`, as all
products in PyTorch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscurv.distributed.sharded import whole
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.interface.descriptions import Described

Subspace = Tensor | Eigenpairs
"""A bool mask (D,), a floating basis (D, k) with orthonormal columns, or `Eigenpairs`."""

# Accepted rms eigenvalue of V^T V - I, a bound on the relative error of an overlap. Wide enough for
# a basis orthonormalised in float32 and cast to float64.
_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
_NUM_PROBES = 4
_BLOCK_ENTRIES = 2**22
# Sums within a block are in its dtype: float32 sums of 1e5 rows lose two digits of seven.
_BLOCK_ROWS = 2**14


@dataclass(frozen=True, eq=False, repr=False)
class CoordinateSpan(Described):
    """The span of k coordinate axes, given by a mask.

    Args:
        mask: Shape (D,), bool.
        indices: Shape (k,), int64, increasing: the True entries.
    """

    mask: Tensor
    indices: Tensor

    @property
    def dim(self) -> int:
        """The dimension D of the ambient space."""
        return self.mask.shape[0]

    @property
    def rank(self) -> int:
        """The dimension k of the subspace."""
        return self.indices.shape[0]

    def rows_times(self, start: int, stop: int, weights: Tensor) -> Tensor:
        """Return rows start:stop of E @ weights, with E (D, k) the axes as columns."""
        bounds = torch.tensor([start, stop], device=self.indices.device)
        low, high = torch.searchsorted(self.indices, bounds).tolist()
        out = weights.new_zeros(stop - start, weights.shape[1])
        out[self.indices[low:high] - start] = weights[low:high]
        return out

    def to(self, device: torch.device) -> CoordinateSpan:
        """Return the same span on another device."""
        return CoordinateSpan(self.mask.to(device), self.indices.to(device))


@dataclass(frozen=True, eq=False, repr=False)
class ColumnSpan(Described):
    """The span of the orthonormal columns of a matrix.

    Args:
        basis: Shape (D, k), floating.
    """

    basis: Tensor

    @property
    def dim(self) -> int:
        """The dimension D of the ambient space."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """The dimension k of the subspace."""
        return self.basis.shape[1]

    def rows_times(self, start: int, stop: int, weights: Tensor) -> Tensor:
        """Return rows start:stop of basis @ weights, in the dtype of `weights`."""
        return self.basis[start:stop].to(weights.dtype) @ weights


Span = CoordinateSpan | ColumnSpan


def as_span(subspace: Subspace, name: str) -> Span:
    """Validate one subspace argument.

    Args:
        subspace: A bool mask (D,), a basis (D, k) or `Eigenpairs`.
        name: The argument's name, for messages.

    Returns:
        The span it stands for.

    Raises:
        TypeError: If it is not a subspace, or a tensor that is neither bool nor floating.
        ValueError: If it is a mask without any True, or a basis that has the wrong shape, is not
            finite, or has columns that are not orthonormal.

    Cost:
        One pass over the basis, O(D k): orthonormality is tested on a few random vectors.
    """
    if isinstance(subspace, Tensor) and subspace.dtype == torch.bool:
        return as_mask_span(subspace, name)
    return as_column_span(subspace, name)


def as_mask_span(mask: Tensor, name: str) -> CoordinateSpan:
    """Validate a mask argument; see `as_span`."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"expected {name} to be a bool mask (D,), got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"expected {name} to be a bool mask (D,), got {mask.dtype}; pass {name}.bool() if "
            "nonzero means kept, or make a mask from scores with top_k_mask"
        )
    if mask.ndim != 1:
        raise ValueError(
            f"expected {name} to be a flat mask of shape (D,), got {tuple(mask.shape)}; use "
            "ParameterLayout.flatten for masks that have their parameters' shapes"
        )
    indices = mask.nonzero().squeeze(1)
    if not len(indices):
        raise ValueError(
            f"expected at least one True in the mask {name} of shape {tuple(mask.shape)}, got "
            "none; an empty mask spans no subspace"
        )
    return CoordinateSpan(mask, indices)


def as_column_span(pairs: Subspace, name: str) -> ColumnSpan:
    """Validate a basis or `Eigenpairs` argument; see `as_span`."""
    basis = whole(pairs.eigenvectors if isinstance(pairs, Eigenpairs) else pairs)
    if not isinstance(basis, Tensor):
        raise TypeError(
            f"expected {name} to be a bool mask (D,), a basis (D, k) or Eigenpairs, got "
            f"{type(basis).__name__}"
        )
    if basis.dtype == torch.bool:
        raise TypeError(
            f"expected {name} to be a basis (D, k) or Eigenpairs, got a bool mask of shape "
            f"{tuple(basis.shape)}"
        )
    if not basis.is_floating_point():
        raise TypeError(
            f"expected {name} to be a bool mask (D,) or a real floating basis (D, k), got "
            f"{basis.dtype} of shape {tuple(basis.shape)}; pass {name}.bool() for a mask"
        )
    if basis.ndim == 1:
        raise ValueError(
            f"expected {name} to be a bool mask (D,) or a basis (D, k), got a floating vector of "
            f"shape {tuple(basis.shape)}; pass {name}.unsqueeze(1) for the line through a unit "
            f"vector, {name}.bool() for a mask"
        )
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ValueError(
            f"expected {name} to be a basis of shape (D, k) with 1 <= k <= D, vectors as columns, "
            f"got {tuple(basis.shape)}"
        )
    basis = basis.detach()
    _check_orthonormal(basis, name)
    return ColumnSpan(basis)


def as_spans(a: Subspace, b: Subspace) -> tuple[Span, Span]:
    """Validate two subspaces of one space; a mask follows the other argument's device.

    Args:
        a: The first subspace.
        b: The second subspace.

    Returns:
        Both spans, on one device.

    Raises:
        TypeError: As `as_span`.
        ValueError: As `as_span`; if the two differ in D or in their parameters' shapes, or are
            bases on different devices.
    """
    if isinstance(a, Eigenpairs) and isinstance(b, Eigenpairs):
        _check_same_parameters(a, b)
    span_a, span_b = as_span(a, "a"), as_span(b, "b")
    if span_a.dim != span_b.dim:
        raise ValueError(
            f"expected two subspaces of one space, got D={span_a.dim} and D={span_b.dim}; select "
            "the same parameters for both"
        )
    if isinstance(span_b, CoordinateSpan):
        return span_a, span_b.to(device_of(span_a))
    if isinstance(span_a, CoordinateSpan):
        return span_a.to(device_of(span_b)), span_b
    if span_a.basis.device != span_b.basis.device:
        raise ValueError(
            f"expected two bases on one device, got {span_a.basis.device} and "
            f"{span_b.basis.device}; move one with .to(device)"
        )
    return span_a, span_b


def check_count(count: int, limit: int, name: str, what: str) -> int:
    """Return `count` as an int after checking 1 <= count <= limit.

    Args:
        count: The value.
        limit: The largest value allowed.
        name: The argument's name, for messages.
        what: What the limit is, for messages.

    Returns:
        The count.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is out of range.
    """
    try:
        if isinstance(count, bool):
            raise TypeError
        value = operator.index(count)
    except TypeError:
        raise TypeError(
            f"expected {name} to be an integer, got {count!r}; a fraction f of D entries is "
            "round(f * D)"
        ) from None
    if not 1 <= value <= limit:
        raise ValueError(f"expected 1 <= {name} <= {limit} ({what}), got {name}={value}")
    return value


def device_of(span: Span) -> torch.device:
    """Return the device a span is on."""
    return span.basis.device if isinstance(span, ColumnSpan) else span.mask.device


def compute_dtype(*spans: Span) -> torch.dtype:
    """Return the dtype of block products: that of the bases, promoted, and at least float32."""
    dtype = torch.float32
    for span in spans:
        if isinstance(span, ColumnSpan):
            dtype = torch.promote_types(dtype, span.basis.dtype)
    return dtype


def row_blocks(num_rows: int, num_columns: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) over the rows of a tall matrix, in blocks of tens of MB."""
    # At least twice as many rows as columns: below that, work on the k x k sums dominates.
    step = max(2 * num_columns, min(_BLOCK_ROWS, _BLOCK_ENTRIES // num_columns))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context without autocast: bfloat16 products are useless for angles."""
    return torch.autocast(device.type, enabled=False)


def _check_same_parameters(a: Eigenpairs, b: Eigenpairs) -> None:
    if a.layout is None or b.layout is None or a.layout.numel != b.layout.numel:
        return
    # Names may differ by a wrapper's prefix; differing shapes misalign the rows.
    for i, (shape_a, shape_b) in enumerate(zip(a.layout.shapes, b.layout.shapes, strict=False)):
        if shape_a != shape_b:
            raise ValueError(
                "expected eigenpairs over the same parameters, got layouts that differ in shape: "
                f"{a.layout.names[i]!r} {shape_a} against {b.layout.names[i]!r} {shape_b}; build "
                "both operators with the same `params`"
            )


def _check_orthonormal(basis: Tensor, name: str) -> None:
    dim, rank = basis.shape
    # The full Gram matrix V^T V would cost D k^2, more than most metrics. For random signs w,
    # E ||(V^T V - I) w||^2 = ||V^T V - I||_F^2, at D k per vector (the Girard-Hutchinson
    # estimate). A few vectors give the norm to well within the tolerance's meaning.
    if rank <= _NUM_PROBES:
        probes = torch.eye(rank, dtype=torch.float32, device="cpu")
    else:
        seeded = torch.Generator().manual_seed(0)
        probes = (
            torch.randint(2, (rank, _NUM_PROBES), generator=seeded, device="cpu").float() * 2 - 1
        )
    dtype = torch.promote_types(basis.dtype, torch.float32)
    probes = probes.to(basis.device, dtype)
    product = torch.zeros_like(probes, dtype=torch.float64)
    with without_autocast(basis.device):
        for start, stop in row_blocks(dim, rank):
            block = basis[start:stop].to(dtype)
            product += block.mT @ (block @ probes)
    deviation = float((product - probes).norm() / probes.norm())
    if not deviation < float("inf"):
        raise ValueError(
            f"expected a finite basis {name}, got NaN or infinite entries; find where they come "
            "from, a diverged model for instance"
        )
    tolerance = _TOLERANCE.get(basis.dtype, 1e-1)
    if deviation > tolerance:
        raise ValueError(
            f"expected orthonormal columns in {name} of shape {tuple(basis.shape)}: "
            f"||V^T V - I||_F / sqrt(k) <= {tolerance:g} for {basis.dtype}, got about "
            f"{deviation:.2g}; pass torch.linalg.qr({name}).Q, which spans the same subspace"
        )
