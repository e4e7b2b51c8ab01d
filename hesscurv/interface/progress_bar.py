"""Progress bars in terminals and notebooks, silent elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

# Where no bar is shown, seconds between two lines of the log.
_SECONDS_BETWEEN_LINES = 30.0

Bar = TypeVar("Bar", bound="ProgressBar")


def is_shown_somewhere() -> bool:
    """Whether a bar on stderr is seen while it moves: in a terminal or a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if "IPKernelApp" in getattr(shell, "config", ()):
        return True
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):  # there is no stderr, or it is closed
        return False


class ProgressBar:
    """A bar with the share done, the rate, the expected end and the memory in use.

    In a terminal or a notebook it is drawn by ``tqdm.auto``. Elsewhere, as in the log of a batch
    job, nothing is printed; a line with the same numbers goes to the logger ``hesscurv``, level
    INFO, at most every 30 seconds. A context manager, which closes the bar.

    Args:
        total: Number of units.
        description: The label.
        unit: The unit's name.
        progress: Whether there is a bar at all.
        memory: Returns the memory in use, in bytes.
        bar_format: Format of tqdm; default tqdm's own, with its rate and expected end.
    """

    def __init__(
        self,
        total: int,
        description: str,
        unit: str,
        progress: bool,
        memory: Callable[[], int],
        bar_format: str | None = None,
    ) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = 0
        self._progress, self._memory = progress, memory
        self._bar: Any = None
        self._begun = self._logged = time.perf_counter()
        if progress and is_shown_somewhere():
            self._bar = tqdm(total=total, desc=description, unit=unit, bar_format=bar_format)

    @property
    def enabled(self) -> bool:
        """Whether anything is drawn or logged."""
        return self._progress

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._begun

    def show(self, done: int | None = None, note: str = "", *, at_once: bool = False) -> None:
        """Draw the bar, or log a line where it is due.

        Args:
            done: Number of finished units; None: unchanged.
            note: Text behind the bar; the memory in use is added.
            at_once: Whether to draw without regard to the time of the last drawing.
        """
        self.done = self.done if done is None else done
        if not self.enabled:
            return
        now = time.perf_counter()
        if self._bar is not None:
            moved = self.done - self._bar.n
            if moved or at_once or now - self._logged >= self._bar.mininterval:
                self._logged = now
                self._bar.set_postfix_str(self._described(note), refresh=not moved)
                if moved:
                    self._bar.update(moved)
        elif now - self._logged >= _SECONDS_BETWEEN_LINES:
            self._logged = now
            logger.info(
                "%s: %d of %d%s after %.0f s, %s",
                *(self.description, self.done, self.total, self.unit),
                *(self.seconds, self._described(note)),
            )

    def update(self, count: int = 1, note: str = "") -> None:
        """Count further units as done."""
        self.show(self.done + count, note)

    def say(self, text: str) -> None:
        """Print a line above a visible bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()

    def __enter__(self: Bar) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _described(self, note: str) -> str:
        memory = f"{self._memory() / 1e9:.3g} GB"
        return f"{note}, {memory}" if note else memory
