"""Pruning in training: once mask and eigenspace are stable, early, late, or never.

    python examples/benchmarks/prune_when_stable.py --data DIR     # CIFAR-10; about half an hour
    python examples/benchmarks/prune_when_stable.py --quick        # digits

3c3d is trained by SGD with momentum, a rate that falls to zero, and the same batches for all:

    never    as it is
    end      pruned after the last step; no training follows
    early    pruned at a fixed step, a twentieth of the way
    stable   pruned by `PruneWhenStable`, with its default bounds, measured every `--every` steps

all to the same sparsity by the same method, and trained to the end with their masks. Seconds are
those of the processor, measuring and pruning included; looking at the test images is not. Columns:
the step of pruning, test accuracy (mean over seeds, with the standard deviation), seconds, and of
these the monitor's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from models import three_c_three_d
from results import Report, parser, print_table
from samples import balanced, cifar10_part, digits
from torch import Tensor, nn

import hesscurv
from hesscurv.hooks import CurvatureMonitor, MonitorOptions, PruneWhenStable, every
from hesscurv.pruning import (
    PruningOptions,
    find_weights,
    mask_optimizer_state_,
    masks_of,
    prune_model,
)

STRATEGIES = ("never", "end", "early", "stable")
TASK = hesscurv.supervised(nn.CrossEntropyLoss())
Images = tuple[Tensor, Tensor]


def load(data: Path | None) -> tuple[Images, Images]:
    """Return training and test images: CIFAR-10's, or scikit-learn's digits."""
    if data is None:
        _, x, y = digits(None, 32, 3)
        test = balanced(y, 300)
        return (x[~test], y[~test]), (x[test], y[test])
    folder = data / "cifar-10-batches-py"
    if not folder.is_dir():
        raise SystemExit(f"--data: found no {folder.name} there")
    parts = [cifar10_part(folder / f"data_batch_{i}") for i in range(1, 6)]
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    x_test, y_test = cifar10_part(folder / "test_batch")
    return ((x - 0.5) / 0.25, y), ((x_test - 0.5) / 0.25, y_test)


def accuracy(model: nn.Module, images: Images) -> float:
    """Return the accuracy in per cent."""
    with torch.no_grad():
        right = [
            (model(x).argmax(1) == y).sum()
            for x, y in zip(images[0].split(500), images[1].split(500), strict=True)
        ]
    return 100 * float(sum(right)) / len(images[1])


def sparsity_of(model: nn.Module) -> float:
    """Return the fraction of the prunable weights that masks take out."""
    numel = sum(getattr(*weight).numel() for weight in find_weights(model).values())
    return sum(int((~mask).sum()) for mask in masks_of(model).values()) / numel


class Run:
    """One training run, pruned when its strategy says so."""

    def __init__(self, strategy: str, train: Images, seed: int, o: argparse.Namespace) -> None:
        torch.manual_seed(seed)
        self.model = three_c_three_d()
        self.train, self.o, self.strategy = train, o, strategy
        self.optimizer = torch.optim.SGD(self.model.parameters(), o.rate, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, o.steps)
        self.generator = torch.Generator().manual_seed(seed)
        # Curvature and pruning see other samples than the probe, all of the training set.
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(100 + seed))
        self.probe = [self.part(order[: o.samples])]
        self.calibration = [self.part(i) for i in order[o.samples :][:1000].split(250)]
        self.pruned_at: int | None = None
        self.seconds = self.measuring = 0.0

    def part(self, index: Tensor) -> Images:
        return self.train[0][index], self.train[1][index]

    def prune(self, step: int) -> None:
        self._prune(self.model, self.o.sparsity)
        mask_optimizer_state_(self.optimizer, self.model)
        self.pruned_at = step

    def _prune(self, model: nn.Module, sparsity: float) -> Any:
        return prune_model(
            model,
            TASK,
            self.calibration,
            sparsity,
            method=self.o.method,
            stages=self.o.stages,
            gradients_per_stage=self.o.gradients,
            options=PruningOptions(layer_losses=False),
        )

    def run(self) -> None:
        o, start = self.o, time.process_time()
        if self.strategy == "stable":
            monitor = CurvatureMonitor(
                self.model,
                TASK,
                self.probe,
                o.k,
                quantities="overlap",
                schedule=every(o.every),
                max_fraction=None,
                options=MonitorOptions(clock=time.process_time),
            )
            trigger = PruneWhenStable(
                monitor, sparsity=o.sparsity, prune=self._prune, optimizer=self.optimizer
            )
        for step in range(1, o.steps + 1):
            index = torch.randint(len(self.train[1]), (o.batch,), generator=self.generator)
            self.optimizer.zero_grad()
            TASK(self.model, self.part(index)).backward()
            self.optimizer.step()
            self.schedule.step()
            if self.strategy == "early" and step == o.steps // 20:
                self.prune(step)
            if self.strategy == "stable" and not trigger.done:
                monitor.step(step)
                trigger.step(step)
                if trigger.done:
                    self.pruned_at = step
        self.seconds = time.process_time() - start
        if self.strategy == "stable":
            self.measuring = sum(record["seconds"] for record in monitor.records)
            for s in trigger.signals:
                print("  " + ", ".join(f"{k} {v:.3g}" for k, v in s.items() if v is not None))


def rows_of(seed: int, train: Images, test: Images, o: argparse.Namespace) -> list[dict[str, Any]]:
    """Train by all strategies with one seed."""
    rows = []
    for strategy in ("never", "early", "stable"):
        run = Run(strategy, train, seed, o)
        run.run()
        rows.append(describe(run, strategy, seed, test))
        if strategy == "never":  # the same run, pruned at its end
            start = time.process_time()
            run.prune(o.steps)
            run.seconds += time.process_time() - start
            rows.append(describe(run, "end", seed, test))
    return rows


def describe(run: Run, strategy: str, seed: int, test: Images) -> dict[str, Any]:
    row = {
        "strategy": strategy,
        "seed": seed,
        "pruned_at": run.pruned_at,
        "accuracy": accuracy(run.model, test),
        "seconds": run.seconds,
        "measuring": run.measuring,
        "sparsity": sparsity_of(run.model),
    }
    print(*(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, metavar="DIR", help="has cifar-10-batches-py")
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--rate", type=float, default=0.02)
    options.add_argument("--sparsity", type=float, default=0.9)
    options.add_argument("--method", default="magnitude", help="of prune_model")
    options.add_argument("--stages", type=int, default=1)
    options.add_argument("--gradients", type=int, default=200, help="of a stage, where needed")
    options.add_argument("--every", type=int, default=25, help="steps between measurements")
    options.add_argument("--k", type=int, default=10, help="eigenpairs")
    options.add_argument("--samples", type=int, default=256, help="of the monitor's probe")
    options.add_argument("--seeds", type=int, default=2)
    o = options.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    if o.quick:
        o.steps, o.batch, o.every, o.samples, o.seeds, o.k = 40, 16, 4, 32, 1, 4
    elif o.data is None:
        options.error("expected --data, or --quick")
    report = Report("prune_when_stable", o)
    train, test = load(None if o.quick else o.data)
    for seed in range(o.seeds):
        report.rows += rows_of(seed, train, test, o)
    table = []
    for strategy in STRATEGIES:
        found = [row for row in report.rows if row["strategy"] == strategy]
        values = [row["accuracy"] for row in found]
        table.append(
            [
                strategy,
                ", ".join(str(row["pruned_at"]) for row in found),
                mean(values),
                pstdev(values),
                mean(row["seconds"] for row in found),
                mean(row["measuring"] for row in found),
            ]
        )
    print_table(["pruned", "at step", "test, %", "std", "seconds", "measuring"], table)
    by_name = {row[0]: row for row in table}
    pruned = all(row["pruned_at"] for row in report.rows if row["strategy"] == "stable")
    reached = [row["sparsity"] for row in report.rows if row["pruned_at"]]
    report.judge(
        f"all that is pruned has sparsity {o.sparsity:g}",
        all(abs(s - o.sparsity) < 1e-4 for s in reached),
        f"{len(reached)} models",
    )
    stable = [row["pruned_at"] for row in report.rows if row["strategy"] == "stable"]
    report.judge(
        "mask and eigenspace are stable before the end",
        pruned and all(at < o.steps for at in stable),
        f"at steps {stable} of {o.steps}",
    )
    report.judge(
        "pruned when stable: as accurate as pruned at the end, or more",
        None if o.quick or not pruned else by_name["stable"][2] >= by_name["end"][2],
        f"{by_name['stable'][2]:.2f} against {by_name['end'][2]:.2f}, early "
        f"{by_name['early'][2]:.2f}, dense {by_name['never'][2]:.2f}",
    )
    report.write()


if __name__ == "__main__":
    main()
