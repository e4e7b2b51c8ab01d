"""Processes that start in milliseconds: forks of a server that has imported torch and hesscurv.

Each is a process of its own, which computes, changes settings and dies as one that was started anew
does. The server computes nothing, so that no thread is lost in a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
# What ranks and scripts import, of which each import takes longer than a fork.
PRELOADED = (
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "hesscurv",
    "hesscurv.integrations",
    "matplotlib.pyplot",
    "sklearn.datasets",
)
# Read once, by the libraries that the server imports.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HESSCURV_CACHE": "off"}


def forking() -> Any:
    """Return the context whose processes are forks of the server, started at the first of them."""
    context = multiprocessing.get_context("forkserver")
    before = dict(os.environ)
    paths = [str(TESTS.parent), str(TESTS), before.get("PYTHONPATH", "")]
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    try:
        context.set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def run_script(
    script: Path,
    *arguments: object,
    cwd: Path,
    timeout: float = 300.0,
    sees_tests: bool = False,
    **environment: str,
) -> CompletedProcess[str]:
    """Run a script as ``python script arguments`` does, in a fork of the server.

    Args:
        script: Its path.
        arguments: Its arguments.
        cwd: The folder it is run in.
        timeout: Seconds, after which it is killed.
        sees_tests: Whether it finds the tests' modules by import.
        environment: Changes of the environment.

    Returns:
        Its exit code, negative where a signal ended it, and what it printed.
    """
    argv = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        out.touch()
        err.touch()
        process = forking().Process(
            target=_be_script, args=(argv, str(cwd), sees_tests, environment, str(out), str(err))
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        return CompletedProcess(argv, code, out.read_text(), err.read_text())


def run_source(source: str, *arguments: object, cwd: Path, **options: Any) -> str:
    """Return what ``python -c source arguments`` prints, run in a fork of the server."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "source.py"
        script.write_text(source)
        done = run_script(script, *arguments, cwd=cwd, **options)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _be_script(
    argv: list[str],
    cwd: str,
    sees_tests: bool,
    environment: dict[str, str],
    out: str,
    err: str,
) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    os.chdir(cwd)
    if not sees_tests:
        sys.path[:] = [p for p in sys.path if p != str(TESTS)]
    sys.path.insert(0, str(Path(argv[0]).parent))
    sys.argv[:] = argv
    code: Any = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.exit(code)
