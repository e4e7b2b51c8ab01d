"""Run small programs in a process that has the pretended CUDA device, and collect what they return.

A process sees a CUDA device from its start or not at all, so a test cannot switch it on for itself.
Starting one costs seconds: a module of tests shares one, which `pretended` (a fixture in
tests/devices/conftest.py) hands out.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.pretended_cuda.build import build

TESTS = Path(__file__).resolve().parents[2]


class PretendedError(AssertionError):
    """A program raised, crashed or was late in the process of the pretended device."""


class PretendedDevice:
    """A process with the pretended CUDA device, started at the first program and kept.

    Raises:
        CannotBuild: At construction, where the device cannot be compiled; it says why.
    """

    def __init__(self) -> None:
        self._library = build()
        self._process: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`

    def run(self, program: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
        """Call ``program(*args)`` there.

        Args:
            program: A function at the top of a module that lies in `tests/`; found by import.
                It runs with warnings as errors and torch's generators seeded.
            args: Plain values.
            timeout: Seconds, after which the process is killed.

        Returns:
            The program's result: plain values and tensors, these on the CPU.

        Raises:
            PretendedError: With the traceback, if it raised; with the end of what the process
                printed, if it ended or was late. The next program gets a new process then.
        """
        process = self._process or self._start()
        was_late = threading.Event()

        def end() -> None:
            was_late.set()
            process.kill()

        late = threading.Timer(timeout, end)
        late.start()
        try:
            pickle.dump((program.__module__, program.__qualname__, args), process.stdin)
            process.stdin.flush()
            fine, value = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = self._end()
            how = f"after {timeout} s" if was_late.is_set() else f"with exit code {code}"
            raise PretendedError(f"{program.__qualname__} ended {how}:\n{self._tail()}") from error
        finally:
            late.cancel()
        if not fine:
            raise PretendedError(value)
        return value

    def close(self) -> None:
        """End the process."""
        self._end()
        self._said.close()

    def _end(self) -> int:
        """Let the process end, which it does when nothing more is asked; return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        code = process.wait()
        process.stdout.close()
        return code

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "LD_PRELOAD": str(self._library),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "HESSCURV_CACHE": "off",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.pretended_cuda.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
        )
        return self._process

    def _tail(self, length: int = 2000) -> str:
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - length))
        return self._said.read().decode(errors="replace")


def serve() -> None:
    """Be the process of a `PretendedDevice`: run programs until the pipe is closed."""
    # What programs start (compilers, workers) is no place for the device.
    os.environ.pop("LD_PRELOAD", None)
    asked = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what programs print is no answer
    import torch
    from support.pretended_cuda import torch_cuda

    torch_cuda.install()
    torch.set_num_threads(1)
    while True:
        try:
            module, name, args = pickle.load(asked)
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            program = getattr(importlib.import_module(module), name)
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                answer = (True, _plain(program(*args)))
        except Exception:
            answer = (False, traceback.format_exc())
        finally:
            torch_cuda.set_limit(None)
            torch_cuda.set_pinnable(None)
            torch.cuda.set_sync_debug_mode("default")
        pickle.dump(answer, answers)
        answers.flush()


def _plain(value: Any) -> Any:
    """Tensors of the device come back as the CPU's, which the other process can make."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        plain = list(map(_plain, value))
        return plain if isinstance(value, list) else tuple(plain)
    return value


if __name__ == "__main__":
    serve()
