"""Seconds and peak memory of a piece of work, summed up over the processes that did it.

Import it; it is not run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from memory import anonymous_bytes, peak_bytes
from training import write_json

SAMPLE_SECONDS, KEEP_SECONDS, SAY_SECONDS = 0.2, 5.0, 60.0


class Meter:
    """Seconds and peak memory of a piece of work, over all processes that worked on it.

    A thread writes them down every few seconds, says that the work goes on, and ends the process
    when the one that started it is gone.

    Args:
        path: The file that keeps them.
        options: Those of the script.
    """

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path, self.options = path, options
        self.before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.operator: Any = None
        self._anonymous = 0
        self._parent, self._over = os.getppid(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._totals = self._now()
        write_json(self.path, self._totals)

    def totals(self) -> dict[str, Any]:
        """Return the figures as they were when the work was over."""
        return self._totals

    def _now(self) -> dict[str, Any]:
        before = self.before
        cuda = self.options.device.startswith("cuda")
        anonymous = self._anonymous = max(self._anonymous, anonymous_bytes())
        # Mapped files count as held while the system has no other use for the memory.
        peaks = {
            "peak_bytes": anonymous if self.options.storage == "disk" else peak_bytes(),
            "resident_peak_bytes": peak_bytes(),
            "device_peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        }
        return {
            "seconds": before.get("seconds", 0.0) + time.perf_counter() - self._start,
            "pieces": before.get("pieces", 0) + 1,
            **{name: max(value, before.get(name, 0)) for name, value in peaks.items()},
        }

    def _watch(self) -> None:
        kept = said = time.perf_counter()
        while not self._over.wait(SAMPLE_SECONDS):
            if os.getppid() != self._parent:
                os._exit(1)
            self._anonymous = max(self._anonymous, anonymous_bytes())
            now = time.perf_counter()
            if now - kept > KEEP_SECONDS:
                kept = now
                write_json(self.path, self._now())
            if now - said > SAY_SECONDS and not sys.stderr.isatty():
                said, done = now, getattr(self.operator, "num_matvecs", 0)
                minutes = (now - self._start) / 60
                print(f"  {minutes:.0f} min, {done} products, {peak_bytes() / 1e9:.3g} GB")
