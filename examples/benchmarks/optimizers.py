"""PreconditionedOptimizer beside its base: time to a loss, the cost of a step, the stable rate.

    python examples/benchmarks/optimizers.py --data DIR      # MNIST in DIR; about ten minutes
    python examples/benchmarks/optimizers.py --quick         # no data

Parts (`--parts`; of the first, `--problems`):

    linear   ridge and logistic regression with planted spectra, lambda_1 / lambda_100 from 1e2 to
             1e8, and random features of MNIST: the time to the training loss of SGD after 40
             epochs at its best rate. Either has six settings: SGD six rates, and larger ones while
             the largest is best, the wrapped one six shares of the stable rate that it finds
             (learning_rate="auto"), with rank 100. Seconds of the processor (--threads 1: those of
             an idle machine's clock) hold all of the wrapper's work and none of looking at the
             loss.
    step     the cost of a step with rank 20 on 3c3d, batch 128, beside the step of the base; in
             seconds of the processor.
    refresh  3c3d in training at batch 128, all settings left alone, until the second refresh: the
             share of the time that the report says refreshes took, by then.
    rate     full-batch gradient descent (`--nets`): the largest learning rate at which none of
             `--rate-steps` raises the loss, plain and preconditioned (`--rank`, refreshed every
             `--refresh-every` steps), beside what 2 / lambda predicts at the first point. From two
             points (`--points`): where training by mini-batches ended, whose full gradient is
             large, so that the first step is as large and leaves the region that the prediction is
             of; and after 50 full-batch steps more, at half of the predicted rate, plain.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from linear_models import EPOCHS, Curve, LinearProblem, ours, planted, random_features, sgd, train
from models import Problem, build, three_c_three_d
from results import Report, parser, print_table
from samples import colour_images
from torch import nn

import hesscurv
from hesscurv.optim import CurvatureWarning, PreconditionedOptimizer, PreconditionerOptions

RATES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
SHARES = (0.5, 0.2, 0.08, 0.03, 0.012, 0.005)
PROBLEMS = ["ridge", "logistic", "features"]
KAPPAS = (1e2, 1e5, 1e6, 1e8)
MOST_EPOCHS = 10  # of ours: SGD has four times as many
RANK = 100
NETS = ["mlp", "convnet", "3c3d", "gpt", "resnet20"]
SETTLING = 50
POINTS = {"trained": 0, "settled": SETTLING}


# -- linear models ----------------------------------------------------------------------------


def linear(report: Report, options: argparse.Namespace) -> None:
    samples, features = (4_000, 200) if options.quick else (50_000, 1_000)
    kappas = KAPPAS[::2] if options.quick else KAPPAS
    problems: list[tuple[float | None, Callable[[], LinearProblem]]] = [
        (kappa, lambda kind=kind, kappa=kappa: planted(kind, kappa, samples, features))
        for kind in ("ridge", "logistic")
        if kind in options.problems
        for kappa in kappas
    ]
    if "features" in options.problems:
        problems.append((None, lambda: random_features(options.data, features, samples)))
    table = []
    for kappa, make in problems:
        row = time_to_loss(make(), options.quick)
        report.rows.append({"part": "linear", **row})
        table.append([row[key] for key in _COLUMNS])
        print(*(f"{key} {row[key]}" for key in _COLUMNS), flush=True)
        judge(report, kappa, row, options.quick)
    print_table(_COLUMNS, table)


_COLUMNS = ("problem", "rate", "loss", "seconds", "ours", "epochs", "times", "spread")


def time_to_loss(problem: LinearProblem, quick: bool) -> dict[str, Any]:
    """Return seconds of tuned SGD and of ours, to the loss that SGD has in the end."""
    epochs = 4 if quick else EPOCHS
    tuned: dict[float, Curve] = {}
    rates, most = list(RATES[::2] if quick else RATES), 0.0
    while rates:
        most = max(most, *rates)
        for rate in rates:
            curve = train(problem, sgd(rate), epochs, looks=1)
            if math.isfinite(curve.losses[-1]):
                tuned[rate] = curve
        rate = min(tuned, key=lambda r: tuned[r].losses[-1])
        rates = [3 * rate] if 3 * rate > most else []  # the largest was best: larger ones
    loss = tuned[rate].losses[-1]
    found: dict[float, Curve] = {}
    for share in SHARES[::3] if quick else SHARES:
        make = ours(
            problem,
            rate,
            rank=RANK if not quick else 50,
            samples=2_000,
            refresh_every=10**9,  # the curvature of these losses hardly changes
            learning_rate="auto",
            options=PreconditionerOptions(rate_fraction=share, max_growth=1e12),
        )
        # One that takes longer than another did is not the best.
        fastest = min((curve.time_to(loss)[0] for curve in found.values()), default=math.inf)
        found[share] = train(problem, make, min(epochs, MOST_EPOCHS), loss, fastest)
    share = min(found, key=lambda s: found[s].time_to(loss))
    seconds, needed = found[share].time_to(loss)
    spectrum = found[share].spectrum
    return {
        "problem": problem.name,
        "rate": rate,
        "loss": loss,
        "seconds": tuned[rate].seconds[-1],
        "ours": seconds,
        "epochs": needed,
        "sgd_epochs": epochs,
        "share": share,
        "times": tuned[rate].seconds[-1] / seconds,
        "spread": spectrum[0] / abs(spectrum[RANK - 1]) if len(spectrum) > RANK else None,
        "report": found[share].report,
    }


def judge(report: Report, kappa: float | None, row: dict[str, Any], quick: bool) -> None:
    report.judge(
        f"{row['problem']}: SGD's loss in fewer epochs",
        row["epochs"] < row["sgd_epochs"],
        f"{row['epochs']:.3g} of {row['sgd_epochs']}",
    )
    shown = f"{row['seconds']:.3g} s of SGD, {row['ours']:.3g} s of ours ({row['times']:.3g} times)"
    if kappa is not None and kappa >= 1e5:
        target, reached = "10 times as fast", row["times"] >= 10
    elif kappa == 1e2:
        target, reached = "no slower", row["times"] >= 1
    else:
        target, reached = "time to SGD's loss", None
    report.judge(f"{row['problem']}: {target}", None if quick else reached, shown)


# -- the cost of a step -----------------------------------------------------------------------


def step(report: Report, options: argparse.Namespace) -> None:
    """Measure a training step with and without the wrapper, in turns."""
    batch, rank, rounds = (16, 4, 3) if options.quick else (128, 20, 40)
    table = []
    for name, make in {
        "SGD, momentum, fused": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, fused=True),
        "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-5, fused=True),
    }.items():
        torch.manual_seed(0)
        model = three_c_three_d()
        x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        task = hesscurv.supervised(nn.CrossEntropyLoss())
        base = make(model.parameters())
        few = [(x[:16], y[:16])]
        wrapped = PreconditionedOptimizer(base, model, task, few, rank, refresh_every=10**9)
        seconds: dict[str, list[float]] = {"gradient": [], "base": [], "wrapped": []}
        for i in range(rounds + 2):
            for label, act in (("base", base.step), ("wrapped", wrapped.step)):
                start = time.process_time()
                wrapped.zero_grad()
                task(model, (x, y)).backward()
                middle = time.process_time()
                act()
                if i > 1:  # the first has a refresh in it
                    seconds["gradient"].append(middle - start)
                    seconds[label].append(time.process_time() - middle)
        gradient, plain, ours_ = (statistics.median(seconds[k]) for k in seconds)
        share = (ours_ - plain) / (gradient + plain)
        row = {"base": name, "gradient": gradient, "plain": plain, "wrapped": ours_, "share": share}
        report.rows.append({"part": "step", **row})
        table.append([name, 1e3 * gradient, 1e3 * plain, 1e3 * ours_, f"{share:.1%}"])
        report.judge(
            f"step overhead on {name}, rank {rank}, 3c3d at batch {batch}: under 5 %",
            None if options.quick else share < 0.05,
            f"{share:.1%}",
        )
    print_table(["base", "gradient, ms", "step, ms", "wrapped, ms", "more"], table)


# -- refreshes --------------------------------------------------------------------------------


def refresh(report: Report, options: argparse.Namespace) -> None:
    """Train until the second refresh, and read what the first one has taken of the time."""
    torch.manual_seed(0)
    batch, most = (8, 20) if options.quick else (128, 2000)
    model, task = three_c_three_d(), hesscurv.supervised(nn.CrossEntropyLoss())
    _, x, y = colour_images(None if options.quick else options.data)
    base = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    own = [(x[:256], y[:256])]
    optimizer = PreconditionedOptimizer(
        base, model, task, own, **({"samples": 8} if options.quick else {})
    )
    last = None
    while optimizer.report().steps < most:
        part = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        task(model, (x[part], y[part])).backward()
        before = optimizer.report()
        optimizer.step()
        if optimizer.report().refreshes > 1:
            break
        last = before
    last = last or before
    print(last)
    row = {"steps": last.steps, "seconds": last.seconds, "refresh": last.refresh_seconds}
    report.rows.append({"part": "refresh", **row, "share": last.refresh_fraction})
    report.judge(
        f"3c3d, batch {batch}, by default: refreshes under 20 % of the time",
        None if options.quick else last.refresh_fraction < 0.2,
        f"{last.refresh_fraction:.1%} of {last.seconds:.3g} s, {last.steps} steps",
    )


# -- the stable learning rate -----------------------------------------------------------------


def rate(report: Report, options: argparse.Namespace) -> None:
    """Compare predicted and measured stable rates of full-batch gradient descent."""
    table, rank = [], 5 if options.quick else options.rank
    for name in ["small mlp"] if options.quick else options.nets:
        problem = build(name, options.data)
        for steps in [0, 10] if options.quick else [POINTS[point] for point in options.points]:
            settle(problem, steps)
            row = stable_rates(problem, rank, steps, options)
            report.rows.append({"part": "rate", **row})
            table.append(list(row.values()))
            print(*(f"{key} {value}" for key, value in row.items()), flush=True)
            report.judge(
                f"{name}, {steps} steps on: the stable rate grows by at least half of lambda_1 / "
                f"lambda_{rank + 1}",
                None if options.quick else row["growth"] >= 0.5 * row["ratio"],
                f"{row['growth']:.3g} times, lambda_1 / lambda_{rank + 1} = {row['ratio']:.3g}",
            )
    headers = ["net", "steps on", "loss", "2/l_1", "measured", "2/l after", "measured"]
    print_table([*headers, "l_1/l_k+1", "growth"], table)


def settle(problem: Problem, steps: int) -> None:
    """Take full-batch steps at the rate 1 / lambda_1."""
    task = hesscurv.supervised(problem.loss_fn)
    H = hesscurv.HessianOperator(problem.model, task, problem.batches)
    lr = 1 / float(hesscurv.eigsh(H, 4, tol=1e-2).eigenvalues[0].abs())
    optimizer = torch.optim.SGD(problem.model.parameters(), lr)
    for _ in range(steps):
        task(problem.model, problem.batches[0]).backward()
        optimizer.step()
        optimizer.zero_grad()


def stable_rates(
    problem: Problem, rank: int, steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Return one net's predicted and measured rates, with the eigenspace of its present weights."""
    task = hesscurv.supervised(problem.loss_fn)

    def wrapped(model: nn.Module, lr: float) -> PreconditionedOptimizer:
        base = torch.optim.SGD(model.parameters(), lr)
        how = {"refresh_every": options.refresh_every, "samples": None}
        how["options"] = PreconditionerOptions(tol=1e-2)
        return PreconditionedOptimizer(base, model, task, problem.batches, rank, **how)

    model = copy.deepcopy(problem.model)
    first = wrapped(model, 0.0)
    loss = task(model, problem.batches[0])
    loss.backward()
    first.step()
    found, state = first.report(), first.state_dict()

    def resumed(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        out = wrapped(model, lr)
        out.load_state_dict(state)
        for group in out.param_groups:
            group["lr"] = lr
        return out

    def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr)

    plain = largest_stable(problem, sgd, found.stable_rate, options.rate_steps)
    print(f"plain: stable up to {plain:.3g}, predicted {found.stable_rate:.3g}", flush=True)
    after = largest_stable(problem, resumed, found.stable_rate_after, options.rate_steps)
    return {
        "net": problem.name,
        "steps": steps,
        "loss": float(loss.detach()),
        "predicted": found.stable_rate,
        "measured": plain,
        "predicted_after": found.stable_rate_after,
        "measured_after": after,
        "ratio": abs(found.eigenvalues[0] / found.eigenvalues[rank]),
        "growth": after / plain,
    }


def largest_stable(
    problem: Problem,
    make: Callable[[nn.Module, float], torch.optim.Optimizer],
    guess: float,
    steps: int,
) -> float:
    """Return the largest rate, to 10 %, at which full-batch steps never raise the loss."""
    low, high = 0.0, guess / 2
    while high < 1e3 * guess and is_stable(problem, make, high, steps):
        low, high = high, 2 * high
    if low == 0:
        low = high / 2
        while low > 1e-3 * guess and not is_stable(problem, make, low, steps):
            low, high = low / 2, low
    while high > 1.1 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_stable(problem, make, middle, steps) else (low, middle)
    return low


def is_stable(
    problem: Problem,
    make: Callable[[nn.Module, float], torch.optim.Optimizer],
    lr: float,
    steps: int,
) -> bool:
    """Whether none of so many steps raises the loss, by more than its rounding."""
    model = copy.deepcopy(problem.model)
    optimizer, last = make(model, lr), math.inf
    ((inputs, targets),) = problem.batches
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.loss_fn(model(inputs), targets)
        loss.backward()
        before, last = last, float(loss.detach())
        if not last <= before * (1 + 1e-5):
            return False
        optimizer.step()
    return True


PARTS = {"linear": linear, "step": step, "refresh": refresh, "rate": rate}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, metavar="DIR", help="has MNIST/raw; else digits")
    options.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options.add_argument("--nets", nargs="+", choices=NETS, default=NETS[:4])
    options.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    options.add_argument("--points", nargs="+", choices=list(POINTS), default=list(POINTS))
    options.add_argument("--rank", type=int, default=20, help="of the part `rate`")
    options.add_argument("--rate-steps", type=int, default=40)
    options.add_argument("--refresh-every", type=int, default=4)
    options = options.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report("optimizers", options)
    warnings.simplefilter("ignore", CurvatureWarning)  # where lambda_1 / lambda_100 is small
    for part in options.parts:
        print(f"\n{part}")
        PARTS[part](report, options)
    report.write()


if __name__ == "__main__":
    main()
