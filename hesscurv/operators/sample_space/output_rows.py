"""Square roots of the curvature in the outputs: what each row of R weights the outputs by.

A matrix J^T C J is R^T R with rows R = L^T J for any root C = L L^T. Where C is block-diagonal,
with a block for each sample or token, one vector of the outputs' shape holds a column of every
sample's root, and one backward pass yields a row of every sample.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from hesscurv.operators.ways.linearization import LinearMap


class NoRowsError(ValueError):
    """The matrix has no rows by sample; its products can be computed all the same."""


def root_columns(curvature: LinearMap, outputs: Tensor) -> Tensor:
    """Return columns of the root of a block-diagonal curvature in the outputs.

    Args:
        curvature: u -> C u, for blocks (B, *outputs.shape).
        outputs: z, shape (n, ...).

    Returns:
        Shape (c, *outputs.shape): C is the sum over samples n and columns j of the outer products
        of ``result[j, n]``, taken as vectors that are zero at all other samples.

    Raises:
        NoRowsError: If C is not block-diagonal, or has negative eigenvalues.
    """
    z = outputs.detach()
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(z.shape, generator=generator, dtype=torch.float64, device="cpu").to(z)
    expected = curvature(probe.unsqueeze(0))[0]
    size = float(expected.norm())
    for block in _layouts(z):
        blocks_nqq, to_cells, from_cells = _blocks(curvature, z, block)
        cells = to_cells(probe)
        got = from_cells((blocks_nqq @ cells.unsqueeze(-1)).squeeze(-1))
        if float((got - expected).norm()) <= 1e3 * torch.finfo(z.dtype).eps * max(size, 1e-30):
            break
    else:
        raise NoRowsError(
            "expected a loss whose Hessian in the outputs is block-diagonal, a block for each "
            "sample, got one that couples samples"
        )
    values, vectors = torch.linalg.eigh((blocks_nqq + blocks_nqq.mT) / 2)
    # Rounding is that of numbers of order one, also where a sample's curvature is tiny: a confident
    # classifier's is.
    eps, largest = torch.finfo(z.dtype).eps, values.abs().amax()
    rounding = 10 * values.shape[-1] * eps
    floor = (rounding * values.abs().amax(-1, keepdim=True)).clamp(min=float(eps * largest))
    if bool((values < -rounding * largest).any()):
        raise NoRowsError(
            "expected a loss that is convex in the outputs, got a Hessian in these with negative "
            "eigenvalues: J^T C J has no real rows"
        )
    root_nqc = vectors * torch.where(values > floor, values, 0.0).sqrt().unsqueeze(-2)
    root_nqc = root_nqc[..., root_nqc.flatten(0, -2).any(0)]  # of softmax, one column is zero
    n = len(z)
    cells_per_sample = len(blocks_nqq) // n
    columns = []
    for cell in range(cells_per_sample):
        for j in range(root_nqc.shape[-1]):
            column = root_nqc.new_zeros(n, cells_per_sample, root_nqc.shape[-2])
            column[:, cell] = root_nqc.view(n, cells_per_sample, *root_nqc.shape[1:])[:, cell, :, j]
            columns.append(from_cells(column.flatten(0, 1)))
    return torch.stack(columns) if columns else z.new_zeros(0, *z.shape)


def _layouts(z: Tensor) -> list[int | None]:
    """Return the dimensions that may be a block on their own, the cheapest first; None is all."""
    if z.ndim <= 2:
        return [None]
    return [z.ndim - 1, 1, None]


def _blocks(
    curvature: LinearMap, z: Tensor, dim: int | None
) -> tuple[Tensor, LinearMap, LinearMap]:
    """Return C's blocks (cells, q, q) along a dimension, and the maps to and from cells (cells, q).

    Column j of all blocks is one product, with a vector that is 1 at j in every cell.
    """
    if dim is None:
        q = prod(z.shape[1:])

        def to_cells(t: Tensor) -> Tensor:
            return t.reshape(len(z), q)

        def from_cells(t: Tensor) -> Tensor:
            return t.reshape(z.shape)

    else:
        q, moved = z.shape[dim], z.movedim(dim, -1).shape

        def to_cells(t: Tensor) -> Tensor:
            return t.movedim(dim, -1).reshape(-1, q)

        def from_cells(t: Tensor) -> Tensor:
            return t.reshape(moved).movedim(-1, dim).contiguous()

    columns = []
    for j in range(q):
        unit = z.new_zeros(z.numel() // q, q)
        unit[:, j] = 1
        columns.append(to_cells(curvature(from_cells(unit).unsqueeze(0))[0]))
    return torch.stack(columns, -1), to_cells, from_cells
