"""Settings of the whole process that several threads need changed at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

# One lock for all settings: whoever saves one must not find another thread in the middle of
# changing it. Reentrant, as a loader's code runs under it and may itself measure something.
LOCK = threading.RLock()


class SharedSetting:
    """A context that changes the process, entered by the first thread and left by the last one.

    Were each thread to save what it finds and put it back at its end, a thread that begins while
    another is inside would save the changed setting, and leave it behind.

    Args:
        make: Makes the context manager that changes the setting and puts it back.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._count = 0
        self._inside = ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the setting changed inside."""
        with LOCK:
            if self._count == 0:
                self._inside.enter_context(self._make())
            self._count += 1
        try:
            yield
        finally:
            with LOCK:
                self._count -= 1
                if self._count == 0:
                    self._inside.pop_all().close()
