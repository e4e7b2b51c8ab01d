"""Fingerprints of operators, by which stored work is matched to them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hesscurv.linalg.random_matrices import make_test_matrix
from hesscurv.objective.tasks import tensors_of
from hesscurv.operators.linear_operator import LinearOperator, OperatorSum
from hesscurv.operators.matrix_operators import DenseOperator, SparseOperator

_SAMPLE_SEED = 0x2C1B3C6D
_CHUNK_NUMEL = 2**22  # entries copied to the host at once


def fingerprint(H: LinearOperator) -> dict[str, Any]:
    """Return plain values that differ between operators: sizes, and hashes of what they hold.

    Curvature operators are told apart by their kind, parameters (names, shapes, values), all other
    parameters and buffers, mode, and batches; dense ones by their entries. The loss function and
    the model's code cannot be seen, except by products (`product_sample`); of another library's
    operator only shape and dtype can. Two operators that compute the same product in different ways
    have the same fingerprint.

    Args:
        H: The operator; one that is spread over ranks on all of them together.

    Returns:
        A dictionary of str, int, float and None, the same in every process: of batches that are
        spread over ranks, each rank's hash, in the ranks' order.

    Cost: one reading of the weights and of the batches.
    """
    if isinstance(H, OperatorSum):
        (first, *others), shift = H.terms, H.shift
        if not others and not shift:  # a factor shows in products, and may be a change of unit
            return fingerprint(first[1])
        parts = [[factor, fingerprint(term)] for factor, term in H.terms]
        return {"operator": "OperatorSum", "terms": parts, "shift": shift}
    out: dict[str, Any] = {
        "operator": type(H).__name__,
        "size": H.shape[0],
        "dtype": str(H.dtype),
    }
    if isinstance(H, DenseOperator):
        out["entries"] = hash_tensors([H.matrix])
        return out
    if isinstance(H, SparseOperator):
        out["entries"] = hash_tensors([H.matrix.indices(), H.matrix.values()])
        return out
    objective = getattr(H, "objective", None)
    if objective is None:
        return out
    refresh = getattr(H, "refresh", objective.refresh)  # an operator forgets what it has kept, too
    refresh()
    layout = H.layout  # type: ignore[attr-defined]
    out["parameters"] = hash_text(repr(layout.to_dict()))
    out["values"] = hash_tensors(objective.parameters())
    constants = objective.constants
    out["constants"] = hash_tensors(constants[name] for name in sorted(constants))
    out["training"] = objective.training
    with H.communicator.together("reading the batches"):
        own = hash_tensors(t for batch in objective.batches for t in tensors_of(batch))
    out["batches"] = ", ".join(H.communicator.gather_texts(own))
    return out


def product_sample(H: LinearOperator) -> list[float]:
    """Return a few random combinations of one product's entries, by which operators are told apart.

    They see the loss function and the model's code, which `fingerprint` does not. The product does
    not count in `num_matvecs`.

    Raises:
        ValueError: If the product has NaN or inf entries.

    Cost: one product, and 9 D random numbers.
    """
    count = H.num_matvecs
    random = make_test_matrix("rademacher", H.shape[0], 9, _SAMPLE_SEED, H.dtype, H.device)
    try:
        product_D1 = H @ (random.columns(8, 9) / math.sqrt(H.shape[0]))
    finally:
        H.num_matvecs = count
    # By the largest entry, whose square may not be in the floating range.
    largest = float(product_D1.abs().max())
    if not math.isfinite(largest):
        raise ValueError(
            "products with the operator have NaN or inf entries; check the model's loss and "
            "parameters, or compute in float64"
        )
    scaled_D1 = product_D1 / largest if largest > 0 else product_D1
    sample = [largest, *random.transpose_matmul(scaled_D1)[:8, 0].tolist()]
    return [float(f"{entry:.12g}") for entry in sample]  # no digit that is lost where it is read


def sample_gap(stored: list[float], present: list[float]) -> float:
    """Return how far two results of `product_sample` are apart, relative to the larger one."""
    a, b = (torch.tensor(s, dtype=torch.float64, device="cpu") for s in (stored, present))
    size = max(float(a[0]), float(b[0]))
    if size == 0:
        return 0.0
    a, b = a[1:] * (a[0] / size), b[1:] * (b[0] / size)
    return float((a - b).norm() / torch.maximum(a.norm(), b.norm()))


def differences(stored: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Return the names of the entries in which two fingerprints differ."""
    return sorted(
        key for key in stored.keys() | present.keys() if stored.get(key) != present.get(key)
    )


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a hash of tensors' shapes, dtypes and bytes, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.numel() == 0:
            continue
        for part in flat.split(_CHUNK_NUMEL):
            digest.update(part.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def hash_text(text: str) -> str:
    """Return a hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
