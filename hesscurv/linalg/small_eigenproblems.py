"""Eigenproblems of projected matrices, on the host or on a GPU, whichever is faster."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

# Below this a transfer does not pay: a host takes about 20 ms for 500 rows.
_LEAST_ROWS = 512
# Seconds on host and device, by device and size in powers of sqrt(2). Measured, since drivers
# differ by factors of ten either way.
_measured: dict[tuple[torch.device, torch.dtype, int], tuple[float, float]] = {}


def eigh(matrix: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    Solved on the GPU if that is faster: the first matrix of each size is solved on both, once per
    process.

    Args:
        matrix: Shape (m, m), on the CPU; its upper triangle is read.
        device: The operator's device.

    Returns:
        Eigenvalues (m,) and eigenvectors (m, m), on the CPU.

    Cost: O(m^3), and two transfers of m^2 numbers for a GPU.
    """
    rows = len(matrix)
    if device.type != "cuda" or rows < _LEAST_ROWS:
        return _solve(matrix)
    key = device, matrix.dtype, round(2 * math.log2(rows))
    if key not in _measured:
        start = time.perf_counter()
        values, vectors = _solve(matrix)
        middle = time.perf_counter()
        try:
            _solve_on(matrix, device)  # warm-up: the first call initialises the library
            warm = time.perf_counter()
            _solve_on(matrix, device)
            on_device = time.perf_counter() - warm
        except RuntimeError:  # out of memory, or no convergence on the device
            on_device = float("inf")
        _measured[key] = middle - start, on_device
        return values, vectors
    on_host, on_device = _measured[key]
    if on_device >= on_host:
        return _solve(matrix)
    try:
        return _solve_on(matrix, device)
    except RuntimeError:
        return _solve(matrix)


def _solve(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix, UPLO="U")
    return values, vectors


def _solve_on(matrix: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    values, vectors = _solve(matrix.to(device))
    return values.cpu(), vectors.cpu()
