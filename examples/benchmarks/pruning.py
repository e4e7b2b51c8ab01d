"""One-shot pruning of CHITA's two checkpoints, beside the figures that its paper prints.

    python examples/benchmarks/pruning.py --data DIR --checkpoints DIR     # about 40 minutes
    python examples/benchmarks/pruning.py --data DIR --checkpoints DIR --nets mlp
    python examples/benchmarks/pruning.py --quick                          # no data: digits

ResNet-20 on CIFAR-10 (268,336 weights; shortcuts stay dense) and an MLP on MNIST (32,360), global
and unstructured. "one stage" measures curvature once, on 1000 samples, one gradient each; "stages"
does so 20 times at most. All of a row's columns come from one path of growing sparsity, so that a
column has used no more gradients than its row says, and most of them fewer. Training images are
split: gradients from the first part, the true loss that chooses mu from 2000 others, and settings
from accuracy on 5000 more (`--settings`). Test images choose nothing. Batch norms are in eval mode;
the row "stages + BN" measures their statistics anew on 5000 training images, which is another
method. Rows of CHITA (ICML 2023, table 2) are quoted, not run: they rest on the same checkpoints.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from pruning_cases import Case, load
from results import Report, parser, print_table
from torch import Tensor, nn

import hesscurv
from hesscurv.pruning import Measuring, PruningOptions, prune_model, recalibrate_

GRADIENTS = 1000
PUBLISHED = {
    "resnet20": {
        "columns": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "magnitude": (90.77, 89.98, 88.44, 85.24, 78.79, 54.01, 11.79),
        "WoodFisher": (91.37, 91.15, 90.23, 87.96, 81.05, 62.63, 11.49),
        "CBS": (91.35, 91.21, 90.58, 88.88, 81.84, 51.28, 13.68),
        "CHITA": (91.37, 91.19, 90.60, 89.22, 84.12, 57.90, 15.60),
        "CHITA++": (91.25, 91.20, 91.04, 90.78, 90.38, 88.72, 79.32),
    },
    "mlp": {
        "columns": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
        "magnitude": (93.93, 93.78, 93.62, 92.89, 90.30, 83.64, 32.25),
        "WoodFisher": (94.02, 93.82, 93.77, 93.57, 91.69, 85.54, 38.26),
        "CBS": (93.96, 93.96, 93.98, 93.90, 93.14, 88.92, 55.45),
        "CHITA": (93.97, 93.94, 93.80, 93.59, 92.46, 88.09, 46.25),
        "CHITA++": (95.97, 95.93, 95.89, 95.80, 95.55, 94.70, 90.73),
    },
}
# Where each step ends; the columns are among them.
ONE_STAGE = {
    "resnet20": (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.74, 0.77, 0.8, 0.83, 0.86, 0.88, 0.9),
    "mlp": (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.88, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98),
}
STAGES = {
    "resnet20": (
        *(0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.7, 0.74, 0.77, 0.8, 0.8, 0.8, 0.83, 0.86, 0.88),
        *(0.9, 0.9, 0.9, 0.9, 0.9),
    ),
    "mlp": (
        *(0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.88, 0.9, 0.9, 0.92, 0.94, 0.95, 0.95, 0.95),
        *(0.96, 0.97, 0.98, 0.98, 0.98, 0.98),
    ),
}
SETTINGS = {
    ("resnet20", "one stage"): Measuring(),
    ("resnet20", "stages"): Measuring(),
    ("mlp", "one stage"): Measuring(root_floor=0.3),
    ("mlp", "stages"): Measuring(root_floor=0.3),
}
# What `--settings` tries.
CANDIDATES = {
    "default": Measuring(),
    "root_floor .3": Measuring(root_floor=0.3),
    "root_floor 50": Measuring(root_floor=50.0),
    "target loss": Measuring(target="loss"),
    "target loss, root_floor .3": Measuring(target="loss", root_floor=0.3),
    "fisher": Measuring(rows="fisher"),
    "diagonal rest": Measuring(rest="diagonal"),
}


def prune_along(
    case: Case, path: tuple[float, ...], stages: int, how: Measuring, seed: int, quick: bool
) -> dict[float, dict[str, float]]:
    """Prune along a path of sparsities; return what each column of the table has, at its last."""
    data = case.split(seed)
    columns = PUBLISHED[case.name]["columns"]
    found: dict[float, dict[str, float]] = {}
    view = copy.deepcopy(case.model)
    last = {round(s, 6): j for j, s in enumerate(path)}
    count, judging = 0, 0.0

    def on_step(step: Any, values: dict[str, Tensor]) -> None:
        nonlocal count, judging
        index, count = count, count + 1
        column = next((c for c in columns if last.get(round(c, 6)) == index), None)
        if column is None:
            return
        begun = time.perf_counter()
        view.load_state_dict(case.model.state_dict() | values)
        row = {
            "test": case.accuracy(view),
            "held_out": case.accuracy(view, data["held_out"]),
            "gradients": step.gradients,
            "sparsity": step.sparsity,
            "loss": step.loss,
        }
        if stages > 1 and recalibrate_(view, task(), data["gradients"][:20]):
            row["test_bn"] = case.accuracy(view)
        row["seconds"] = step.seconds - judging
        judging += time.perf_counter() - begun
        found[column] = row

    prune_model(
        copy.deepcopy(case.model),
        task(),
        data["gradients"],
        path[-1],
        stages=stages,
        steps_per_stage=len(path) // stages,
        gradients_per_stage=200 if quick else GRADIENTS,
        weights=case.selected,
        generator=torch.Generator().manual_seed(seed),
        progress=sys.stderr.isatty(),
        options=PruningOptions(
            schedule=path,
            measuring=how,
            calibration=data["calibration"],
            layer_losses=False,
            on_step=on_step,
        ),
    )
    return found


def task() -> hesscurv.Task:
    return hesscurv.supervised(nn.CrossEntropyLoss())


def magnitude(case: Case) -> dict[float, float]:
    out = {}
    for sparsity in PUBLISHED[case.name]["columns"]:
        model = copy.deepcopy(case.model)
        prune_model(
            model,
            task(),
            case.split(0)["calibration"],
            sparsity,
            method="magnitude",
            stages=1,
            weights=case.selected,
            options=PruningOptions(layer_losses=False),
        )
        out[sparsity] = case.accuracy(model)
    return out


def choose(case: Case, options: argparse.Namespace) -> None:
    """Print the accuracy on held-out training images of all candidates, for one seed."""
    columns = PUBLISHED[case.name]["columns"]
    rows = []
    for stages in (1, 0):
        path = (ONE_STAGE if stages else STAGES)[case.name]
        for label, how in CANDIDATES.items():
            found = prune_along(case, path, stages or len(path), how, 0, options.quick)
            kind = "one stage" if stages else "stages"
            cells = [found[c]["held_out"] for c in columns]
            rows.append([kind, label, *map(_percent, [*cells, mean(cells)])])
            print(*rows[-1], flush=True)
    print_table(["", "held-out training images", *map(str, columns), "mean"], rows)


def compare(case: Case, options: argparse.Namespace, report: Report) -> None:
    published = PUBLISHED[case.name]
    columns = published["columns"]
    print(f"\n{case.name}, dense {case.accuracy(case.model):.2f}, seeds {options.seeds}")
    names = ("magnitude", "WoodFisher", "CBS", "CHITA", "CHITA++")
    table = [[f"{n} (published)", *map(_percent, published[n])] for n in names]
    own = magnitude(case)
    table.append(["magnitude", *(_percent(own[c]) for c in columns)])
    report.rows.append({"net": case.name, "row": "magnitude", "test": own})
    for kind, peer in (("one stage", "CHITA"), ("stages", "CHITA++")):
        path = (ONE_STAGE if kind == "one stage" else STAGES)[case.name]
        stages = 1 if kind == "one stage" else len(path)
        how = SETTINGS[case.name, kind]
        runs = []
        for seed in options.seeds:
            runs.append(prune_along(case, path, stages, how, seed, options.quick))
            for c in columns:
                row = {"net": case.name, "row": kind, "seed": seed, "column": c, **runs[-1][c]}
                report.rows.append(row)
            print(f"  {kind}, seed {seed}: {runs[-1][columns[-1]]['seconds']:.0f} s", flush=True)
        for label, key in ((kind, "test"), (f"{kind} + BN", "test_bn")):
            if key in runs[0][columns[0]]:
                cells = [[run[c][key] for run in runs] for c in columns]
                table.append([label, *(f"{mean(c):.2f} ± {pstdev(c):.2f}" for c in cells)])
        table.append(["  gradients", *(runs[0][c]["gradients"] for c in columns)])
        seconds = [max(run[c]["seconds"] for run in runs) for c in columns]
        table.append(["  seconds, at most", *(f"{s:.0f}" for s in seconds)])
        for c, theirs in zip(columns, published[peer], strict=True):
            ours = mean(run[c]["test"] for run in runs)
            report.judge(
                f"{case.name} {kind} at {c}: at or above {peer}",
                None if options.quick else ours >= theirs - 1e-9,
                f"{ours:.2f} against {theirs}",
            )
        worst = min(mean(run[c]["test"] for run in runs) - own[c] for c in columns)
        report.judge(
            f"{case.name} {kind}: at or above magnitude pruning, run here, in every column",
            worst >= 0,
            f"{worst:+.2f} points at worst",
        )
        report.judge(
            f"{case.name} {kind}: under 15 minutes a cell",
            None if options.quick else max(seconds) < 900,
            f"{max(seconds):.0f} s",
        )
    print_table(["", *map(str, columns)], table)


def _percent(value: float) -> str:
    return f"{value:.2f}"


def main() -> None:
    options = parse()
    report = Report("pruning", options)
    for name in options.nets:
        case = load(name, options.data, options.checkpoints, quick=options.quick)
        if options.settings:
            choose(case, options)
        else:
            compare(case, options, report)
    if not options.settings:
        report.write()


def parse() -> argparse.Namespace:
    out = parser(__doc__)
    out.add_argument("--data", type=Path, metavar="DIR", help="has cifar-10-batches-py, MNIST/raw")
    out.add_argument("--checkpoints", type=Path, metavar="DIR", help="has CHITA's checkpoints")
    out.add_argument("--nets", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    out.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    out.add_argument(
        "--settings", action="store_true", help="compare settings on held-out training images"
    )
    options = out.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.seeds = options.seeds[:1]
    elif options.data is None or options.checkpoints is None:
        out.error("expected --data and --checkpoints, or --quick")
    return options


if __name__ == "__main__":
    main()
