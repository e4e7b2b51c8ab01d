"""Operator wrapper that counts, checks and displays the matvecs of one solve."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hesscurv.interface.progress_bar import ProgressBar
from hesscurv.linalg.device_memory import used_memory
from hesscurv.linalg.floating_range import require_range
from hesscurv.operators.linear_operator import LinearOperator


class CountedOperator(LinearOperator):
    """The operator H with its own matvec count, a check for NaN, and a progress bar.

    A context manager, which closes the bar.

    Args:
        H: The symmetric operator.
        total: Planned number of matvecs.
        description: Label of the bar.
        progress: Whether to show the bar, on the first rank.
    """

    def __init__(self, H: LinearOperator, total: int, description: str, progress: bool) -> None:
        super().__init__(H.shape[0], H.dtype, H.device)
        self.layout = getattr(H, "layout", None)
        self._operator, self._in_range = H, False
        self._solve = ExitStack()
        memory = partial(used_memory, H.device)
        progress = progress and H.communicator.rank == 0
        self._bar = ProgressBar(total, description, " products", progress, memory)

    def __enter__(self) -> CountedOperator:
        """Return the operator; its own check of products is off, as `_matmat` makes it."""
        self._solve.enter_context(self._operator.solving())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the bar; after a successful solve, let the operator confirm its products."""
        self._bar.close()
        self._solve.close()
        if kind is None:
            self._operator.confirm()

    def _check(self, other: Any) -> None:
        """Do nothing: the wrapped operator checks its own arguments."""

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        out = self._operator @ vectors_DB
        # aminmax finds NaN and inf in one pass, without a mask of the block's size.
        largest = float(torch.stack(out.aminmax()).abs().max())  # NaN propagates
        if not math.isfinite(largest):
            raise ValueError(
                f"products {self.num_matvecs} to {self.num_matvecs + out.shape[1]} with the "
                "operator have NaN or inf entries; check the model's loss and parameters, or "
                "compute in float64"
            )
        if not self._in_range:  # until one product is nonzero and within range
            require_range(largest)
            self._in_range = largest > 0
        self._bar.update(out.shape[1])
        return out
