"""Progress bar of block Krylov: converged pairs, matvecs, rate, expected end, memory."""

from __future__ import annotations

import logging
from functools import partial

from tqdm.auto import tqdm

from hesscurv.interface.progress_bar import ProgressBar
from hesscurv.linalg.device_memory import used_memory
from hesscurv.operators.linear_operator import LinearOperator

logger = logging.getLogger(__name__)

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
# Matvecs of a solve for each pair, expected until pairs have converged.
_MATVECS_PER_PAIR = 2.2


class Progress(ProgressBar):
    """A bar over converged pairs, used as a context manager; shown by the first rank only.

    Args:
        total: The number of wanted pairs.
        enabled: Whether to show it.
        H: The operator, for its device and its rank.
    """

    def __init__(self, total: int, enabled: bool, H: LinearOperator) -> None:
        memory = partial(used_memory, H.device)
        enabled = enabled and H.communicator.rank == 0
        super().__init__(total, "eigenpairs", " pairs", enabled, memory, _FORMAT)
        self._before = 0  # matvecs of the run that is resumed
        # Matvecs and converged pairs at the last two checks that found more.
        self._earlier = self._latest = (0, 0)

    def go_on_from(self, num_matvecs: int) -> None:
        """Exclude the matvecs of a resumed run from the rate."""
        self._before = num_matvecs

    def announce(self, text: str, *, unusual: bool = False) -> None:
        """Log a line, as a warning if unusual, and print it above a visible bar."""
        logger.log(logging.WARNING if unusual else logging.INFO, text)
        self.say(text)

    def advance(self, converged: int | None, num_matvecs: int) -> None:
        """Update the bar: converged pairs (None: unchanged) and matvecs."""
        if not self.enabled:
            return
        if converged is not None and converged > self._latest[1]:
            self._earlier, self._latest = self._latest, (num_matvecs, converged)
        rate = (num_matvecs - self._before) / max(self.seconds, 1e-9)
        note = f"{num_matvecs:,} products, {rate:.3g}/s"
        left = expected_matvecs(self.total, num_matvecs, self._earlier, self._latest) - num_matvecs
        if self._latest[1] >= self.total:
            note += ", looking for missed pairs" if converged is None else ""
        elif rate > 0:
            note += f", about {tqdm.format_interval(left / rate)} left"
        self.show(converged, note)


def expected_matvecs(
    k: int, num_matvecs: int, earlier: tuple[int, int], latest: tuple[int, int]
) -> float:
    """Return the expected number of matvecs of a solve, by extrapolation of the converged pairs.

    Args:
        k: Number of wanted pairs.
        num_matvecs: Matvecs so far.
        earlier: Matvecs and converged pairs at a check.
        latest: The same at the last check that found more; (0, 0) if none did.
    """
    expected = _MATVECS_PER_PAIR * k
    if earlier[1] > 0:
        slope = (latest[0] - earlier[0]) / (latest[1] - earlier[1])
        expected = latest[0] + slope * (k - latest[1])
    # A solve that takes longer than expected is taken to have a tenth of its way to go.
    return max(expected, 1.1 * num_matvecs) if latest[1] < k else num_matvecs
