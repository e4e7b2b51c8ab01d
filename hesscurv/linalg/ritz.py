"""Rayleigh-Ritz: the projected eigenproblem and the rotation of a basis to Ritz vectors.

Small matrices live in float64 on the CPU; bases are stored row-contiguous, (m, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscurv.linalg.device_memory import chunk_entries
from hesscurv.linalg.precision import full_precision
from hesscurv.linalg.transfers import to_device_of

_TEMPORARY_NUMEL = 2**22  # entries per chunk in `rotate_`: 16 MiB in float32


def ritz_pairs(T: Tensor, which: str = "LM") -> tuple[Tensor, Tensor]:
    """Solve the small symmetric eigenproblem, by default largest magnitude first.

    ``(T + T^T)/2 = Y diag(theta) Y^T`` with ``|theta_1| >= |theta_2| >= ...``; equal magnitudes
    keep the ascending order of their values, so that the result is reproducible.

    Args:
        T: Shape (m, m), the operator in an orthonormal basis, ``Q^T H Q``; any real floating dtype,
            any device. Only its symmetric part is used.
        which: The order, see `wanted_first`.

    Returns:
        The Ritz values theta (m,) and the coefficients Y (m, m) of the Ritz vectors ``Q Y``, one
        in each column; float64, on the CPU.

    Raises:
        ValueError: If T is not square or has NaN or inf entries.
    """
    if T.ndim != 2 or T.shape[0] != T.shape[1]:
        raise ValueError(f"expected a square matrix, got shape {tuple(T.shape)}")
    T = T.detach().to("cpu", torch.float64)
    if not T.isfinite().all():
        raise ValueError(
            "expected a finite projected matrix, got NaN or inf entries; check the operator's "
            "products"
        )
    values, vectors = torch.linalg.eigh((T + T.mT) / 2)
    order = wanted_first(values, which)
    return values[order], vectors[:, order]


def wanted_first(values: Tensor, which: str) -> Tensor:
    """Return the order in which eigenvalues are wanted; stable, hence reproducible, for ties.

    Args:
        values: Shape (m,).
        which: "LM", the largest magnitude first; "LA", the largest value; "SA", the smallest.
    """
    if which == "LM":
        return by_magnitude(values)
    return values.argsort(descending=which == "LA", stable=True)


def sides_of(which: str) -> tuple[int, ...]:
    """Return the wanted ends of the spectrum: +1 and -1 for "LM", +1 for "LA", -1 for "SA".

    Raises:
        ValueError: If `which` is anything else.
    """
    sides = {"LM": (1, -1), "LA": (1,), "SA": (-1,)}
    if which not in sides:
        raise ValueError(
            'expected which to be "LM" (largest magnitude), "LA" (largest algebraic) or "SA" '
            f"(smallest algebraic), got {which!r}"
        )
    return sides[which]


def by_magnitude(values: Tensor) -> Tensor:
    """Return the order of decreasing magnitude; stable, hence reproducible, for ties."""
    return values.abs().argsort(descending=True, stable=True)


def rotate_(basis_mD: Tensor, Y_mk: Tensor) -> Tensor:
    """Replace the first k vectors of a stored basis by combinations of all m, in place.

    ``V_Dk = Q_Dm Y_mk``, formed in the storage of Q by chunks of its rows (columns of the (m, D)
    storage), without a second basis.

    Args:
        basis_mD: Shape (m, D), row-contiguous: one vector per row. Overwritten: the first k rows
            hold the result, the others are undefined.
        Y_mk: Shape (m, k) with k <= m; cast to the basis' dtype and device.

    Returns:
        The view ``basis_mD[:k]``, shape (k, D).

    Raises:
        ValueError: If the shapes do not fit, or k > m.
    """
    m, dim = basis_mD.shape
    if Y_mk.ndim != 2 or Y_mk.shape[0] != m or Y_mk.shape[1] > m:
        raise ValueError(
            f"expected coefficients of shape ({m}, k), k <= {m}, got {tuple(Y_mk.shape)}"
        )
    k = Y_mk.shape[1]
    Y_km = to_device_of(Y_mk.mT, basis_mD).contiguous()
    chunk = max(1024, chunk_entries(basis_mD.device, _TEMPORARY_NUMEL) // max(k, 1))
    with full_precision(basis_mD.device):
        for start in range(0, dim, chunk):
            part_mC = basis_mD[:, start : start + chunk]
            part_mC[:k] = Y_km @ part_mC  # the product is a temporary, so the input may be written
    return basis_mD[:k]
