"""Small worlds of gloo ranks on this machine: run a function on all of them, and collect."""

from __future__ import annotations

import datetime
import os
import queue
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import forking

# torch 2.6 waits for shards on streams that a CPU's have no events for.
SHARDS_ON_CPUS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


class WorldError(AssertionError):
    """A rank raised, ended without a result, or was late; `by_rank` says what each did."""

    def __init__(self, by_rank: dict[int, str]) -> None:
        text = "\n".join(f"-- rank {rank} --\n{told}" for rank, told in sorted(by_rank.items()))
        super().__init__(text)
        self.by_rank = by_rank


def told(world: list[dict[str, Any]], program: str) -> list[Any]:
    """What each rank says of one program; the test is skipped where it was left out."""
    if program not in world[0]:
        pytest.skip("torch 2.6 shards no model on CPUs")
    return [by_program[program] for by_program in world]


def run_world(
    fn: Callable[..., Any],
    size: int,
    tmp_path: Path,
    *args: Any,
    timeout: float = 90.0,
    collective_timeout: float = 10.0,
    may_die: tuple[int, ...] = (),
) -> list[Any]:
    """Call ``fn(*args)`` in `size` processes, each a rank of an initialised gloo group.

    The processes are forks of a server that knows nothing of this one, so `fn` and all it needs
    are found by import: `fn` is a function at the top of a module that lies in `tests/` or one of
    its folders.

    Args:
        fn: What each rank runs; `torch.distributed` says which it is.
        size: The number of ranks.
        tmp_path: A folder of this world's own, each rank's current one.
        args: Arguments, the same for all ranks.
        timeout: Seconds for the world in all; ranks that are left then are killed.
        collective_timeout: Seconds that a rank waits for the others, `init_process_group`'s.
        may_die: Ranks that may end without a result, such as by a signal.

    Returns:
        Each rank's result, plain values and tensors, in the ranks' order; None of those that died.

    Raises:
        WorldError: With each rank's traceback, if any raised or was late.
    """
    context = forking()
    said: Any = context.Queue()
    port = _free_port()
    ranks = [
        context.Process(
            target=_be_rank,
            args=(fn, args, rank, size, port, collective_timeout, str(tmp_path), said),
            daemon=True,
        )
        for rank in range(size)
    ]
    results: dict[int, Any] = {}
    wrong: dict[int, str] = {}
    until = time.monotonic() + timeout
    for process in ranks:
        process.start()
    try:
        while len(results) + len(wrong) < size and time.monotonic() < until:
            _collect(said, results, wrong)
            for rank, process in enumerate(ranks):
                if not process.is_alive() and rank not in results and rank not in wrong:
                    _collect(said, results, wrong, seconds=1.0)  # what it said last
                    if rank in results or rank in wrong:
                        continue
                    if rank in may_die:
                        results[rank] = None
                    else:
                        wrong[rank] = f"ended with exit code {process.exitcode} and no result"
        for rank in range(size):
            if rank not in results and rank not in wrong:
                wrong[rank] = f"was still running after {timeout} s"
    finally:
        for process in ranks:
            process.join(5.0 if not wrong else 0.5)
            if process.is_alive():
                process.kill()
                process.join(5.0)
    if wrong:
        told = {rank: f"returned {results[rank]!r:.200}" for rank in results} | wrong
        raise WorldError(told)
    return [results[rank] for rank in range(size)]


def refused(fn: Callable[[], Any]) -> tuple[str, str, float]:
    """Return the kind and the message of the error that `fn` raises, and the seconds it took."""
    start = time.monotonic()
    try:
        fn()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def die() -> None:
    """End this process as if the machine had."""
    os.kill(os.getpid(), signal.SIGKILL)


def _be_rank(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    size: int,
    port: int,
    collective_timeout: float,
    folder: str,
    said: Any,
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        HESSCURV_CACHE="off",
    )
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo", timeout=datetime.timedelta(seconds=collective_timeout)
        )
        torch.manual_seed(0)
        said.put((rank, True, _plain(fn(*args))))
    except BaseException:
        said.put((rank, False, traceback.format_exc()))
    finally:
        said.close()
        said.join_thread()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _collect(
    said: Any, results: dict[int, Any], wrong: dict[int, str], seconds: float = 0.2
) -> None:
    try:
        rank, fine, value = said.get(timeout=seconds)
    except queue.Empty:
        return
    if fine:
        results[rank] = _tensors(value)
    else:
        wrong[rank] = value


def _plain(value: Any) -> Any:
    """Tensors as NumPy arrays: no memory is shared with a process that has ended."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value


def _tensors(value: Any) -> Any:
    if type(value).__name__ == "ndarray":
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: _tensors(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_tensors, value))
    return value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
