"""Deep nets: a training loss against steps and seconds, ours beside its base and other optimizers.

    python examples/benchmarks/deep_nets.py --data DIR --threads 1     # an hour and a half
    python examples/benchmarks/deep_nets.py --quick                    # no data, under a minute

3c3d and ResNet-20 on CIFAR-10, a small GPT on tinyshakespeare, and the classical deep autoencoder
of MNIST, each from a common start (`deep_training.py`). Contenders: SGD with momentum .9, AdamW,
SOAP, and PreconditionedOptimizer on SGD with momentum and on AdamW, with rank 10, curvature on a
quarter to half a batch of samples that no step is taken with, and refreshes within a tenth of the
time. In a budget of seconds the rate falls in a straight line from its first value to zero. All
have three first rates to choose from, a factor 2 apart, the same for ours as for its base, and up
to two more where the best lies at an end; it is chosen by the training loss at the end of the
budget. Then comes the time to the loss that the own base has in the end, at its best rate. Seconds
are processor seconds, with all of an optimizer's work and without looking at the loss. Losses are
means of three looks in a row, on a part of the training data that stays the same.

Batches are of 128 and more, so that curvature limits the rate rather than the gradient's noise.

`--figure PATH` draws loss against seconds, of the runs just done or, with `--only-figure`, of those
in the file of results.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import is_installed
from deep_training import RECIPES, Curve, Factory, Training, start, train
from results import DEFAULT_RESULTS, Report, parser, print_table
from torch import nn

from hesscurv.optim import CurvatureWarning, PreconditionedOptimizer, PreconditionerOptions

FACTORS = (0.5, 1.0, 2.0)  # of the guessed rate
MOST_RATES = 5
LOOKS = 12
RANK, MAX_FRACTION = 10, 0.1
BASES = {"ours on SGD": "SGD", "ours on AdamW": "AdamW"}
COLOURS = {
    "SGD": "tab:blue",
    "ours on SGD": "tab:blue",
    "AdamW": "tab:orange",
    "ours on AdamW": "tab:orange",
    "SOAP": "tab:green",
}


def contenders(training: Training) -> dict[str, tuple[float, Callable[[float], Factory]]]:
    """Return what trains: a guessed rate, and how to build it with a rate."""

    def sgd(lr: float) -> Factory:
        return lambda model: torch.optim.SGD(model.parameters(), lr, momentum=0.9)

    def adamw(lr: float) -> Factory:
        return lambda model: torch.optim.AdamW(model.parameters(), lr)

    def ours(base: Callable[[float], Factory]) -> Callable[[float], Factory]:
        def of_rate(lr: float) -> Factory:
            def make(model: nn.Module) -> torch.optim.Optimizer:
                return PreconditionedOptimizer(
                    base(lr)(model),
                    model,
                    training.task,
                    training.curvature_batches,
                    rank=RANK,
                    max_fraction=MAX_FRACTION,
                    # The check is a few gradients, once.
                    options=PreconditionerOptions(operator_options={"check": False}),
                )

            return make

        return of_rate

    def soap(lr: float) -> Factory:
        from pytorch_optimizer import SOAP

        return lambda model: SOAP(model.parameters(), lr=lr)

    rate, adaptive = training.recipe.lr, training.recipe.adaptive_lr
    out = {
        "SGD": (rate, sgd),
        "ours on SGD": (rate, ours(sgd)),
        "AdamW": (adaptive, adamw),
        "ours on AdamW": (adaptive, ours(adamw)),
        "SOAP": (adaptive, soap),
    }
    if not is_installed("pytorch_optimizer"):
        del out["SOAP"]
    return out


def tuned(
    training: Training, guess: float, make: Callable[[float], Factory], options: Any
) -> tuple[float, dict[float, Curve]]:
    """Return the rate whose loss is least in the end, and the runs of all that were tried."""
    runs: dict[float, Curve] = {}
    rates = [factor * guess for factor in (FACTORS[1:2] if options.quick else FACTORS)]
    while rates:
        for lr in rates:
            runs[lr] = train(training, make(lr), budget(training, options), options.seeds[0], LOOKS)
        best, tried = min(runs, key=lambda r: runs[r].final), sorted(runs)
        rates = []
        if len(runs) < MOST_RATES and not options.quick:
            rates = {tried[0]: [best / 2], tried[-1]: [2 * best]}.get(best, [])
    return best, runs


def budget(training: Training, options: Any) -> float:
    return options.seconds or training.recipe.seconds


def compare(training: Training, options: Any, report: Report) -> None:
    """Tune and run all contenders on one net; add rows, and judge ours."""
    name, curves = training.name, {}
    print(f"\n{name}: {training.source}, loss {training.look(training.model):.4g} at the start")
    for label, (guess, make) in contenders(training).items():
        lr, tried = tuned(training, guess, make, options)
        runs = [tried[lr]]
        for seed in options.seeds[1:]:
            runs.append(train(training, make(lr), budget(training, options), seed, LOOKS))
        curves[label] = runs
        shown = ", ".join(f"{rate:.3g}: {run.final:.4g}" for rate, run in sorted(tried.items()))
        final = " ".join(f"{run.final:.4g}" for run in runs)
        print(f"{label:14s} rate {lr:.3g} of {shown}; loss {final}", flush=True)
        if runs[0].report:
            print(runs[0].report)
        report.rows.append(
            {
                "net": name,
                "data": training.source,
                "contender": label,
                "rate": lr,
                "tried": {f"{rate:.3g}": run.final for rate, run in tried.items()},
                "runs": [vars(run) for run in runs],
            }
        )
    summary(report.rows)
    finite = all(math.isfinite(run.final) for runs in curves.values() for run in runs)
    report.judge(
        f"{name}: no contender diverges at its best rate", finite, f"{len(curves)} of them"
    )
    for label, base in BASES.items():
        ratios = [
            to.time_to(to.final)[0] / max(run.time_to(to.final)[0], 1e-9)
            for run, to in zip(curves[label], curves[base], strict=True)
        ]
        report.judge(
            f"{name}: {label}, fewer seconds than {base} to its loss in the end",
            None if options.quick else statistics.mean(ratios) > 1,
            " ".join(f"{ratio:.2f}" for ratio in ratios)
            + " times as fast, by seed; 0: not reached",
        )


def summary(rows: list[dict[str, Any]]) -> None:
    """Print what one net's contenders reached, means over seeds, beside the own base."""
    curves = {row["contender"]: [Curve(**run) for run in row["runs"]] for row in rows}
    table = []
    for label, runs in curves.items():
        pairs = list(zip(runs, curves[BASES.get(label, label)], strict=True))
        columns = [
            [run.steps[-1] for run in runs],
            [run.final for run in runs],
            [to.loss_after(run.steps[-1]) for run, to in pairs],
            [run.time_to(to.final)[0] for run, to in pairs],
            [to.time_to(to.final)[0] for _, to in pairs],
            [run.time_to(to.final)[1] for run, to in pairs],
        ]
        table.append([label, *map(statistics.mean, columns)])
    headers = ["contender", "steps", "loss", "base's, as many steps", "s to base's", "base's s"]
    print_table([*headers, "steps to it"], table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss against seconds, a panel for each net: solid ours, dashed the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    nets = list(dict.fromkeys(row["net"] for row in rows))
    figure, axes = plt.subplots(1, len(nets), figsize=(3.2 * len(nets), 2.8), squeeze=False)
    for net, axis in zip(nets, axes[0], strict=True):
        for row in (row for row in rows if row["net"] == net):
            label = row["contender"]
            for i, run in enumerate(row["runs"]):
                axis.plot(
                    run["seconds"],
                    Curve(losses=run["losses"]).smooth(),
                    color=COLOURS[label],
                    linestyle="-" if label in BASES else "--",
                    linewidth=1.2,
                    alpha=1.0 if i == 0 else 0.4,
                    label=label if i == 0 else None,
                )
        axis.set_title(net, fontsize=9)
        axis.set_xlabel("processor seconds", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("training loss", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"drew {path.name}")


def latest_rows(path: Path) -> list[dict[str, Any]]:
    """Return each net's rows of the last run in a file of results that has them."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["benchmark"] == "deep_nets":
            for net in {row["net"] for row in entry["rows"]}:
                rows[net] = [row for row in entry["rows"] if row["net"] == net]
    return [row for net in RECIPES if net in rows for row in rows[net]]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10, MNIST, text in it")
    options.add_argument(
        "--nets",
        nargs="+",
        choices=list(RECIPES),
        help="default all, with --quick the two cheapest",
    )
    options.add_argument("--seconds", type=float, help="of a run; default by net, 40 to 80")
    options.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first one tunes")
    options.add_argument("--figure", type=Path, metavar="PATH", help="draw loss against seconds")
    options.add_argument("--only-figure", action="store_true", help="of the results in the file")
    options = options.parse_args()
    if options.only_figure:
        rows = latest_rows(Path(options.results or DEFAULT_RESULTS))
        for name in dict.fromkeys(row["net"] for row in rows):
            print(f"\n{name}")
            summary([row for row in rows if row["net"] == name])
        draw(rows, options.figure)
        return
    if options.nets is None:
        options.nets = ["gpt", "autoencoder"] if options.quick else list(RECIPES)
    if options.quick:
        options.seconds = 0.6
        options.seeds = options.seeds[:1]
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", CurvatureWarning)  # where lambda_1 / lambda_11 is small
    rows = []
    for name in options.nets:
        report = Report("deep_nets", options)  # a line for each net, kept if the next one fails
        compare(start(name, options.data, 3 if options.quick else None), options, report)
        report.write()
        rows += report.rows
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
