"""A progress bar for eigensolvers: pairs converged, products done, rate."""

from __future__ import annotations

import logging
import time

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


class Progress(tqdm):
    """A tqdm bar over converged pairs, to be used as a context manager.

    Args:
        total: The number of wanted pairs.
        enabled: Whether to show it.
    """

    def __init__(self, total: int, enabled: bool) -> None:
        super().__init__(total=total, unit="pair", desc="eigenpairs", disable=not enabled)
        self._begun = self._shown = time.perf_counter()
        self._before = 0  # products done before, by a run that is gone on with

    def go_on_from(self, num_matvecs: int) -> None:
        """Leave the products that were done before out of the rate."""
        self._before = num_matvecs

    def say(self, text: str, *, unusual: bool = False) -> None:
        """Log a line, as a warning if it is unusual, and write it above the bar if there is one."""
        logger.log(logging.WARNING if unusual else logging.INFO, text)
        if not self.disable:
            self.write(text)

    def show(self, converged: int | None, num_matvecs: int) -> None:
        """Show how many pairs have converged (None: as before) after so many products."""
        now = time.perf_counter()
        if self.disable or (converged is None and now - self._shown < self.mininterval):
            return
        self._shown = now
        rate = (num_matvecs - self._before) / max(now - self._begun, 1e-9)
        if converged is not None:
            self.n = converged
        self.set_postfix_str(f"{num_matvecs} products, {rate:.3g}/s", refresh=True)
