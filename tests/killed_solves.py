"""Solve again and again in processes that are killed at random moments; run by test_checkpoint.py.

    python killed_solves.py FOLDER SEED KILLS HOW

Each solve runs in a fork of this process, which has imported torch but computed nothing. The first
KILLS forks are killed a random number of products and milliseconds on, or, where HOW is "crash", at
a random one of the calls by which files change; the last is left to end.
Prints JSON: eigenvalues and vectors' norms as hexadecimal floats, how many forks were killed at
work, and the products that all of them did together.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
import zlib
from pathlib import Path

import torch
from torch import nn

import hesscurv

K, BLOCK = 20, 4


class Slow(hesscurv.LinearOperator):
    """An operator that writes down its products, and takes its time for each block."""

    def __init__(self, operator, log):
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self.operator, self.log = operator, log
        self.objective, self.layout = operator.objective, operator.layout

    def _matmat(self, vectors_DB):
        # First of all, or a block that is killed at work would not count as lost.
        with open(self.log, "a") as file:
            file.write(f"{vectors_DB.shape[1]}\n")
        time.sleep(0.02)
        return self.operator @ vectors_DB

    def expect(self, products):
        # Without it the way is chosen by what this process has computed, after 24 products.
        self.operator.expect(products)

    def settings(self):
        return self.operator.settings()

    def adopt(self, settings):
        self.operator.adopt(settings)


def problem(log):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
    model.append(nn.Linear(12, 4))
    batches = [(torch.randn(30, 16), torch.randint(4, (30,))) for _ in range(2)]
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    return Slow(hesscurv.HessianOperator(model, task, batches), log)


def solve(folder, checkpoint=True):
    H = problem(folder / "log")
    warnings.simplefilter("error")
    pairs = hesscurv.eigsh(
        H,
        K,
        tol=1e-4,
        block_size=BLOCK,
        max_basis=K + 6 * BLOCK,  # so small that there are restarts
        checkpoint=folder / "work" if checkpoint else None,
    )
    values = [float(x).hex() for x in pairs.eigenvalues]
    norms = [float(x).hex() for x in pairs.eigenvectors.double().norm(dim=0)]
    (folder / "result.json").write_text(
        json.dumps([values, norms, pairs.num_matvecs, pairs.info["restarts"]])
    )


def products(folder):
    log = folder / "log"
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def crash_at(count):
    """Kill this process in place of the call number `count` of those by which files change."""
    left = [count]

    def crashing(fn):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return fn(*args, **kwargs)

        return call

    # Checksums are taken after each write to the journal, and after each reading of it.
    for module, names in ((os, ("replace", "unlink", "fsync", "open")), (zlib, ("crc32",))):
        for name in names:
            setattr(module, name, crashing(getattr(module, name)))


def run(folder, kill_at=None, crash=None):
    """Fork a solve, kill it so many products and seconds on; return whether it was at work."""
    before = products(folder)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if crash is not None:
                crash_at(crash)
            solve(folder)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    if kill_at is None:
        _, status = os.waitpid(child, 0)
    else:
        count, seconds = kill_at
        ended = (0, 0)
        while products(folder) < before + count and ended[0] == 0:
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)
        if ended[0] == 0:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        status = ended[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit("a solve failed by itself")
    return os.WIFSIGNALED(status)


def main():
    folder, seed, kills, how = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    rng = random.Random(seed)
    killed, done = 0, []
    while killed < kills:
        if how == "crash":
            was_killed = run(folder, crash=rng.randrange(1, 40))
        else:
            was_killed = run(folder, (rng.randrange(20), rng.uniform(0.0, 0.04)))
        killed += was_killed
        done.append(products(folder))
        if not was_killed:
            break
    run(folder)
    values, norms, count, restarts = json.loads((folder / "result.json").read_text())
    print(
        json.dumps(
            {
                "values": values,
                "norms": norms,
                "num_matvecs": count,
                "restarts": restarts,
                "killed": killed,
                "all_products": products(folder),
                "products_at_kills": done,
            }
        )
    )


if __name__ == "__main__":
    main()
