"""Changes that leave no mark on tensors, noticed by the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Reordering a sum of many terms changes a loss by at most about this many eps.
_ROUNDINGS = 32


class LossChanges:
    """Compares the loss with the one before: of the first batch, where asked, or of a closure.

    It detects plain attributes of a model and state that a loss or a closure captures.

    Its methods take what returns the loss of a batch, or of a closure for None; it is not kept, as
    it holds the model.

    Args:
        dtype: What the loss is computed in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._due = False
        self._first: float | None = None
        self._closure: float | None = None

    def compare_next(self) -> None:
        """Compare the first batch's loss at the next opportunity."""
        self._due = True

    def forget(self) -> None:
        """Forget the first batch's loss: the weights have changed."""
        self._first = None

    def first_differs(
        self, evaluate: Callable[[Any], float], batches: Sequence[Any] | None
    ) -> bool:
        """Whether the loss of the first of these batches has changed, if that is to be compared."""
        if not (self._due and batches):
            return False
        self._due = False
        loss = evaluate(batches[0])
        before, self._first = self._first, loss
        # The loss is not finite if all targets of the batch are ignored.
        return before is not None and math.isfinite(loss) and not self._is_same(loss, before)

    def closure_differs(self, evaluate: Callable[[Any], float]) -> bool:
        """Whether a closure's loss has changed by more than rounding."""
        loss = evaluate(None)
        if self._closure is not None and self._is_same(loss, self._closure):
            return False
        self._closure = loss
        return True

    def _is_same(self, loss: float, before: float) -> bool:
        # On GPUs, atomic additions sum in a different order every time.
        return abs(loss - before) <= _ROUNDINGS * torch.finfo(self._dtype).eps * abs(before)
