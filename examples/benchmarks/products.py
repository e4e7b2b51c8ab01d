"""The cost of a Hessian-vector product, in gradients, beside curvlinops and plain double backward.

    python examples/benchmarks/products.py [--ways] [--data DIR] [--quick]

One gradient is a forward and a backward pass over the same batch; it is timed in the same rounds,
and the ratio to it is taken round by round. All contenders work on the same vectors in one process.
Before, their products are compared with double backward's: hesscurv's must agree to 1e-3, and where
curvlinops' do not, a line says so. (torch 2.13's jvp of jacrev, which it is built on, gets the
derivative by the weight of a LayerNorm wrong.) Columns of the first table, medians with quartiles:

    b                 vectors in a block
    gradient ms       milliseconds of a gradient
    hesscurv          gradients per product: HessianOperator, set up and calibrated for many
    way               what it chose, and how many vectors at once
    curvlinops        gradients per product: HessianLinearOperator on the same block ...
    at once           ... cut into the number of vectors that it is fastest with
    double backward   gradients per product: the graph built anew for every vector

Of the second, what hesscurv's figures leave out, since many products share it:

    construct s       seconds to construct the operator, its checks of model and data included
    calibrate s       seconds to choose the way; once, remembered between runs
    set-up            gradients to set a block's way up; once for all products with the same weights

``--ways`` adds a table with the cost of every way that hesscurv has.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from contenders import (
    Counted,
    DoubleBackward,
    block_of_vectors,
    curvlinops_hessian,
    fastest_width,
    is_installed,
)
from models import Problem, build
from results import Report, parser, print_table
from timing import interleaved

import hesscurv

PROBLEMS = ("mlp", "3c3d", "resnet20", "gpt")
QUICK_PROBLEMS = ("small mlp", "small convnet")
TARGETS = {"mlp": ((32,), 1.0), "3c3d": ((1, 32), 1.4)}  # blocks, most gradients per product
AGREEMENT = 1e-3


def measure(problem: Problem, blocks: tuple[int, ...], options: Any) -> list[dict[str, Any]]:
    """Time all contenders on one problem; one row a block."""
    task = hesscurv.supervised(problem.loss_fn)
    H, construct = timed(lambda: hesscurv.HessianOperator(problem.model, task, problem.batches))
    _, calibrate = timed(lambda: H.calibrate(expected=10_000))
    peer = curvlinops_hessian(problem) if is_installed("curvlinops") else None
    plain = Counted(DoubleBackward(problem))
    at_once: dict[int, int] = {}
    gaps: dict[int, float] = {}

    single = block_of_vectors(H, 1)[:, 0]
    calls: dict[str, Any] = {"gradient": problem.gradient}
    calls["double backward"] = lambda: plain @ single
    vectors_in = {"gradient": 1, "double backward": 1}
    for b in blocks:
        block = single if b == 1 else block_of_vectors(H, b)
        expected = plain @ block
        gap = difference(H @ block, expected)
        assert gap <= AGREEMENT, f"{problem.name}: products are off by {gap:.2g}"
        calls[f"hesscurv {b}"] = lambda block=block: H @ block
        vectors_in[f"hesscurv {b}"] = b
        if peer is not None:
            at_once[b] = fastest_width(peer, b)
            chunked = Counted(peer, at_once[b])
            gaps[b] = difference(chunked @ block, expected)
            calls[f"curvlinops {b}"] = lambda chunked=chunked, block=block: chunked @ block
            vectors_in[f"curvlinops {b}"] = b

    times = interleaved(calls, options.rounds, at_least=options.at_least)
    unit = times["gradient"]
    cost = {name: times[name].over(unit, vectors_in[name]) for name in calls}
    rows = []
    for b in blocks:
        way, vectors = H.choice(b)
        rows.append(
            {
                "problem": problem.name,
                "parameters": problem.size,
                "samples": problem.num_samples,
                "data": problem.data,
                "b": b,
                "gradient_seconds": unit.summary(),
                "hesscurv": cost[f"hesscurv {b}"].summary(),
                "way": way,
                "way_at_once": vectors,
                "curvlinops": cost[f"curvlinops {b}"].summary() if peer is not None else None,
                "curvlinops_at_once": at_once.get(b),
                "curvlinops_difference": gaps.get(b),
                "double_backward": cost["double backward"].summary(),
                "construct_seconds": construct,
                "calibrate_seconds": calibrate,
                "setup_gradients": setup_seconds(H, problem, way) / unit.median,
                "shown": cost,
            }
        )
    return rows


def measure_ways(problem: Problem, blocks: tuple[int, ...], options: Any) -> list[dict[str, Any]]:
    """Time every way of hesscurv's on one problem, in gradients per product."""
    task = hesscurv.supervised(problem.loss_fn)
    calls: dict[str, Any] = {"gradient": problem.gradient}
    for way in hesscurv.HessianOperator.ways:
        H = hesscurv.HessianOperator(problem.model, task, problem.batches, way=way)
        try:
            H @ block_of_vectors(H, blocks[-1])
        except (RuntimeError, NotImplementedError) as error:
            print(f"{problem.name}: way {way!r} is not available: {str(error).splitlines()[0]}")
            continue
        for b in blocks:
            block = block_of_vectors(H, b)
            calls[f"{way} {b}"] = lambda H=H, block=block: H @ block
    times = interleaved(calls, options.rounds, at_least=options.at_least)
    return [
        {
            "problem": problem.name,
            "way": way,
            **{f"b={b}": times[f"{way} {b}"].over(times["gradient"], b).summary() for b in blocks},
        }
        for way in hesscurv.HessianOperator.ways
        if f"{way} {blocks[0]}" in times
    ]


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative distance of a block of products from double backward's."""
    return float((got - expected).double().norm() / expected.double().norm())


def setup_seconds(H: Any, problem: Problem, way: str) -> float:
    """Return the seconds to set one way up, as is done after every change of the weights."""
    local, batch = H.products.local, problem.batches[0]
    return statistics.median(timed(lambda: local.prepare(batch, way))[1] for _ in range(3))


def timed(fn: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    out = fn()
    return out, time.perf_counter() - start


def judge(report: Report) -> None:
    """Print the targets and whether each row reaches them."""
    for row in report.rows:
        b, ours = row["b"], row["hesscurv"]["median"]
        where = f"{row['problem']}, b={b}"
        blocks, most = TARGETS.get(row["problem"], ((), 0.0))
        if b in blocks:
            target = f"at most {most:.1f} gradients a product on {where}"
            report.judge(target, ours <= most, f"{ours:.2f}")
        target = f"ahead of curvlinops on {where}"
        if row["curvlinops"] is None:
            report.judge(target, None, "curvlinops is not installed")
        else:
            theirs = row["curvlinops"]["median"]
            report.judge(target, ours < theirs, f"{ours:.2f} against {theirs:.2f} gradients")


def show(rows: list[dict[str, Any]]) -> None:
    headers = ["problem", "D", "b", "gradient ms", "hesscurv", "way", "curvlinops", "at once"]
    print_table(
        [*headers, "double backward"],
        [
            (
                row["problem"],
                row["parameters"],
                row["b"],
                1e3 * row["gradient_seconds"]["median"],
                row["shown"][f"hesscurv {row['b']}"],
                f"{row['way']}, {row['way_at_once']}",
                row["shown"].get(f"curvlinops {row['b']}"),
                row["curvlinops_at_once"],
                row["shown"]["double backward"],
            )
            for row in rows
        ],
    )
    for row in rows:
        gap = row["curvlinops_difference"]
        if gap is not None and gap > AGREEMENT:
            where = f"{row['problem']}, b={row['b']}"
            print(f"curvlinops' products are off by {gap:.1e} of their norm on {where}")
    print()
    print_table(
        ["problem", "b", "construct s", "calibrate s", "set-up"],
        [
            (
                row["problem"],
                row["b"],
                row["construct_seconds"],
                row["calibrate_seconds"],
                row["setup_gradients"],
            )
            for row in rows
        ],
    )
    print()


def main() -> None:
    options = parse()
    os.environ["HESSCURV_CACHE"] = "off"  # so that calibration is measured, not recalled
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report("products", options)
    names = options.problems or (QUICK_PROBLEMS if options.quick else PROBLEMS)
    blocks = (1, 4) if options.quick else (1, 32)
    ways: list[dict[str, Any]] = []
    for name in names:
        problem = build(name, options.data, steps=5 if options.quick else None)
        report.rows += measure(problem, blocks, options)
        if options.ways:
            ways += measure_ways(problem, blocks, options)
        print(f"measured {name} on {problem.data}", flush=True)
    print()
    show(report.rows)
    if ways:
        columns = [f"b={b}" for b in blocks]
        table = [(w["problem"], w["way"], *(w[c]["median"] for c in columns)) for w in ways]
        print_table(["problem", "way", *columns], table)
        print()
    judge(report)
    for row in report.rows:
        del row["shown"]
        row["ways"] = [w for w in ways if w["problem"] == row["problem"]] or None
    report.write()


def parse() -> Any:
    options = parser(__doc__)
    options.add_argument("--problems", nargs="+", metavar="NAME", help=f"default {PROBLEMS}")
    options.add_argument("--ways", action="store_true", help="time every way of hesscurv's too")
    options.add_argument("--data", type=Path, help="folder with MNIST/raw, cifar-10-batches-py")
    options.add_argument("--rounds", type=int, help="default 5, or 2 with --quick")
    out = options.parse_args()
    out.rounds = out.rounds or (2 if out.quick else 5)
    out.at_least = 0.005 if out.quick else 0.1
    return out


if __name__ == "__main__":
    main()
