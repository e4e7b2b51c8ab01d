"""Loss on the calibration set, and a stream of samples for curvature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hesscurv.objective.data.batches import Batches, part_of, split
from hesscurv.objective.data.samples import num_samples
from hesscurv.objective.objective import Objective

_END = object()


class CalibrationLoss:
    """A task's mean loss over the calibration set, at any weights.

    Batches are weighted by `task.weight`, a truncated batch by the weight of its part; batches of
    zero weight are skipped.

    Args:
        objective: The model and the task, refreshed.
        batches: Re-iterable batches; their first samples are taken.
        most: Maximal number of samples.

    Attributes:
        num_samples: Number of samples.
        batches: The batches, on the device.

    Raises:
        ValueError: If there are no batches, or their total weight is not positive.
    """

    def __init__(self, objective: Objective, batches: Iterable[Any], most: int) -> None:
        self._objective = objective
        source = Batches(batches, objective.device, objective.dtype, 0)
        self.batches: list[Any] = []
        self.num_samples = 0
        for batch in source.first_pass():
            part = split(batch, most - self.num_samples)[0]
            self.batches.append(part)
            self.num_samples += num_samples(part)
            if self.num_samples >= most:
                break
        self._weights = [objective.weight(batch) for batch in self.batches]
        if not 0 < sum(self._weights) < math.inf:
            raise ValueError(
                "expected a positive total weight of the calibration samples, got "
                f"{sum(self._weights)}; look at task.weight, or pass other calibration batches"
            )

    def __call__(self, params: tuple[Tensor, ...]) -> float:
        """Return the mean loss at some parameters; inf if it is not finite."""
        objective = self._objective
        total = 0.0
        with objective.environment(), torch.no_grad():
            for weight, batch in zip(self._weights, self.batches, strict=True):
                if weight != 0:  # otherwise its mean is 0 / 0
                    total += weight * float(objective.loss(params, batch))
        loss = total / sum(self._weights)
        return loss if math.isfinite(loss) else math.inf


class SampleStream:
    """Samples of some batches, n at a time, restarting when they run out.

    Passes may differ: a loader that shuffles or augments gives new samples each time, drawing from
    a copy of torch's random state. Samples are counted regardless of their weights.

    Args:
        objective: Determines device and dtype of the tensors.
        batches: Re-iterable batches.
        count: n.
    """

    def __init__(self, objective: Objective, batches: Iterable[Any], count: int) -> None:
        self.count = count
        self._source = Batches(batches, objective.device, objective.dtype, 0)
        self._rest: Any = None
        self._iterator: Iterator[Any] = iter(())

    def take(self) -> list[Any]:
        """Return the next n samples as batches, or one whole pass if it has fewer.

        Raises:
            ValueError: If there are none.
        """
        out: list[Any] = []
        missing, passes = self.count, 0
        while missing:
            batch, self._rest = self._rest, None
            if batch is None:
                batch = next(self._iterator, _END)
                if batch is _END:
                    # A pass that began and ended within this call has returned every sample.
                    if passes == 2 or (passes == 1 and not out):
                        break
                    self._iterator, passes = self._source.read(), passes + 1
                    if passes == 2:
                        out, missing = [], self.count
                    continue
            size = num_samples(batch)
            if size > missing:
                self._rest = part_of(batch, missing, size)
                batch, size = part_of(batch, 0, missing), missing
            out.append(batch)
            missing -= size
        if not out:
            raise ValueError("expected at least one batch, got none; pass a list of batches")
        return out
