"""How much of the data and how many vectors go through a product at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscurv.linalg.device_memory import device_memory
from hesscurv.operators.batches import split
from hesscurv.operators.tasks import num_samples

if TYPE_CHECKING:
    from hesscurv.operators.objective import Objective

_UNLIMITED = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """The sizes that keep a product within its budget.

    Args:
        budget: Bytes for graphs and blocks of vectors together.
        max_samples: Samples in a micro-batch.
        max_vectors: Vectors at once on one micro-batch.
        keep_graphs: Whether the graphs of all micro-batches are kept between products.
    """

    budget: int
    max_samples: int = _UNLIMITED
    max_vectors: int = _UNLIMITED
    keep_graphs: bool = True

    def with_fewer_vectors(self, vectors: int) -> MemoryPlan:
        """Return the plan with at most this many vectors at once."""
        return replace(self, max_vectors=max(1, vectors))

    def with_fewer_samples(self, samples: int) -> MemoryPlan:
        """Return the plan with at most this many samples at once."""
        return replace(self, max_samples=max(1, samples))

    def without_kept_graphs(self) -> MemoryPlan:
        """Return the plan without graphs kept between products."""
        return replace(self, keep_graphs=False)


def plan_memory(
    objective: Objective, budget: int, batch: Any, largest: int
) -> tuple[MemoryPlan, bool]:
    """Fit micro-batches and blocks of vectors into a budget, by measuring on a few samples.

    The bytes that a gradient's graph retains are linear in the samples; they are counted on four
    and on eight samples. Half of the budget holds graphs, half what the vectors passing through
    need, about one graph's bytes each.

    Args:
        objective: What is measured.
        budget: Bytes.
        batch: A batch to measure on.
        largest: The number of samples of the largest batch.

    Returns:
        The plan, and whether batches may be cut: whether the loss is a mean over samples.
    """
    separable = _is_mean_over_samples(objective, batch)
    n = num_samples(batch)
    if not separable or n < 2:
        fixed, slope = _graph_bytes(objective, batch), 0.0
        samples = _UNLIMITED
    else:
        low, high = max(1, min(4, n // 2)), min(8, n)
        b_low = _graph_bytes(objective, split(batch, low)[0])
        b_high = _graph_bytes(objective, split(batch, high)[0])
        slope = max(0.0, (b_high - b_low) / (high - low))
        fixed = max(0.0, b_high - slope * high)
        room = budget / 4 - fixed
        samples = largest if slope == 0 else max(1, min(largest, int(room / slope)))
    per_batch = fixed + slope * min(samples, max(largest, 1))
    in_all = per_batch * objective.batches.count * max(1, -(-largest // samples))
    vector = per_batch + 3 * objective.layout.numel * torch.finfo(objective.dtype).bits // 8
    keep = in_all <= budget / 2
    plan = MemoryPlan(
        budget=budget,
        max_samples=samples,
        max_vectors=max(1, int((budget - (in_all if keep else per_batch)) / max(vector, 1))),
        keep_graphs=keep,
    )
    return plan, separable


def _graph_bytes(objective: Objective, batch: Any) -> float:
    """Count the bytes that the gradient's graph of a batch retains, the parameters' own aside."""
    own = {t.untyped_storage().data_ptr() for t in objective.model.parameters()}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with objective.environment():
        leaves = tuple(p.requires_grad_() for p in objective.parameters())
        own.update(p.untyped_storage().data_ptr() for p in leaves)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = objective.loss(leaves, batch)
            if not loss.requires_grad:
                return 0.0
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        del grads
    return float(sum(sizes.values()))


def _is_mean_over_samples(objective: Objective, batch: Any) -> bool:
    """Whether a batch's loss is its parts' mean: not so for batch statistics or ranking losses."""
    n = num_samples(batch)
    if n < 2:
        return True
    whole = split(batch, 8)[0]
    parts = split(whole, -(-num_samples(whole) // 2))
    weights = [objective.weight(p) for p in parts]
    if not sum(weights) > 0:
        return False
    with objective.environment(), torch.no_grad():
        params = objective.parameters()
        try:
            loss = float(objective.loss(params, whole))
            mean = sum(
                w * float(objective.loss(params, p)) for w, p in zip(weights, parts, strict=True)
            ) / sum(weights)
        except (RuntimeError, ValueError, IndexError):
            return False  # a model of fixed batch size
    tolerance = 1e3 * torch.finfo(objective.dtype).eps
    return abs(loss - mean) <= tolerance * max(abs(loss), abs(mean), tolerance)


def memory_budget(device: torch.device, wanted: int | None) -> int:
    """Return the bytes to stay within: as wanted, or a share of the device's memory.

    The share is of the memory in all, not of what is free now, so that the same run takes the same
    steps every time: a quarter of a GPU's, an eighth of the machine's.

    Raises:
        ValueError: If `wanted` is not a positive int.
    """
    if wanted is not None:
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted <= 0:
            raise ValueError(f"expected memory_budget in bytes, a positive int, got {wanted!r}")
        return wanted
    return device_memory(device) // (4 if device.type == "cuda" else 8)
