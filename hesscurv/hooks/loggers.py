"""Dispatch of records to loggers: objects with `log(record, step)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from hesscurv.interface.user_warning import warn_user


class MonitorWarning(UserWarning):
    """A measurement or a logger of a `CurvatureMonitor` has failed; training goes on.

    Example:
        >>> issubclass(hesscurv.hooks.MonitorWarning, UserWarning)
        True
    """


class Logger(Protocol):
    """Receiver of records."""

    def log(self, record: dict[str, Any], step: int) -> Any:
        """Log one record, a flat dict of plain values."""


class Loggers:
    """Several loggers, whose errors never end a training run.

    Args:
        loggers: Objects with ``log(record, step)``.

    Raises:
        TypeError: If one has no such method.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self._loggers = list(loggers)
        self._warned: set[int] = set()
        for logger in self._loggers:
            if not callable(getattr(logger, "log", None)):
                raise TypeError(
                    f"expected loggers with a method log(record, step), got a "
                    f"{type(logger).__name__}; wrap it in an object that has one"
                )

    def log(self, record: dict[str, Any], step: int) -> list[str]:
        """Pass a copy of the record to each; return failures, once per logger."""
        wrong = []
        for index, logger in enumerate(self._loggers):
            try:
                logger.log(dict(record), step)
            except Exception as error:
                if index not in self._warned:
                    self._warned.add(index)
                    wrong.append(
                        f"the logger {type(logger).__name__} failed at step {step} with "
                        f"{type(error).__name__}: {error}; the record is kept in "
                        "monitor.records, and later ones are tried"
                    )
        return wrong


def warn(messages: Iterable[str]) -> None:
    """Warn of failures that do not interrupt training."""
    for message in messages:
        warn_user(message, MonitorWarning)
