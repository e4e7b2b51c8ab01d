"""An operator whose products are counted, checked and shown, for the length of one solve."""

from __future__ import annotations

import math
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hesscurv.linalg.floating_range import require_range
from hesscurv.operators.linear_operator import LinearOperator


class CountedOperator(LinearOperator):
    """The operator H with a count of its own, a check for NaN, and a progress bar over products.

    A context manager, which closes the bar.

    Args:
        H: The symmetric operator.
        total: The number of products that are planned.
        description: What stands before the bar.
        progress: Whether to show it.
    """

    def __init__(self, H: LinearOperator, total: int, description: str, progress: bool) -> None:
        super().__init__(H.shape[0], H.dtype, H.device)
        self.layout = getattr(H, "layout", None)
        self._operator, self._in_range = H, False
        self._solve = ExitStack()
        self._bar = tqdm(total=total, desc=description, unit=" products", disable=not progress)

    def __enter__(self) -> CountedOperator:
        """Return the operator; products are looked at here, for NaN and inf."""
        self._solve.enter_context(self._operator.solving())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the bar; at the end of a solve that went well, have its products confirmed."""
        self._bar.close()
        self._solve.close()
        if kind is None:
            self._operator.confirm()

    def _check(self, other: Any) -> None:
        """Leave it to the operator, which checks what it multiplies itself."""

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        out = self._operator @ vectors_DB
        # One reading of the block finds NaN as well as inf, without a mask of its size.
        largest = float(torch.stack(out.aminmax()).abs().max())  # NaN propagates
        if not math.isfinite(largest):
            raise ValueError(
                f"products {self.num_matvecs} to {self.num_matvecs + out.shape[1]} with the "
                "operator have NaN or inf entries; check the model's loss and parameters, or "
                "compute in float64"
            )
        if not self._in_range:  # before anything of a usual size was seen
            require_range(largest)
            self._in_range = largest > 0
        self._bar.update(out.shape[1])
        return out
