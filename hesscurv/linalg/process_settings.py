"""Process-wide settings changed temporarily by several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

# One lock for all settings: none may be saved while another thread is changing it. Reentrant, since
# a loader's code runs under it and may compute products itself.
LOCK = threading.RLock()


class SharedSetting:
    """A process-wide context, entered by the first thread and left by the last one.

    If each thread saved and restored the setting, a thread that starts while another is inside
    would save the changed value and leave it behind.

    Args:
        make: Factory of the context manager that changes and restores the setting.
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
