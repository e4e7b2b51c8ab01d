"""Progress bar of eigensolvers: converged pairs, matvecs, rate."""

from __future__ import annotations

import logging
import time

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


class Progress(tqdm):
    """A tqdm bar over converged pairs, used as a context manager.

    Args:
        total: The number of wanted pairs.
        enabled: Whether to show it.
    """

    def __init__(self, total: int, enabled: bool) -> None:
        super().__init__(total=total, unit="pair", desc="eigenpairs", disable=not enabled)
        self._begun = self._shown = time.perf_counter()
        self._before = 0  # matvecs of the run that is resumed

    def go_on_from(self, num_matvecs: int) -> None:
        """Exclude the matvecs of a resumed run from the rate."""
        self._before = num_matvecs

    def say(self, text: str, *, unusual: bool = False) -> None:
        """Log a line, as a warning if unusual, and print it above a visible bar."""
        logger.log(logging.WARNING if unusual else logging.INFO, text)
        if not self.disable:
            self.write(text)

    def show(self, converged: int | None, num_matvecs: int) -> None:
        """Update the bar: converged pairs (None: unchanged) and matvecs."""
        now = time.perf_counter()
        if self.disable or (converged is None and now - self._shown < self.mininterval):
            return
        self._shown = now
        rate = (num_matvecs - self._before) / max(now - self._begun, 1e-9)
        if converged is not None:
            self.n = converged
        self.set_postfix_str(f"{num_matvecs} products, {rate:.3g}/s", refresh=True)
