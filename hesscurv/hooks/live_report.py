"""A report that is rewritten while training, as a logger of a monitor."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from hesscurv.interface.descriptions import describe_object
from hesscurv.interface.integers import as_int
from hesscurv.interface.ranges import check_callable, check_count, check_positive
from hesscurv.plots.monitor_report import make_report
from hesscurv.plots.records import Record, as_records
from hesscurv.plots.report_page import assemble_page, check_file_path, encode_page, write_page

if TYPE_CHECKING:
    from hesscurv.hooks.page_server import PageServer

logger = logging.getLogger(__name__)


class LiveReport:
    """Rewrites the monitor's report while training, and optionally serves it to a browser.

    The page is that of `CurvatureMonitor.report`; an open one loads itself again. Each version is
    written atomically, so a reader finds a whole page at any time, and the last one stays when
    training ends. Records arrive as from any logger; a page that is not due yet waits for the next
    record, or for the end::

        live = LiveReport("run.html", serve=True)
        print(live.url)  # http://127.0.0.1:40213/
        monitor = CurvatureMonitor(model, task, probe, loggers=[live])

    The server stops, and the final page is written, at `close`, at the end of a with block, when
    the monitor and all other references are gone, or when Python ends.

    Args:
        path: The file to write, such as "run.html"; its folder must exist.
        serve: Whether to serve the page, and nothing else, on 127.0.0.1, in a daemon thread.
        port: The port; 0 (default) for any free one, see `url`. With several processes, only the
            one that logs serves.
        every: Least number of seconds between two pages; default 10.
        max_fraction: Largest fraction of the time that goes into pages, in (0, 1]; default 0.05: a
            page that took 1 s is followed by 19 s without.
        records: Earlier records of the same run, such as ``read_records("curvature.jsonl")``.
        title: The page's heading.
        num_parameters: D, for the chance level of the overlap by k; omitted by default.
        clock: Returns seconds; default `time.monotonic`.

    Attributes:
        path: The file, absolute.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range.
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder.
        OSError: If the port is taken.

    Cost: some tenths of a second per figure and page, in the training thread; at most
    `max_fraction` of the time, but for the first and the final page. Memory for the records.

    Example:
        >>> live = hesscurv.hooks.LiveReport("run.html", serve=True)
        >>> live.url.startswith("http://127.0.0.1:")
        True
        >>> live.close()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        serve: bool = False,
        port: int = 0,
        every: float = 10.0,
        max_fraction: float = 0.05,
        records: Iterable[Record] = (),
        title: str = "Curvature while training",
        num_parameters: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_positive("every", every, zero=True)
        check_positive("max_fraction", max_fraction)
        if max_fraction > 1:
            raise ValueError(f"expected 0 < max_fraction <= 1, got {max_fraction!r}")
        port = as_int("port", port)
        check_count("port", port, least=0)
        if port > 65535:
            raise ValueError(f"expected port <= 65535, got {port}; 0 takes any free one")
        check_callable("clock", clock)
        earlier = list(getattr(records, "records", records))
        # Absolute: training may change the working directory.
        self.path = check_file_path(path).absolute()
        self._page = _Page(
            self.path,
            as_records(earlier) if earlier else [],
            every,
            max_fraction,
            clock,
            {"title": str(title), "num_parameters": num_parameters},
        )
        self._serve, self._port = bool(serve), port
        if self._serve and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            self._page.start_server(port)
        # Also when the monitor is gone, and at exit: the page must not refer to this object.
        self._end = weakref.finalize(self, _finish, self._page)

    def __repr__(self) -> str:
        """Name the file and the address."""
        return describe_object(
            self, path=str(self.path), url=self.url, records=len(self._page.records)
        )

    @property
    def url(self) -> str | None:
        """The address of the served page; None if it is not served."""
        server = self._page.server
        return None if server is None else server.url

    def log(self, record: dict[str, Any], step: int) -> None:
        """Add a record, and rewrite the page if it is due.

        Of several records for one step the last one counts.

        Args:
            record: A record of a `CurvatureMonitor`.
            step: The training step.

        Raises:
            ValueError: If the report is closed.
            OSError: If the page cannot be written; the one before is whole, later records try
                again.
        """
        if not self._end.alive:
            raise ValueError(
                f"expected an open LiveReport, got a closed one of {self.path}; make a new "
                "one with records=monitor.records"
            )
        if self._serve and self._page.server is None:
            self._page.start_server(self._port)
        self._page.add({"step": step} | record)

    def close(self) -> None:
        """Write the final page, which no longer reloads, and stop the server.

        Raises:
            OSError: If the page cannot be written; the server is stopped all the same.
        """
        if self._end.detach() is not None:
            self._page.finish()

    def __enter__(self) -> LiveReport:
        """Return the report."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class _Page:
    """The records, the file and the server, apart from the logger, whose end they outlive."""

    def __init__(
        self,
        path: Path,
        records: list[Record],
        every: float,
        max_fraction: float,
        clock: Callable[[], float],
        options: dict[str, Any],
    ) -> None:
        self.path, self.every, self.max_fraction, self.clock = path, every, max_fraction, clock
        self.records, self.options = {record["step"]: record for record in records}, options
        self.server: PageServer | None = None
        self.process = os.getpid()
        self.due: float | None = None  # None: at once
        self.lock = threading.Lock()

    def start_server(self, port: int) -> None:
        from hesscurv.hooks.page_server import PageServer  # an HTTP server, which few ask for

        self.server = PageServer(self._html(self._refresh()), port)

    def add(self, record: Record) -> None:
        with self.lock:
            self.records[record["step"]] = record
            start = self.clock()
            if self.due is not None and start < self.due:
                return
            try:
                self._write(self._refresh())
            finally:
                end = self.clock()
                rest = (end - start) * (1 / self.max_fraction - 1)
                self.due = max(start + self.every, end + rest)

    def finish(self) -> None:
        if os.getpid() != self.process:  # a fork has inherited this, not the run
            return
        try:
            with self.lock:
                if self.records:
                    self._write(None)
        finally:
            if self.server is not None:
                self.server.close()

    def _refresh(self) -> float:
        return max(self.every, 1.0)

    def _write(self, refresh: float | None) -> None:
        content = self._html(refresh)
        if self.server is not None:
            self.server.page = content
        write_page(content, self.path)

    def _html(self, refresh: float | None) -> bytes:
        records = [self.records[step] for step in sorted(self.records)]
        if records:
            return encode_page(make_report(records, refresh=refresh, **self.options))
        waiting = assemble_page(
            self.options["title"],
            about="No measurement yet.",
            findings=[],
            cards=[],
            sections=[],
            refresh=refresh,
        )
        return encode_page(waiting)


def _finish(page: _Page) -> None:
    try:
        page.finish()
    except Exception:  # there is no caller to raise it to
        logger.warning("the final page of %s was not written", page.path, exc_info=True)
