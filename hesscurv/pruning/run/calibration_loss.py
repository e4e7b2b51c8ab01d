"""The true loss on a fixed set of samples, and a stream of samples for curvature."""

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
    """A task's mean loss over a fixed set of samples, at any weights.

    Batches count by `task.weight`, of which a batch that is cut keeps what the task says of its
    part; those of no weight count nothing.

    Args:
        objective: The model and the task, refreshed.
        batches: Re-iterable batches; the samples are their first ones.
        most: The most samples to take.

    Attributes:
        num_samples: How many there are.
        batches: They, on the device.

    Raises:
        ValueError: If there are no batches, or the task gives them no weight.
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
        """Return the mean loss at some parameters; inf where it is not finite."""
        objective = self._objective
        total = 0.0
        with objective.environment(), torch.no_grad():
            for weight, batch in zip(self._weights, self.batches, strict=True):
                if weight != 0:  # or its mean is 0 / 0
                    total += weight * float(objective.loss(params, batch))
        loss = total / sum(self._weights)
        return loss if math.isfinite(loss) else math.inf


class SampleStream:
    """Samples of some batches, n at a time, from the start again when they run out.

    Passes may differ: a loader that shuffles or augments gives new samples each time. It draws
    from a copy of torch's random state, which itself stays as it is. Samples are counted, whatever
    they weigh; what they weigh is asked of the parts that batches are cut into.

    Args:
        objective: Says where the tensors go, and in which dtype.
        batches: Re-iterable batches.
        count: n.
    """

    def __init__(self, objective: Objective, batches: Iterable[Any], count: int) -> None:
        self.count = count
        self._source = Batches(batches, objective.device, objective.dtype, 0)
        self._rest: Any = None
        self._iterator: Iterator[Any] = iter(())

    def take(self) -> list[Any]:
        """Return the next n samples as batches, or one whole pass where it has fewer.

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
                    # One pass begun and ended in here holds all that there is.
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
