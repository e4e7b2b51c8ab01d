"""A headless Chromium for tests of pages, driven through its debugging pipe; skips without one.

``HESSCURV_BROWSER`` names the program; otherwise the usual names are looked up in the path.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
_SECONDS = 60
# The browser reads commands from its descriptor 3 and answers on 4. Both move up first: either may
# be 3 or 4 now.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """The program of a Chromium, None without one."""
    named = os.environ.get("HESSCURV_BROWSER")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One tab; ``with Browser(program, folder) as browser``."""

    def __init__(self, program: str, folder: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-S", "-c", _START, str(commands), str(answers), program),
                *("--headless", "--remote-debugging-pipe", f"--user-data-dir={folder}"),
                *("--no-sandbox", "--disable-gpu"),
                *("--no-first-run", "--hide-scrollbars", "about:blank"),
            ],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._numbers, self._buffer, self.events = itertools.count(1), b"", []
        self._answers: dict[int, Any] = {}
        self._session: str | None = None
        try:
            self._open_tab()
        except BaseException:
            self.__exit__()
            raise

    def _open_tab(self) -> None:
        target = next(
            info["targetId"]
            for info in self._call("Target.getTargets")["targetInfos"]
            if info["type"] == "page"
        )
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def show(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of some CSS pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self._call("Page.navigate", url=address)
        self._until(lambda: any(e["method"] == "Page.loadEventFired" for e in self.events))

    def errors(self) -> list[str]:
        """Messages of the console since the page was loaded, warnings and worse."""
        found = []
        for event in self.events:
            what = event["params"]
            if event["method"] == "Log.entryAdded" and what["entry"]["level"] != "info":
                found.append(what["entry"]["text"])
            if event["method"] == "Runtime.exceptionThrown":
                found.append(what["exceptionDetails"]["text"])
            if event["method"] == "Runtime.consoleAPICalled" and what["type"] != "log":
                found.append(str(what["args"]))
        return found

    def value(self, expression: str) -> Any:
        """Evaluate an expression of JavaScript in the page."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression of JavaScript is true, across reloads of the page."""
        end = time.monotonic() + _SECONDS
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression} has not become true"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        done = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(done["data"]))

    def _call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda: self._answers.pop(number, None))
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, done: Any) -> Any:
        end = time.monotonic() + _SECONDS
        while not (found := done()):
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            data = os.read(self._read, 2**16) if ready else b""
            assert data, "the browser has ended or does not answer"
            *whole, self._buffer = (self._buffer + data).split(b"\0")
            for message in map(json.loads, whole):
                if "id" in message:
                    self._answers[message["id"]] = message
                else:
                    self.events.append(message)
        return found
