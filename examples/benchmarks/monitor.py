"""CurvatureMonitor: products of a refresh and its error, the share of time it keeps, its cost.

    python examples/benchmarks/monitor.py --data DIR      # CIFAR-10 in DIR; about ten minutes
    python examples/benchmarks/monitor.py --quick         # digits, a small net

Parts (`--parts`):

    refresh   3c3d in training, the top 10 pairs of the Hessian on 64 images: products for each
              eigenvector of refreshes 10 steps apart, and the largest relative error of an
              eigenvalue against a cold solve of the same weights to tol 1e-3. The steps between are
              the paper's, SGD of rate 0.0226 with batches of 128 (`--rate`, `--momentum` and
              `--batch` set others), after 300 steps with momentum that come faster to that stage.
    share     a conv net in training, measured every 10 steps where max_fraction=.1 allows: the
              share of the training time that measurements took.
    presets   the conv net: products and time of a refresh by preset, in training steps.
    pyhessian the conv net, its top 10 eigenvalues three times 10 steps apart: PyHessian's, at its
              default settings, beside a refresh of the monitor, and the errors of both.

Seconds are those of the processor, so that other processes do not count.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from contenders import is_installed
from models import RECIPES, Problem
from results import Report, parser, print_table
from samples import balanced
from torch import nn

import hesscurv
from hesscurv.hooks import CurvatureMonitor, MonitorOptions, every

K = 10
APART = 10


class Training:
    """A network of `RECIPES` in training, step by step, and samples that it does not see."""

    def __init__(self, name: str, folder: Path | None) -> None:
        recipe = RECIPES[name]
        torch.manual_seed(0)
        self.model = recipe.model()
        source, inputs, targets = recipe.data(folder)
        chosen = balanced(targets, recipe.samples)
        self.problem = Problem(
            name, self.model, nn.CrossEntropyLoss(), [(inputs[chosen], targets[chosen])], source
        )
        self.task = hesscurv.supervised(self.problem.loss_fn)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), recipe.lr, momentum=recipe.momentum
        )
        self._seen, self._batch = (inputs[~chosen], targets[~chosen]), recipe.batch
        self._generator = torch.Generator().manual_seed(1)
        self.step = 0

    def go_on_with(self, rate: float, momentum: float, batch: int) -> None:
        """Train by other settings from here on."""
        self.optimizer.param_groups[0] |= {"lr": rate, "momentum": momentum}
        self._batch = batch

    def steps(self, count: int) -> Iterator[int]:
        """Train, and yield the number of steps so far after each."""
        inputs, targets = self._seen
        self.model.train()
        for _ in range(count):
            part = torch.randint(len(inputs), (self._batch,), generator=self._generator)
            self.optimizer.zero_grad()
            self.task(self.model, (inputs[part], targets[part])).backward()
            self.optimizer.step()
            self.step += 1
            yield self.step

    def monitor(self, **options: object) -> CurvatureMonitor:
        options = {"optimizer": self.optimizer} | options
        own = MonitorOptions(clock=time.process_time)
        return CurvatureMonitor(
            self.model, self.task, self.problem.batches, K, options=own, **options
        )


def compare_refresh(report: Report, options: argparse.Namespace) -> None:
    training = Training("small convnet" if options.quick else "3c3d", options.data)
    monitor = training.monitor(schedule=every(APART))
    for _ in training.steps(50 if options.quick else 300):
        pass
    H = hesscurv.HessianOperator(training.model, training.task, training.problem.batches)
    if not options.quick:
        training.go_on_with(options.rate, options.momentum, options.batch)
    rows = []
    first = monitor.measure(training.step)
    say(training, first, None)
    for step in training.steps(APART * (3 if options.quick else options.refreshes)):
        record = monitor.step(step)
        if record is None:
            continue
        start = time.process_time()
        cold = hesscurv.eigsh(H, K, tol=1e-3)
        seconds = time.process_time() - start
        exact = cold.eigenvalues
        error = (torch.tensor(record["eigenvalues"]) - exact).abs() / exact.abs()
        say(training, record, float(error.max()))
        rows.append(
            {
                "part": "refresh",
                "net": training.problem.name,
                "data": training.problem.data,
                "step": step,
                "products per eigenvector": record["num_matvecs"] / K,
                "converged": record["converged"],
                "largest error": float(error.max()),
                "seconds": record["seconds"],
                "cold products per eigenvector": cold.num_matvecs / K,
                "cold seconds": seconds,
            }
        )
        H.release()
    report.rows += rows
    columns = [key for key in rows[0] if key not in ("part", "net", "data")]
    print_table(columns, [[row[key] for key in columns] for row in rows])
    products = max(row["products per eigenvector"] for row in rows)
    error = max(row["largest error"] for row in rows)
    report.judge("at most 3 products per eigenvector", products <= 3, f"{products:.2g} at most")
    report.judge("eigenvalues within 1 % of a cold solve", error <= 0.01, f"{error:.2%} at most")


def measure_share(report: Report, options: argparse.Namespace) -> None:
    training = Training("small convnet" if options.quick else "convnet", options.data)
    limit = 0.1
    monitor = training.monitor(schedule=every(APART), max_fraction=limit)
    start = time.process_time()
    until = start + (8 if options.quick else options.seconds)
    for step in training.steps(10**9):
        monitor.step(step)
        if time.process_time() > until:
            break
    total = time.process_time() - start
    measuring = sum(record["seconds"] for record in monitor.records)
    share = measuring / (total - measuring)
    steps = [record["step"] for record in monitor.records]
    report.rows.append(
        {
            "part": "share",
            "net": training.problem.name,
            "steps": training.step,
            "measured at": steps,
            "first seconds": monitor.records[0]["seconds"],
            "refresh seconds": [record["seconds"] for record in monitor.records[1:]],
            "share": share,
        }
    )
    print(f"{training.step} steps, measured after {steps}")
    print(f"first {monitor.records[0]['seconds']:.3g} s, all {measuring:.3g} s of {total:.3g} s")
    report.judge(
        f"measurements take at most {limit:.0%} of the training time",
        len(steps) > 1 and share <= limit,
        f"{share:.2%}, {len(steps)} measurements",
    )


def price_presets(report: Report, options: argparse.Namespace) -> None:
    training = Training("small convnet" if options.quick else "convnet", options.data)
    monitors = {name: training.monitor(quantities=name) for name in ("cheap", "overlap", "full")}
    start = time.process_time()
    for _ in training.steps(100):
        pass
    step_seconds = (time.process_time() - start) / 100
    taken: dict[str, list[dict]] = {name: [] for name in monitors}
    for _ in range(4):
        for name, monitor in monitors.items():
            taken[name].append(monitor.measure(training.step))
        for _ in training.steps(APART):
            pass
    rows = []
    for name, (first, *refreshes) in taken.items():
        seconds = statistics.median(record["seconds"] for record in refreshes)
        rows.append(
            {
                "part": "presets",
                "net": training.problem.name,
                "preset": name,
                "first products": first["num_matvecs"],
                "first seconds": first["seconds"],
                "products": statistics.median(record["num_matvecs"] for record in refreshes),
                "seconds": seconds,
                "in steps": seconds / step_seconds,
            }
        )
    report.rows += rows
    columns = [key for key in rows[0] if key not in ("part", "net")]
    print_table(columns, [[row[key] for key in columns] for row in rows])


def compare_pyhessian(report: Report, options: argparse.Namespace) -> None:
    if not is_installed("pyhessian"):
        print("skipped: pip install pyhessian")
        return
    training = Training("small convnet" if options.quick else "convnet", options.data)
    for _ in training.steps(20 if options.quick else 100):
        pass
    monitor = training.monitor(quantities="eigenvalues")
    monitor.measure(training.step)
    H = hesscurv.HessianOperator(training.model, training.task, training.problem.batches)
    rows = []
    for _ in range(1 if options.quick else 3):
        for _ in training.steps(APART):
            pass
        record = monitor.measure(training.step)
        exact = hesscurv.eigsh(H, K, tol=1e-5).eigenvalues.double()
        theirs, products, seconds = pyhessian_eigenvalues(training)
        ours = torch.tensor(record["eigenvalues"]).double()
        rows.append(
            {
                "part": "pyhessian",
                "net": training.problem.name,
                "step": training.step,
                "products": record["num_matvecs"],
                "seconds": record["seconds"],
                "error": float(((ours - exact) / exact).abs().max()),
                "PyHessian's products": products,
                "its seconds": seconds,
                "its error": float(((theirs - exact) / exact).abs().max()),
            }
        )
        H.release()
    report.rows += rows
    columns = [key for key in rows[0] if key not in ("part", "net")]
    print_table(columns, [[row[key] for key in columns] for row in rows])
    times = statistics.median(row["its seconds"] / row["seconds"] for row in rows)
    errors = [max(row[key] for row in rows) for key in ("error", "its error")]
    report.judge(
        "a refresh takes less time than PyHessian, with a smaller error",
        None if options.quick else times > 1 and errors[0] < errors[1],
        f"{times:.3g} times as fast; largest errors {errors[0]:.2g} and {errors[1]:.2g}",
    )


def pyhessian_eigenvalues(training: Training) -> tuple[torch.Tensor, int, float]:
    """Return PyHessian's eigenvalues (K,), largest magnitude first, its products and seconds."""
    theirs = importlib.import_module("pyhessian.hessian")  # the class of this name hides it

    count = 0
    product = theirs.hessian_vector_product

    def counted(*arguments: object) -> object:
        nonlocal count
        count += 1
        return product(*arguments)

    # A copy: it leaves gradients behind, and the model in eval mode.
    model, ((x, y),) = copy.deepcopy(training.model), training.problem.batches
    theirs.hessian_vector_product = counted
    try:
        start = time.process_time()
        solver = theirs.hessian(model, training.problem.loss_fn, data=(x, y), cuda=False)
        found = torch.tensor(solver.eigenvalues(top_n=K)[0]).double()
        seconds = time.process_time() - start
    finally:
        theirs.hessian_vector_product = product
    return found[found.abs().argsort(descending=True)], count, seconds


def say(training: Training, record: dict, error: float | None) -> None:
    text = "" if error is None else f", largest error {error:.2%}"
    print(
        f"step {training.step}: {record['num_matvecs']} products, {record['converged']} of {K} "
        f"converged, sharpness {record['sharpness']:.4g}, {record['seconds']:.3g} s{text}",
        flush=True,
    )


PARTS: dict[str, Callable[[Report, argparse.Namespace], None]] = {
    "refresh": compare_refresh,
    "share": measure_share,
    "presets": price_presets,
    "pyhessian": compare_pyhessian,
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, metavar="DIR", help="has MNIST/raw and CIFAR-10")
    options.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options.add_argument("--refreshes", type=int, default=4, help="of 3c3d; default 4")
    options.add_argument("--rate", type=float, default=0.0226, help="of 3c3d; default 0.0226")
    options.add_argument("--momentum", type=float, default=0.0, help="of 3c3d; default 0")
    options.add_argument("--batch", type=int, default=128, help="of 3c3d; default 128")
    options.add_argument("--seconds", type=float, default=150.0, help="of the share; default 150")
    options = options.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
    report = Report("monitor", options)
    for part in options.parts:
        print(f"\n{part}")
        PARTS[part](report, options)
    report.write()


if __name__ == "__main__":
    main()
