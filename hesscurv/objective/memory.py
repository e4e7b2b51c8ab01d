"""Memory plan of a product: micro-batch size, vectors per pass, kept graphs."""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hesscurv.objective.data.batches import part_of, split
from hesscurv.objective.data.samples import is_cuttable, num_rows, tensors_of
from hesscurv.objective.objective import Objective

_UNLIMITED = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes that keep a product within its memory budget.

    Args:
        budget: Bytes for graphs and blocks of vectors together.
        max_samples: Samples per micro-batch.
        max_vectors: Vectors per pass over one micro-batch.
        keep_graphs: Whether the graphs of all micro-batches are kept between products.
        keep_references: Whether the graphs of the reference are kept too, once needed.
        graph_bytes: Bytes of the graphs alive at once; None if unknown.
        vector_bytes: Bytes per vector in flight.
    """

    budget: int
    max_samples: int = _UNLIMITED
    max_vectors: int = _UNLIMITED
    keep_graphs: bool = True
    keep_references: bool = False
    graph_bytes: int | None = None
    vector_bytes: int = 0

    def needed(self, vectors: int) -> int:
        """Return the bytes of a product with a block of this many vectors."""
        if self.graph_bytes is None:
            return self.budget
        passing = min(vectors, self.max_vectors) * self.vector_bytes
        return min(self.budget, self.graph_bytes + passing)

    def with_fewer_vectors(self, vectors: int) -> MemoryPlan:
        """Return the plan with at most this many vectors at once."""
        return replace(self, max_vectors=max(1, vectors))

    def with_fewer_samples(self, samples: int) -> MemoryPlan:
        """Return the plan with at most this many samples at once."""
        return replace(self, max_samples=max(1, samples))

    def without_kept_graphs(self) -> MemoryPlan:
        """Return the plan without graphs kept between products."""
        return replace(self, keep_graphs=False, keep_references=False)


def plan_memory(objective: Objective, budget: int, batch: Any, separable: bool) -> MemoryPlan:
    """Fit micro-batches and blocks of vectors into a budget, by measuring on a few samples.

    The bytes retained by a gradient's graph are linear in the samples; they are counted on four and
    eight samples. Half of the budget holds graphs, half the vectors in flight, each about as large
    as one graph.

    Args:
        objective: The objective.
        budget: Bytes.
        batch: The largest batch, to measure on.
        separable: Whether batches may be split.
    """
    n = num_rows(batch)
    samples = _UNLIMITED
    fixed, slope = 0.0, 0.0
    if separable and n > 1:
        low, high = max(1, min(4, n // 2)), min(8, n)
        b_low = _graph_bytes(objective, part_of(batch, 0, low))
        b_high = _graph_bytes(objective, part_of(batch, 0, high))
        slope = max(0.0, (b_high - b_low) / (high - low))
        fixed = max(0.0, b_high - slope * high)
        room = budget / 4 - fixed
        samples = n if slope == 0 else max(1, min(n, int(room / slope)))
    else:
        fixed = _graph_bytes(objective, batch)
    per_batch = fixed + slope * min(samples, n)
    in_all = per_batch * objective.batches.count * max(1, -(-n // samples))
    vector = per_batch + 3 * objective.layout.numel * torch.finfo(objective.dtype).bits // 8
    keep, keep_references = in_all <= budget / 2, in_all <= budget / 8
    kept = in_all * (1 + keep_references) if keep else per_batch
    return MemoryPlan(
        budget=budget,
        max_samples=samples,
        max_vectors=max(1, int((budget - kept) / max(vector, 1))),
        keep_graphs=keep,
        keep_references=keep_references,
        graph_bytes=int(kept),
        vector_bytes=int(vector),
    )


def is_mean_over_samples(objective: Objective, batch: Any) -> bool:
    """Whether the loss of a few samples is the mean over halves; not so for batch statistics."""
    if not is_cuttable(batch):
        return False
    few = weighed_part(objective, batch, 8)
    return is_mean_over_parts(objective, few, -(-num_rows(few) // 2))


def weighed_part(objective: Objective, batch: Any, size: int) -> Any:
    """Return the first `size` samples of a batch with positive weight.

    The loss of samples whose targets are all ignored is 0 / 0 and carries no information.
    """
    if not is_cuttable(batch):
        return batch
    n = num_rows(batch)
    for start in range(0, n, size):
        part = part_of(batch, start, start + size) if n > size else batch
        with contextlib.suppress(ValueError):  # a part whose mean is infinite
            if objective.weight(part) > 0:
                return part
    return batch


def is_mean_over_parts(objective: Objective, batch: Any, size: int) -> bool:
    """Whether a batch's loss is the mean over its parts of at most `size` samples.

    Also tested at other weights, if there is memory for a copy: for a model with equal outputs on
    all samples, such as one with a zero last layer, every weighted mean is the same. Cost: four
    forward passes.
    """
    if num_rows(batch) <= size:
        return True
    if not _is_mean(losses_of_parts(objective, batch, size)):
        return False
    moved = moved_parameters(objective)
    found = None if moved is None else losses_of_parts(objective, batch, size, moved)
    return found is None or not math.isfinite(found.loss) or _is_mean(found)


def _is_mean(found: PartLosses | None) -> bool:
    if found is None or not sum(found.weights) > 0:
        return False
    pairs = zip(found.weights, found.losses, strict=True)
    mean = sum(w * x for w, x in pairs) / sum(found.weights)
    tolerance = 1e3 * torch.finfo(found.dtype).eps
    return abs(found.loss - mean) <= tolerance * max(abs(found.loss), abs(mean), tolerance)


def moved_parameters(objective: Objective) -> tuple[torch.Tensor, ...] | None:
    """Return the parameters, perturbed by half of their scale at initialisation.

    None if a copy takes too much memory.
    """
    params = objective.parameters()
    if objective.layout.numel * objective.dtype.itemsize > objective.budget // 8:
        return None
    generator = torch.Generator().manual_seed(3)

    def moved(p: torch.Tensor) -> torch.Tensor:
        draw = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p)
        usual = (p[0].numel() or 1) ** -0.5 if p.ndim > 1 and len(p) else 0.1
        size = p.square().mean().sqrt().clamp(min=usual) if p.numel() else p.new_ones(())
        return p + 0.5 * size * draw

    return tuple(map(moved, params))


@dataclass(frozen=True)
class PartLosses:
    """The loss of a batch and of its parts.

    Args:
        loss: Loss of the whole.
        weights: Weights of the parts in the mean; parts of zero weight are omitted.
        losses: Losses of the parts.
        dtype: The coarser of the dtypes of loss and computation.
    """

    loss: float
    weights: list[float]
    losses: list[float]
    dtype: torch.dtype


def losses_of_parts(
    objective: Objective,
    batch: Any,
    size: int,
    params: tuple[torch.Tensor, ...] | None = None,
) -> PartLosses | None:
    """Return the losses of a batch and of its parts of at most `size` samples.

    At given parameters, or the present ones. None if the batch cannot be split.
    """
    with objective.environment(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unsplittable batch may warn about shapes
        params = objective.parameters() if params is None else params
        try:
            parts = [(objective.weight(part), part) for part in split(batch, size)]
            parts = [(w, part) for w, part in parts if w != 0]
            whole = objective.loss(params, batch).detach()
            losses = [float(objective.loss(params, part).detach()) for _, part in parts]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # such as a model of fixed batch size, whose error has any type
            return None
    return PartLosses(
        float(whole), [w for w, _ in parts], losses, coarser(whole.dtype, objective.dtype)
    )


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return the less precise of two floating dtypes."""
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


def _graph_bytes(objective: Objective, batch: Any) -> float:
    """Count the bytes held by the gradient's graph of a batch, without inputs and parameters."""

    def measure() -> float:
        leaves = objective.leaves()
        with _Storages() as made:
            loss = objective.loss(leaves, batch)
            if not loss.requires_grad:
                return 0.0
            forward = made.bytes_alive()
            try:
                # Bound to a name to keep the graph alive while it is counted.
                slopes = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)  # noqa: F841
            except torch.OutOfMemoryError:
                raise
            except Exception:  # no double backward; the first graph is about as large
                return 2 * forward
        return made.bytes_alive()

    return float(objective.run(measure))


class _Storages(TorchDispatchMode):
    """Tracks the storages of all tensors created inside, without keeping them alive."""

    supports_higher_order_operators = True  # flex attention, conditions, loops: run as they are

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tensors_of((args, kwargs)) if _has_storage(t)}
        for t in filter(_has_storage, tensors_of(out)):
            storage = t.untyped_storage()
            if id(storage) not in given:  # otherwise a view of an input
                self._made[id(storage)] = weakref.ref(storage)
        return out

    def bytes_alive(self) -> float:
        storages = [made() for made in self._made.values()]
        return float(sum(s.nbytes() for s in storages if s is not None))


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided
