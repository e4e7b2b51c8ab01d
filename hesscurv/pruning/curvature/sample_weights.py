"""Weights of single samples in the mean over all data.

A task's loss is a mean over each batch's samples, and over all data ``sum_b (w_b / N) L_b``, with
w_b from `task.weight` and N their sum. A single sample contributes its own loss, that of a batch of
one, with weight ``w_b w_s / sum_s w_s``, where w_s is the weight of the batch of one; operators
weight micro-batches the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hesscurv.objective.data.batches import select, split
from hesscurv.objective.data.samples import num_samples
from hesscurv.objective.objective import Objective
from hesscurv.operators.sample_space.sample_gradients import one_loss

# A batch, and its samples' weights, shape (n,), float64 and positive.
WeighedBatch = tuple[Any, Tensor]

_MOST_CHECKED = 32


def weigh(objective: Objective, batches: Iterable[Any]) -> Iterator[WeighedBatch]:
    """Yield batches without samples of zero weight, whose own loss would be 0 / 0.

    Raises:
        ValueError: If a weight is negative or not finite, or all samples of a batch have none.
    """
    for batch in batches:
        whole = _weight(objective, batch)
        if whole == 0:
            continue
        parts = split(batch, 1)
        weights = [_weight(objective, part) for part in parts] if len(parts) > 1 else [whole]
        weights_n = torch.tensor(weights, dtype=torch.float64, device="cpu")
        used = weights_n > 0
        if not used.any():
            raise ValueError(
                f"expected task.weight of a batch, {whole:.6g}, to be that of its samples in all, "
                "got 0 for each of them; let weight count what the loss averages over"
            )
        # Normalised in this order, so that equal samples have weight exactly 1.
        weights_n = weights_n * (whole / weights_n.sum())
        yield (batch, weights_n) if used.all() else (select(batch, used), weights_n[used])


def check_mean_over_samples(
    objective: Objective, params: tuple[Tensor, ...], weighed: WeighedBatch
) -> None:
    """Require the loss of a batch to be the weighted mean of its samples' losses.

    Tested on at most 32 samples, as a function of the outputs.

    Raises:
        ValueError: If it is not, or the outputs do not have one row per sample.
    """
    batch, weights_n = weighed
    n = len(weights_n)
    index = torch.arange(min(n, _MOST_CHECKED), device="cpu") * n // min(n, _MOST_CHECKED)
    few, weights_n = select(batch, index), weights_n[index]
    task = objective.task_parts
    with objective.environment(), torch.no_grad():
        out = objective.outputs(params, few)
        if out.ndim == 0 or len(out) != len(index):
            raise ValueError(
                f"expected task.outputs with one row a sample, {len(index)} here, got shape "
                f"{tuple(out.shape)}; keep what belongs to a sample together, as in (n, tokens, "
                "classes), in the outputs and in the batch's targets"
            )
        loss = float(task.loss(out, few))
        own = [
            float(one_loss(task.sample_losses(out[i : i + 1], sample)))
            for i, sample in enumerate(split(few, 1))
        ]
    mean = float(weights_n @ torch.tensor(own, dtype=torch.float64, device="cpu")) / float(
        weights_n.sum()
    )
    # A loss that is a small difference of large outputs carries the rounding of the outputs.
    eps = torch.finfo(out.dtype).eps
    tolerance = 1e3 * eps * max(abs(loss), abs(mean)) + 8 * eps * float(out.abs().max())
    if math.isfinite(loss) and not abs(loss - mean) <= tolerance:
        raise ValueError(
            "expected a batch's loss to be the mean of its samples' own, weighted by task.weight, "
            f"or there are no rows by sample: got {loss:.6g} for some samples together, and "
            f"{mean:.6g} as their mean; where the loss averages something else (class weights, "
            "ignored targets), count that in weight, in a subclass of hesscurv.Task"
        )


def count_samples(samples: Iterable[WeighedBatch]) -> int:
    """Return the number of samples with positive weight.

    Raises:
        ValueError: If there are none.
    """
    n = sum(num_samples(batch) for batch, _ in samples)
    if n == 0:
        raise ValueError(
            "expected a positive total weight of the samples of a stage, got 0; leave out batches "
            "that the task gives no weight, or take more samples"
        )
    return n


def _weight(objective: Objective, batch: Any) -> float:
    weight = objective.weight(batch)
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"expected a batch weight >= 0, got {weight}; look at task.weight")
    return weight
