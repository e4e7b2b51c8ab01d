"""Eigenpairs of GGN and Fisher from per-sample rows: the plain call beside an explicit Gram matrix.

    python examples/benchmarks/sample_space.py [--data DIR] [--threads N] [--large] [--quick]

Each contender runs in a process of its own, in turns, so that peak memory is its own. Columns:

    matrix     Fisher or GGN of 3c3d (895,210 parameters), samples and rows
    method     "explicit rows": per-sample gradients by vmap, their Gram matrix, vectors, 20 lines;
               "eigsh", the plain call; "products", eigsh(method="block_krylov"); "overlap alone",
               `SampleSpace.overlap_by_k`, without eigenvectors
    seconds    median and quartiles, construction of the operator included
    residual   largest, relative to the eigenvalue
    memory     peak of the process above what it took before, GB

``--large`` adds 1000 pairs of the GGN of 500 images, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from models import build
from results import Report, parser, print_table
from torch import Tensor
from torch.func import functional_call, grad, vmap

import hesscurv


def problem(name: str, samples: int, data: str | None) -> Any:
    """Return the problem with so many samples in one batch."""
    found = build(name, None if data is None else Path(data))
    x = torch.cat([batch[0] for batch in found.batches])
    y = torch.cat([batch[1] for batch in found.batches])
    more = -(-samples // len(x))
    generator = torch.Generator().manual_seed(0)
    # Further images are the given ones with noise: what is timed does not depend on them.
    noise = torch.randn((more * len(x), *x.shape[1:]), generator=generator) * 0.1
    x, y = x.repeat(more, *[1] * (x.ndim - 1)) + noise, y.repeat(more)
    found.batches = [(x[:samples], y[:samples])]
    return found


def explicit_rows(given: Any, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues, vectors and residuals of the Fisher from rows that are held."""
    ((x, y),) = given.batches
    params = {n: p.detach() for n, p in given.model.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        out = functional_call(given.model, values, (sample.unsqueeze(0),))
        return given.loss_fn(out, target.unsqueeze(0))

    gradients = vmap(grad(loss), (None, 0, 0))(params, x, y)
    R_nD = torch.cat([g.flatten(1) for g in gradients.values()], 1).div_(len(x) ** 0.5)
    values, U = torch.linalg.eigh((R_nD @ R_nD.mT).double())
    values, U = values.flip(0)[:k], U.flip(1)[:, :k]
    V_Dk = R_nD.mT @ (U / values.sqrt()).float()
    residuals = (R_nD.mT @ (R_nD @ V_Dk) - V_Dk * values.float()).norm(dim=0)
    return values, V_Dk, residuals


def run(arguments: argparse.Namespace) -> None:
    """Run one contender, and print what it took."""
    given = problem(arguments.problem, arguments.samples, arguments.data)
    task = hesscurv.supervised(given.loss_fn)
    kind = {"fisher": hesscurv.EmpiricalFisherOperator, "ggn": hesscurv.GGNOperator}
    given.gradient()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, k, residual = time.perf_counter(), arguments.k, float("nan")
    rows = None
    if arguments.method == "explicit rows":
        values, _, residuals = explicit_rows(given, k)
        residual = float((residuals / values).max())
    else:
        H = kind[arguments.kind](given.model, task, given.batches)
        if arguments.method == "overlap alone":
            space = hesscurv.SampleSpace(H)
            weights = torch.cat([p.detach().abs().flatten() for p in given.model.parameters()])
            space.overlap_by_k(weights, range(1, k + 1))
            rows = len(space)
        else:
            options = {} if arguments.method == "eigsh" else {"method": "block_krylov"}
            pairs = hesscurv.eigsh(H, k, **options)
            residual = float((pairs.residuals / pairs.eigenvalues.abs()).max())
            rows = pairs.info.get("rows")
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    found = {"seconds": seconds, "residual": residual, "memory": peak, "rows": rows}
    print("RESULT " + json.dumps(found))


def contender(options: argparse.Namespace, case: tuple[Any, ...], method: str) -> dict[str, Any]:
    """Run a contender in a process of its own."""
    kind, name, samples, k = case
    command = [sys.executable, __file__, "--contender", "--problem", name, "--method", method]
    command += ["--kind", kind, "--samples", str(samples), "--k", str(k)]
    command += ["--threads", str(torch.get_num_threads())]
    command += ["--data", options.data] if options.data else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", help="a folder of CIFAR-10, as for products.py; made up without")
    options.add_argument("--rounds", type=int, default=3, help="of each contender; default 3")
    options.add_argument("--large", action="store_true", help="1000 pairs of the GGN as well")
    for name in ("problem", "method", "kind"):
        options.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("samples", "k"):
        options.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    options.add_argument("--contender", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.contender:
        run(arguments)
        return
    report = Report("sample_space", arguments)
    if arguments.quick:
        arguments.rounds = 1
    net = "small mlp" if arguments.quick else "3c3d"
    few, k = (50, 10) if arguments.quick else (200, 100)
    plan: list[tuple[tuple[Any, ...], tuple[str, ...]]] = [
        (("fisher", net, few, k), ("explicit rows", "eigsh", "products")),
        (("ggn", net, few, k), ("eigsh", "products")),
    ]
    if arguments.large:
        plan.append((("ggn", net, 500, 1000), ("eigsh", "overlap alone")))
    for case, methods in plan:
        # Products take minutes, and their time is not close to the others'.
        rounds = {m: 1 if m == "products" or case[3] == 1000 else arguments.rounds for m in methods}
        found: dict[str, list[dict[str, Any]]] = {m: [] for m in methods}
        for turn in range(arguments.rounds):
            for method in methods:
                if turn < rounds[method]:
                    found[method].append(contender(arguments, case, method))
        for method in methods:
            seconds = [f["seconds"] for f in found[method]]
            row = {
                "matrix": f"{case[0]}, {case[1]}, {case[2]} samples, k = {case[3]}",
                "method": method,
                "rows": found[method][0]["rows"],
                "seconds": statistics.median(seconds),
                "all seconds": seconds,
                "residual": found[method][0]["residual"],
                "memory": statistics.median(f["memory"] for f in found[method]),
            }
            report.rows.append(row)
    columns = ("matrix", "method", "rows", "seconds", "residual", "memory")
    print_table(columns, [[row[c] for c in columns] for row in report.rows])
    explicit, ours = report.rows[0], report.rows[1]
    ratio = ours["seconds"] / explicit["seconds"]
    report.judge(
        "Fisher, the plain call: at most 1.2 times an explicit Gram matrix",
        None if arguments.quick else ratio <= 1.2,
        f"{ratio:.2f} times; memory {ours['memory']:.2f} against {explicit['memory']:.2f} GB",
    )
    report.write()


if __name__ == "__main__":
    main()
