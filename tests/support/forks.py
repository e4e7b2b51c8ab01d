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
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
# What ranks and examples import, of which each import takes longer than a fork.
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


def forking() -> ForkServerContext:
    """Return the context whose processes are forks of the server, started at the first of them."""
    from multiprocessing import forkserver

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


@dataclass(frozen=True)
class Done:
    """How a script ended: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_script(
    script: Path, *arguments: object, cwd: Path, timeout: float = 300.0, **environment: str
) -> Done:
    """Run a script as ``python script arguments`` does, in a fork of the server.

    Args:
        script: Its path.
        arguments: Its arguments.
        cwd: The folder it is run in.
        timeout: Seconds, after which it is killed.
        environment: Changes of the environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        argv = [str(script), *map(str, arguments)]
        process = forking().Process(
            target=_be_script, args=(argv, str(cwd), environment, str(out), str(err))
        )
        process.start()
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        code, said = process.exitcode, err.read_text() if err.exists() else ""
        process.close()
        if late:
            said += f"\nkilled after {timeout} s"
        return Done(1 if code is None else code, out.read_text() if out.exists() else "", said)


def _be_script(argv: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    # Block-buffered as pipes are, so that what was lost in them would be lost here.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    os.chdir(cwd)
    here = {str(TESTS), str(TESTS.parent)}
    sys.path[:] = [str(Path(argv[0]).parent), *(p for p in sys.path if p not in here)]
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
    sys.stderr.flush()
    sys.exit(code)
