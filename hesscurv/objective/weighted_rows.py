r"""Losses and weights of single samples, for losses that are weighted means.

A batch's loss is :math:`L = \sum_n w_n \ell_n / \sum_n w_n`, with :math:`\ell_n` the loss of sample
n alone and :math:`w_n` its `weight`: of a cross-entropy its class weight, of a sequence the number
of its valid tokens, and 0 where all of it is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscurv.objective.data.batches import select_rows
from hesscurv.objective.data.sample_lists import select_listed
from hesscurv.objective.data.samples import is_cuttable, num_rows
from hesscurv.objective.means.mean_check import says_its_weight
from hesscurv.objective.tasks import Task


class WeightedRows:
    """Weights of the samples of a batch.

    Args:
        task: A task with `sample_losses`. If it overrides them, their plain mean is the loss.
        batch: The batch.

    Attributes:
        weights: Weights of the samples with positive weight, shape (m,), with mean 1; None if all
            are equal.
    """

    def __init__(self, task: Any, batch: Any) -> None:
        self._task, self._batch = task, batch
        self._used: Tensor | None = None
        self.weights = _weights_of_rows(task, batch)
        if self.weights is None:
            return
        self._n = len(self.weights)
        used = self.weights.nonzero()[:, 0]
        if len(used) < self._n:  # the loss of an ignored sample is 0 / 0
            self._used = used
            self._batch = _select(batch, used, self._n)
            self.weights = self.weights[used]
        self.weights = self.weights / self.weights.mean()

    def losses(self, outputs: Tensor) -> Tensor:
        """Return the losses of the samples with positive weight, shape (m,).

        Args:
            outputs: The task's outputs on the batch, shape (n, ...).

        Raises:
            ValueError: If there is not one row of outputs for each weight.
        """
        if self.weights is not None and len(outputs) != self._n:
            raise ValueError(
                f"expected outputs with one row for each of {self._n} samples, which count "
                f"differently, got shape {tuple(outputs.shape)}; override sample_losses and weight "
                "in a subclass of hesscurv.Task"
            )
        if self._used is not None:
            outputs = outputs[self._used.to(outputs.device)]
        losses: Tensor = self._task.sample_losses(outputs, self._batch)
        return losses


def _weights_of_rows(task: Any, batch: Any) -> Tensor | None:
    """Return the weight of each row, or None if all are equal or unknown."""
    if getattr(type(task), "sample_losses", None) is not Task.sample_losses:
        return None
    weights: Tensor | None
    if callable(getattr(task, "row_weights", None)):
        weights = task.row_weights(batch)
    elif says_its_weight(task) and _has_rows(batch):
        n = num_rows(batch)
        parts = (_select(batch, torch.tensor([i], device="cpu"), n) for i in range(n))
        weights = torch.tensor(
            [float(task.weight(part)) for part in parts], dtype=torch.float64, device="cpu"
        )
    else:
        weights = None
    if weights is None or bool((weights == weights[:1]).all()):
        return None
    return weights


def _has_rows(batch: Any) -> bool:
    """Whether single samples can be selected from a batch."""
    return is_cuttable(batch) or select_listed(batch, num_rows(batch), [0]) is not None


def _select(batch: Any, index: Tensor, n: int) -> Any:
    listed = select_listed(batch, n, index.tolist())
    return select_rows(batch, index, n) if listed is None else listed
