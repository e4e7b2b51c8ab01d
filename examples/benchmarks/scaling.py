"""Strong scaling over processes: products and basis work at 1 and 2 ranks, one core each.

    python examples/benchmarks/scaling.py [--quick]

The same work at one rank and at two, over gloo, each rank with one thread. What is measured, on the
rank that is slowest, median of `--rounds` worlds in turns:

    products      one block of 16 products with the Hessian of 3c3d (895,210 parameters) on 2
                  batches of 64 images: `product_rows`, with the exchange of vectors and the sum
    projection    orthogonalisation of that block against a basis of 400 vectors, split by rows
    rotation      400 basis vectors to 200 combinations of them
    solve         `eigsh`, k = 12 to tol 1e-2, all together

    speed-up      seconds at one rank over seconds at two; ideal is 2
    beside        the same at two ranks that do the whole work each, without a word between them:
                  what two cores of this machine do at best, as they share its memory and clock
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from results import Report, parser, print_table

BLOCK = 16
# Network, vectors in the basis, and in the solve: pairs.
SIZES = {False: ("3c3d", 400, 12), True: ("small convnet", 60, 10)}
PARTS = ("products", "projection", "rotation", "solve")
LEAST = 1.5


# -- in each rank -------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> dict[str, float]:
    """Time all parts on this rank, and return the seconds of the slowest rank."""
    import torch
    from models import build

    import hesscurv
    from hesscurv.distributed import Communicator
    from hesscurv.eigensolvers.krylov.basis import Basis
    from hesscurv.linalg.orthogonalization import orthonormalize_, orthonormalize_against_
    from hesscurv.storage.placement import Placement

    torch.set_num_threads(1)
    name, m, k = SIZES[job["quick"]]
    ranks = Communicator.of()
    problem = build(name, steps=0)
    ((inputs, targets),) = problem.batches
    halves = [(inputs, targets), (inputs.flip(0), targets.flip(0))]
    share = halves if ranks.size == 1 else [halves[ranks.rank]]
    H = hesscurv.HessianOperator(
        problem.model, hesscurv.supervised(problem.loss_fn), share, way="retained"
    )
    D = H.shape[0]
    rows = slice(*ranks.rows(D))
    across = ranks if ranks.size > 1 else None
    seconds: dict[str, float] = {}

    def timed(part: str, fn: Callable[[], Any]) -> None:
        found = []
        for _ in range(1 if part == "solve" else 4):
            ranks.barrier()
            start = time.perf_counter()
            fn()
            found.append(time.perf_counter() - start)
        own = torch.tensor(min(found[1:] or found), dtype=torch.float64)
        seconds[part] = float(ranks.max_(own))

    generator = torch.Generator().manual_seed(0)
    V_DB = torch.randn(BLOCK, D, generator=generator)[:, rows].mT
    timed("products", lambda: H.product_rows(V_DB))
    place = Placement("device", torch.float32, torch.device("cpu"), m, rows.stop - rows.start)
    basis = Basis(place, m // 2, m // 2, torch.float32)
    for _ in range(0, m, 50):
        part_BD = torch.randn(50, rows.stop - rows.start, generator=generator)
        basis.append(orthonormalize_(part_BD)[0][: m - basis.size])
    W_BD = V_DB.mT.contiguous()
    timed(
        "projection",
        lambda: orthonormalize_against_(W_BD.clone(), basis.slabs(), across=across),
    )
    Y_mk = torch.linalg.qr(torch.randn(m, m // 2, generator=generator, dtype=torch.float64)).Q

    def rotate() -> None:
        basis.rotate_(0, m, Y_mk)
        basis.size = m

    timed("rotation", rotate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        timed("solve", lambda: hesscurv.eigsh(H, k, tol=1e-2, block_size=BLOCK))
    return seconds


def be_rank(job: dict[str, Any]) -> None:
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    found = work(job)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# -- the run ------------------------------------------------------------------------------------


def run_world(size: int, quick: bool, *, talking: bool = True) -> dict[str, float]:
    """Start the ranks, wait for them, and return the seconds of the slowest."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(size):
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if not talking:
            place = {}
        command = [sys.executable, __file__, "--worker", json.dumps({"quick": quick})]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **place}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    told = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"a rank of {size} ended with an error")
    found = [json.loads(text.splitlines()[-1]) for text in told if text]
    return {part: max(by_part[part] for by_part in found) for part in PARTS}


def main() -> None:
    options = parse()
    if options.worker:
        be_rank(json.loads(options.worker))
        return
    report = Report("scaling", options)
    kinds: dict[str, Callable[[], dict[str, float]]] = {
        "one": lambda: run_world(1, options.quick),
        "two": lambda: run_world(2, options.quick),
        "beside": lambda: run_world(2, options.quick, talking=False),
    }
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(1 if options.quick else options.rounds):
        for kind in list(kinds) if number % 2 == 0 else reversed(kinds):
            rounds[kind].append(kinds[kind]())
            print(f"{kind}: {rounds[kind][-1]}", flush=True)
    for part in PARTS:
        seconds = {
            kind: statistics.median(found[part] for found in by_round)
            for kind, by_round in rounds.items()
        }
        row = {"part": part, "seconds_1": seconds["one"], "seconds_2": seconds["two"]}
        row["speed_up"] = seconds["one"] / seconds["two"]
        row["beside"] = 2 * seconds["one"] / seconds["beside"]
        row["rounds"] = len(rounds["one"])
        report.rows.append(row)
    print()
    print_table(
        ["part", "1 rank, s", "2 ranks, s", "speed-up", "beside"],
        [list(row.values())[:5] for row in report.rows],
    )
    print()
    for row in report.rows:
        # The small parts of a smoke test are all exchange, and miss.
        reached = row["speed_up"] >= LEAST
        target = f"{row['part']}: at least {LEAST} times as fast on 2 ranks"
        report.judge(target, reached, f"{row['speed_up']:.2f} of 2, {row['beside']:.2f} beside")
    report.write()


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)
    return options.parse_args()


if __name__ == "__main__":
    main()
