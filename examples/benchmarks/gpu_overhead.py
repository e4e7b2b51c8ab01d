"""The part `overhead` of gpu.py: what the optimizer's wrapper and the monitor cost in training.

Import it; it is not run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from gpu_problems import gpt2, imagenet_resnet18, random_images, random_tokens
from gpu_products import free_memory
from models import TokenLoss
from results import Report, print_table
from timing import wait_for
from torch import nn

import hesscurv
from hesscurv.hooks import CurvatureMonitor
from hesscurv.optim import PreconditionedOptimizer

MOST_SHARE = 0.05
AT_ONCE = 5  # steps in one turn
KINDS = ("plain", "optimizer", "monitor")


@dataclass
class Network:
    """How to make one more copy of a network in training, and the batches of all copies."""

    name: str
    model: Callable[[], nn.Module]
    loss_fn: nn.Module
    base: Callable[[Any], torch.optim.Optimizer]
    batches: list[Any]
    unseen: list[Any]  # for curvature: the optimizer's, the first of them the monitor's


@dataclass
class Training:
    """A network in training: plain, with the wrapped optimizer, or watched by the monitor."""

    network: Network
    kind: str
    seconds: list[float] = field(default_factory=list)  # of each turn, measuring included
    measuring: list[float] = field(default_factory=list)  # of these
    measured_at: list[int] = field(default_factory=list)  # the step at the end of such turns

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.network.model().train()
        self.task = hesscurv.supervised(self.network.loss_fn)
        self.optimizer: Any = self.network.base(self.model.parameters())
        self.monitor: CurvatureMonitor | None = None
        if self.kind == "optimizer":
            self.optimizer = PreconditionedOptimizer(
                self.optimizer, self.model, self.task, self.network.unseen
            )
        elif self.kind == "monitor":
            self.monitor = CurvatureMonitor(
                self.model, self.task, self.network.unseen[:1], optimizer=self.optimizer
            )
        self.steps = 0

    def take_steps(self, count: int) -> None:
        for _ in range(count):
            batch = self.network.batches[self.steps % len(self.network.batches)]
            self.optimizer.zero_grad()
            self.task(self.model, batch).backward()
            self.optimizer.step()
            if self.monitor is not None:
                self.monitor.step(self.steps)
            self.steps += 1

    def take_turn(self, device: str) -> None:
        """Take some steps by the clock."""
        before = self.seconds_of_measuring()
        wait_for(device)
        start = time.perf_counter()
        self.take_steps(AT_ONCE)
        wait_for(device)
        self.seconds.append(time.perf_counter() - start)
        self.measuring.append(self.seconds_of_measuring() - before)
        if self.measuring[-1] > 0:
            self.measured_at.append(self.steps)

    def seconds_of_measuring(self) -> float:
        """Return the seconds of all refreshes, or measurements, so far."""
        if self.kind == "optimizer":
            return self.optimizer.report().refresh_seconds
        if self.monitor is not None:
            return sum(record["seconds"] for record in self.monitor.records)
        return 0.0


def measure_overhead(report: Report, options: argparse.Namespace, where: str) -> None:
    """Train ResNet-18 and GPT-2 without and with each of both, taking turns."""
    for number, network in enumerate((resnet18_network, gpt2_network)):
        until = time.perf_counter() + 0.9 * 60 * options.minutes / 2
        if options.quick:
            until = time.perf_counter() + 10
        rows = compare(network(options), options, until)
        report.rows += [{"part": "overhead", "device": where, **row} for row in rows]
        free_memory(options.device)
        print(f"trained network {number + 1} of 2", flush=True)
    show(report, where)
    for row in report.rows:
        what = f"{row['network']}: the {row['kind']} at default settings"
        report.judge(
            f"{what} takes at most {MOST_SHARE:.0%} of a step between measurements",
            row["between"] <= MOST_SHARE if options.on_gpu else None,
            f"{row['between']:.2%} on {where}",
        )
        steady = row["steady"]
        detail = "no second refresh came: let it run for longer by --minutes"
        if steady is not None:
            detail = (
                f"{steady:.2%} on {where}: a measurement takes {row['measuring_seconds']:.3g} s "
                f"every {row['interval']:.0f} steps"
            )
        report.judge(
            f"{what} takes at most {MOST_SHARE:.0%} of a long training, measurements included",
            steady <= MOST_SHARE if options.on_gpu and steady is not None else None,
            detail,
        )


def compare(network: Network, options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """Let the trainings take turns until a time; one row for each that is not plain."""
    with warnings.catch_warnings():
        # Little to gain, or not converged in the products allowed: the cost is the same.
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        warnings.simplefilter("ignore", hesscurv.optim.CurvatureWarning)
        trainings = {kind: Training(network, kind) for kind in KINDS}
        trainings["plain"].take_steps(AT_ONCE)  # kernels are chosen, memory is taken
        shuffle = random.Random(0).shuffle
        rounds = 0
        while time.perf_counter() < until or rounds < 3:
            order = list(trainings.values())
            shuffle(order)
            for training in order:
                training.take_turn(options.device)
            rounds += 1
    plain = trainings["plain"].seconds
    return [summary(trainings[kind], plain) for kind in KINDS[1:]]


def summary(training: Training, plain: list[float]) -> dict[str, Any]:
    """Return the overhead of a training, in parts of a plain one's seconds, round by round.

    between: the median of rounds without what measuring took; whole: all seconds of the run, the
    first measurement and the dense ones after it included; steady: between, and one later
    measurement in an interval: the monitor's schedule after its dense phase, the refreshes' own.
    """
    rounds = list(zip(training.seconds, training.measuring, plain, strict=True))[1:]
    between = statistics.median((mine - spent) / theirs for mine, spent, theirs in rounds) - 1
    taken = [seconds for seconds in training.measuring if seconds > 0]
    per_step = statistics.median(plain) / AT_ONCE
    later = statistics.median(taken[1:]) if len(taken) > 1 else None
    interval: float | None = None
    if training.monitor is not None:
        interval = training.monitor.schedule.sparse
    elif len(training.measured_at) > 1:
        at = training.measured_at
        interval = statistics.median(b - a for a, b in pairwise(at))
        # A refresh pays for the interval that it begins: the last one's has not ended.
        later = statistics.median(taken[1:-1] or taken[:1])
    steady = None
    if later is not None and interval is not None:
        steady = between + later / (interval * per_step)
    return {
        "network": training.network.name,
        "kind": training.kind,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "steps": training.steps,
        "rounds": len(plain),
        "plain_step_seconds": per_step,
        "between": between,
        "whole": sum(training.seconds) / sum(plain) - 1,
        "measurements": len(taken),
        "first_seconds": taken[0] if taken else None,
        "measuring_seconds": later,
        "interval": interval,
        "steady": steady,
    }


def resnet18_network(options: argparse.Namespace) -> Network:
    count, batches = (4, 2) if options.quick else (64, 8)
    torch.manual_seed(1)
    return Network(
        "ResNet-18",
        lambda: imagenet_resnet18(options),
        nn.CrossEntropyLoss(),
        lambda params: torch.optim.SGD(params, 0.01, momentum=0.9, weight_decay=1e-4),
        [random_images(options, count) for _ in range(batches)],
        [random_images(options, count) for _ in range(1 if options.quick else 4)],
    )


def gpt2_network(options: argparse.Namespace) -> Network:
    count, batches = (2, 2) if options.quick else (16, 8)
    torch.manual_seed(1)
    return Network(
        "GPT-2",
        lambda: gpt2(options),
        TokenLoss(),
        lambda params: torch.optim.AdamW(params, 3e-4, betas=(0.9, 0.95), weight_decay=0.1),
        [random_tokens(options, count) for _ in range(batches)],
        [random_tokens(options, count) for _ in range(1 if options.quick else 4)],
    )


def show(report: Report, where: str) -> None:
    def percent(value: float | None) -> float | None:
        return None if value is None else 100 * value

    print(f"\noverhead in percent of a training without, on {where}")
    columns = ["network", "kind", "steps", "ms a step", "between", "whole", "measurements"]
    print_table(
        [*columns, "first s", "later s", "every", "steady"],
        [
            (
                *(row[key] for key in ("network", "kind", "steps")),
                1e3 * row["plain_step_seconds"],
                *(percent(row[key]) for key in ("between", "whole")),
                *(row[key] for key in ("measurements", "first_seconds")),
                *(row[key] for key in ("measuring_seconds", "interval")),
                percent(row["steady"]),
            )
            for row in report.rows
        ],
    )
