"""The part `products` of gpu.py: products in gradients beside other libraries' on a device.

Import it; it is not run.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from contenders import Counted, DoubleBackward, block_of_vectors, curvlinops_hessian, fastest_width
from gpu_peers import CompiledCurvlinops, eigenthings_hessian, time_limit, why_not
from gpu_problems import NAMES, make_problem
from models import Problem
from results import Report, print_table
from timing import interleaved, wait_for
from torch import Tensor

import hesscurv

AGREEMENT = 1e-3  # of the norm of a product, in float32
MOST_SECONDS = 60.0  # of a library's first product, compiling included
CHECKED = 2  # columns of a block that are compared: a block of GPT-2's takes 16 GB


def measure_products(report: Report, options: argparse.Namespace, where: str) -> None:
    """Time a product in gradients on every network; one row a network and block."""
    rounds, at_least = (2, 0.0) if options.quick else (5, 0.1)
    for name in options.problems or NAMES:
        problem = make_problem(name, options)
        task = hesscurv.supervised(problem.loss_fn)
        H = hesscurv.HessianOperator(problem.model, task, problem.batches)
        H.calibrate(expected=10_000)
        for b in (1, 4) if options.quick else (1, 32):
            row = compare(H, problem, b, options, rounds, at_least)
            report.rows.append({"part": "products", "device": where, **row})
            print(f"measured {name}, b = {b}", flush=True)
        del H, problem
        free_memory(options.device)
    show(report, where)
    for row in report.rows:
        theirs = {key: row[key] for key in ("curvlinops", "curvlinops compiled", "eigenthings")}
        for key, summary in theirs.items():
            detail = "not measured"
            if summary is not None:
                ours, median = row["hesscurv"]["median"], summary["median"]
                detail = f"{ours:.3g} against {median:.3g} gradients on {where}"
            judged = None
            if options.on_gpu and summary is not None:
                judged = row["hesscurv"]["median"] < summary["median"]
            report.judge(f"{row['problem']}, b={row['b']}: ahead of {key}", judged, detail)


def compare(
    H: hesscurv.HessianOperator,
    problem: Problem,
    b: int,
    options: argparse.Namespace,
    rounds: int,
    at_least: float,
) -> dict[str, Any]:
    """Time all contenders on one block of vectors, taking turns; all in full float32."""
    plain = Counted(DoubleBackward(problem))
    block = block_of_vectors(plain, b)
    block = block[:, 0] if b == 1 else block
    some = block if b == 1 else block[:, :CHECKED]
    expected = plain @ some
    single = block if b == 1 else block[:, 0].clone()

    gap = difference(H @ block, expected)
    if gap > AGREEMENT:
        raise AssertionError(f"{problem.name}, b={b}: hesscurv's products are off by {gap:.2g}")
    calls: dict[str, Callable[[], Any]] = {
        "gradient": problem.gradient,
        "hesscurv": lambda: H @ block,
        "double backward": lambda: plain @ single,
    }
    vectors = dict.fromkeys(calls, 1) | {"hesscurv": b}
    gaps: dict[str, float] = {}
    for name, operator in peers(problem, b, options).items():
        try:
            with time_limit(MOST_SECONDS):
                gaps[name] = difference(operator @ block, expected)
        except Exception as error:  # whatever a library fails by, the others are measured
            left_out(name, problem, b, error)
            free_memory(options.device)
            continue
        calls[name], vectors[name] = (lambda operator=operator: operator @ block), b
        if gaps[name] > AGREEMENT:
            print(f"{name}'s products are off by {gaps[name]:.1e} of their norm, b = {b}")

    def waiting(call: Callable[[], Any]) -> Callable[[], None]:
        def timed() -> None:
            call()
            wait_for(options.device)

        return timed

    timed = {name: waiting(call) for name, call in calls.items()}
    times = interleaved(timed, rounds, at_least=at_least)
    unit = times["gradient"]
    cost = {name: times[name].over(unit, vectors[name]).summary() for name in calls}
    way, at_once = H.choice(b)
    return {
        "problem": problem.name,
        "parameters": problem.size,
        "samples": problem.num_samples,
        "data": problem.data,
        "b": b,
        "gradient_seconds": unit.summary(),
        "hesscurv": cost["hesscurv"],
        "way": way,
        "way_at_once": at_once,
        "curvlinops": cost.get("curvlinops"),
        "curvlinops compiled": cost.get("curvlinops compiled"),
        "eigenthings": cost.get("eigenthings"),
        "double backward": cost["double backward"],
        "differences": gaps,
    }


def peers(problem: Problem, b: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the other libraries' operators that can be made, by name; say which cannot, and why.

    Both of curvlinops' multiply as many vectors at once as the uncompiled one is fastest with.
    """
    out: dict[str, Any] = {}
    try:
        peer = curvlinops_hessian(problem)
        width = b if options.quick or b == 1 else fastest_width(peer, b)
        out["curvlinops"] = Counted(peer, width)
    except Exception as error:
        left_out("curvlinops", problem, b, error)
    else:
        # Compiling takes a minute or so on a CPU: with --small once, to show that it runs.
        if not options.quick or (problem.name == "mlp" and b > 1):
            out["curvlinops compiled"] = Counted(CompiledCurvlinops(problem), width)
    try:
        out["eigenthings"] = Counted(eigenthings_hessian(problem))
    except Exception as error:
        left_out("eigenthings", problem, b, error)
    return out


def left_out(name: str, problem: Problem, b: int, error: Exception) -> None:
    print(f"{problem.name}, b = {b}: {name} left out: {why_not(error)}", flush=True)


def difference(got: Tensor, expected: Tensor) -> float:
    """Return the relative distance of the first products from the expected ones."""
    got = got if got.ndim == 1 else got[:, : expected.shape[1]]
    return float((got - expected).double().norm() / expected.double().norm())


def free_memory(device: str) -> None:
    """Give back what the last problem, or a failed attempt, has left on the device."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def show(report: Report, where: str) -> None:
    names = ["hesscurv", "curvlinops", "curvlinops compiled", "eigenthings", "double backward"]
    print(f"\ngradients per product, medians, on {where}")
    print_table(
        ["problem", "D", "samples", "b", "gradient ms", *names, "way"],
        [
            (
                *(row[key] for key in ("problem", "parameters", "samples", "b")),
                1e3 * row["gradient_seconds"]["median"],
                *(None if row[name] is None else row[name]["median"] for name in names),
                f"{row['way']}, {row['way_at_once']}",
            )
            for row in report.rows
        ],
    )
    print("skerch and SciPy have no products of their own: see eigsh.\n")
