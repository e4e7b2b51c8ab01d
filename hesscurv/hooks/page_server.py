"""HTTP server of a single page, for this machine only."""

from __future__ import annotations

import errno
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_NAMES = {_HOST, "localhost"}
_POLL_SECONDS = 0.2
_STALLED_SECONDS = 10.0  # a client that sends nothing does not hold its thread longer


class PageServer:
    """Serves one page from memory on 127.0.0.1, in a daemon thread.

    It answers GET and HEAD for "/" and nothing else: no file is ever read. Requests whose Host is
    not this machine are refused, so that no foreign web page can read this one by a name that it
    resolves to 127.0.0.1 (DNS rebinding).

    Args:
        page: The page, HTML in UTF-8; assign `page` to replace it.
        port: The port; 0 for any free one.

    Attributes:
        url: The address.

    Raises:
        OSError: If the port is taken.
    """

    def __init__(self, page: bytes, port: int = 0) -> None:
        self.page = page
        try:
            self._server = _Server((_HOST, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise OSError(
                error.errno,
                f"expected a free port on {_HOST}, got {port}; pass port=0 for any free one",
            ) from error
        self._server.owner = self
        self._server.timeout = _POLL_SECONDS
        self.url = f"http://{_HOST}:{self._server.server_address[1]}/"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="hesscurv page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop and free the port; again does nothing."""
        self._stopped.set()
        # Garbage collection may call this in any thread, in its own too.
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10 * _POLL_SECONDS)

    def _serve(self) -> None:
        with self._server:
            while not self._stopped.is_set():
                self._server.handle_request()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    # On Windows reuse would let two servers share a port.
    allow_reuse_address = False
    owner: PageServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a connection that broke, instead of printing it."""
        logger.debug("a request from %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _STALLED_SECONDS
    server: _Server

    def do_GET(self) -> None:
        """Send the page."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Send its headers."""
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        name = (self.headers.get("Host") or _HOST).rpartition("@")[2].split(":")[0].lower()
        if name not in _NAMES:
            self.send_error(403, "Not for this host")
            return
        if self.path.partition("?")[0] != "/":
            self.send_error(404)
            return
        page = self.server.owner.page
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        if with_body:
            self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request, instead of printing it."""
        logger.debug(format, *args)
