"""A progress bar for eigensolvers: pairs converged, products done, rate."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm.auto import tqdm


class Progress:
    """A tqdm bar over converged pairs; a context manager that does nothing when disabled.

    Args:
        total: The number of wanted pairs.
        enabled: Whether to show it.
    """

    def __init__(self, total: int, enabled: bool) -> None:
        self._bar = tqdm(total=total, unit="pair", desc="eigenpairs", disable=not enabled)
        self._start = time.perf_counter()

    def __enter__(self) -> Progress:
        """Return the bar."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the bar."""
        self._bar.close()

    def update(self, converged: int | None, num_matvecs: int) -> None:
        """Show how many pairs have converged (None: as before) after so many products."""
        if self._bar.disable:
            return
        rate = num_matvecs / max(time.perf_counter() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{num_matvecs} products, {rate:.3g}/s", refresh=False)
        self._bar.n = self._bar.n if converged is None else converged
        self._bar.refresh()
