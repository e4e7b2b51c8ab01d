"""Channel pruning of ResNet-56 by torch-pruning: our importances beside its own.

    python examples/benchmarks/structured.py --data DIR --checkpoints DIR [--epochs 1]
    python examples/benchmarks/structured.py --quick

The inner width of every residual block is pruned, globally, to 1.5 and 2 times fewer multiply-adds
(MACs): the shortcuts, which pad with zeros, fix the width of the stream. The procedure is the same
for all importances: in each of some stages the pruner's ratio is bisected until the model has the
stage's MACs, the channels go, and scores are computed anew; nothing is trained. What looks at
data sees the same training images, other ones for every seed. Kinds and settings:

    eigenspace   top eigenpairs of the GGN of a quarter of the images
    fisher, ggn  `FisherImportance`'s two kinds of rows; all three: each channel by itself, per loss
                 or per MAC; or jointly, per MAC (`rank_jointly`); or so and "compensated": in each
                 stage `remove_channels_` fits the convolutions that read the channels to what
                 is left of their inputs, by least squares, without labels
    compensated  `CompensatedImportance`, which counts on that: jointly, per MAC, compensated; of
                 the loss, or of the logits' change, also with a channel's cost to the power 1.5
    magnitude, taylor, hessian
                 torch-pruning's, with its defaults, or with sums in the loss's own unit
    both         torch-pruning's magnitude with our compensation, `remove_channels_`

"hessian" is used as torch-pruning documents it. Its `accumulate_grad` never finds what it has
accumulated, so that the last sample alone counts.

The settings of each kind, the number of stages among them, are chosen by accuracy on training
images that no score has seen, the mean over seeds; test images choose nothing. One shot they are
chosen as the model is; for training, together with its first rate of `--rates`, after a short
training of the first seed's model on `--part` images, not the scores' nor those held out. Training
is SGD for `--epochs`, or a part of one; its rate falls to zero in both.

With `--work DIR` what has been pruned or trained is kept in a folder: a run that was stopped goes
on, and several with the same options, each with some `--kinds`, can share the work. `--only` takes
a few settings of each kind.

Two tables: settings chosen, fewer MACs (times), accuracy on the held-out training images and on
the test images, mean over seeds with the standard deviation: one shot; and after fine-tuning the
first `--tuned-seeds` models.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from channel_pruning import OURS, THEIRS, contenders, macs, of_widths, shrunk
from resnet56 import (
    BATCH,
    CHECKPOINT,
    FOLDER,
    Batches,
    Images,
    accuracy,
    cifar10,
    synthetic,
    tune,
)
from results import Report, parser, print_table

from hesscurv.integrations import macs_per_entry

TARGETS = (1.5, 2.0)
KINDS = (*OURS, *THEIRS, "both")
# What settings are chosen by, for each column.
CHOSEN_BY = {"one_shot": "held_out", "tuned": "held_out_trained"}


# -- the run ------------------------------------------------------------------------------------


def settings_of(options: argparse.Namespace, kinds: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield what is tried: kind, setting, number of stages, target, seed."""
    for kind, setting in kinds:
        for stages in options.stages:
            if options.only and f"{kind}: {setting}: {stages}" not in options.only:
                continue
            slow = kind == "eigenspace" and stages > 1  # each stage takes a solve
            if kind not in options.kinds or (slow and not options.eigenspace_stages):
                continue
            # Magnitudes look at no data, and are the same for all seeds.
            for seed in range(1 if kind in ("magnitude", "eigenspace") else options.seeds):
                yield from ((kind, setting, stages, t, seed) for t in options.targets)


class Kept:
    """Keeps rows and their models in a folder, for a run that goes on after another."""

    def __init__(self, folder: Path | None, images: Images) -> None:
        self.folder, self.images = folder, images

    def __call__(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row with its model, as it was kept, or made and kept now."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.pt"
        if path.is_file():
            row = torch.load(path, weights_only=True)
            model = of_widths(self.images, row["widths"])
            model.load_state_dict(row.pop("state"))
            return {**row, "model": model}
        row = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = {key: value for key, value in row.items() if key != "model"}
        part = path.with_suffix(".part")
        torch.save({**stored, "state": row["model"].state_dict()}, part)
        part.rename(path)
        return row


class Measuring:
    """Prunes by one contender with one seed, trains, and measures on the held-out images."""

    def __init__(self, images: Images, options: argparse.Namespace) -> None:
        self.images, self.options = images, options
        self.held_out = images.held_out(options.held_out)
        self.dense = macs(images.model, images.x[:1])
        costs = macs_per_entry(images.model, images.x[:1])
        self.contenders = contenders(costs, options.k)
        self.kept = Kept(options.work, images)

    def pruned(
        self, kind: str, setting: str, stages: int, target: float, seed: int
    ) -> dict[str, Any]:
        """Return the row of one pruned model, with the model."""
        name = f"{kind}, {setting}, {stages} stages, {target}x, seed {seed}"

        def make() -> dict[str, Any]:
            images, make = self.images, self.contenders[kind, setting]
            batches = images.batches(self.options.samples, seed)
            start = time.process_time()
            model = shrunk(images, make, batches, seed, target, stages, setting)
            seconds = time.process_time() - start
            row = {
                "name": name,
                "kind": kind,
                "setting": setting,
                "stages": stages,
                "seed": seed,
                "target": target,
                "times": self.dense / macs(model, images.x[:1]),
                "widths": [block.conv1.out_channels for block in model.blocks()],
                "parameters": sum(p.numel() for p in model.parameters()),
                "held_out": accuracy(model, self.held_out),
                "cpu_seconds": seconds,
            }
            return {**row, "model": model}

        row = self.kept(name, make)
        print(
            f"{name:58}  {row['times']:.3f}x  held out {row['held_out']:.2f}  "
            f"{row['cpu_seconds']:.0f} s",
            flush=True,
        )
        return row

    def train_briefly(self, row: dict[str, Any]) -> None:
        """Put into a pruned model's row what a short training at each of the rates comes to."""
        images, options = self.images, self.options
        # Those of the other half, behind the held-out ones: no score has seen them either.
        first = len(images.x) // 2 + options.held_out
        part = torch.arange(first, min(first + options.part, len(images.x)))
        tried = {}
        for rate in options.rates:

            def short(rate: float = rate) -> dict[str, Any]:
                model = copy.deepcopy(row["model"])
                tune(model, images, 1, rate, shifted=not options.quick, part=part)
                return {
                    "widths": row["widths"],
                    "held_out": accuracy(model, self.held_out),
                    "model": model,
                }

            name = f"{row['name']}, {len(part)} images, rate {rate}"
            tried[rate] = self.kept(name, short)["held_out"]
            print(f"{name}: held out {tried[rate]:.2f}", flush=True)
        row["rate"] = max(tried, key=lambda rate: tried[rate])
        row["held_out_trained"] = tried[row["rate"]]
        row["rates_tried"] = {str(rate): found for rate, found in tried.items()}

    def tuned(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a pruned model after training, with what that took."""
        options = self.options

        def whole() -> dict[str, Any]:
            model = copy.deepcopy(row["model"])
            start = time.process_time()
            tune(model, self.images, options.epochs, row["rate"], shifted=not options.quick)
            seconds = time.process_time() - start
            return {"widths": row["widths"], "cpu_seconds": seconds, "model": model}

        return self.kept(f"{row['name']}, {options.epochs:g} epochs, rate {row['rate']}", whole)


def best_of(found: list[dict[str, Any]], kind: str, target: float, by: str) -> list[dict[str, Any]]:
    """Return the rows, one a seed, of a kind's setting that is best on the held-out images.

    After a short training these are the first seed's alone; ties go by those before it.
    """
    by_setting: dict[Any, list[dict[str, Any]]] = {}
    for row in found:
        if row["kind"] == kind and row["target"] == target:
            by_setting.setdefault((row["setting"], row["stages"]), []).append(row)
    return max(by_setting.values(), key=lambda rows: (over_seeds(rows, by), over_seeds(rows)))


def over_seeds(rows: list[dict[str, Any]], by: str = "held_out") -> float:
    """Return the mean over the seeds that have it."""
    return mean(row[by] for row in rows if by in row)


def measure_on_test(
    measure: Measuring, chosen: dict[Any, list[dict[str, Any]]], test: Batches
) -> None:
    """Put the test accuracies of each column into the rows chosen for it."""
    for (*_, column), rows in chosen.items():
        if column == "one_shot":
            for row in rows:
                row["one_shot"] = accuracy(row["model"], test)
            continue
        for row in rows[: measure.options.tuned_seeds]:
            row["rate"] = rows[0]["rate"]
            trained = measure.tuned(row)
            row["tuned"] = accuracy(trained["model"], test)
            row["tuning_cpu_seconds"] = trained["cpu_seconds"]
            print(f"{row['name']}, fine-tuned: {row['tuned']:.2f}", flush=True)


def show(chosen: dict[Any, list[dict[str, Any]]], column: str) -> None:
    """Print the table of a column: settings, held-out and test accuracies."""
    table = []
    for (kind, target, of), rows in chosen.items():
        if of != column:
            continue
        line = [
            kind,
            f"{rows[0]['setting']}, {rows[0]['stages']} stages",
            target,
            mean(row["times"] for row in rows),
            over_seeds(rows, CHOSEN_BY[column]),
        ]
        found = [row[column] for row in rows if column in row]
        rate = [] if column == "one_shot" else [rows[0]["rate"]]
        table.append([*line, *rate, len(found), mean(found), pstdev(found)])
    headers = ["kind", "settings", "target", "MACs", CHOSEN_BY[column].replace("_", " ")]
    last = ["seeds", "one shot"] if column == "one_shot" else ["rate", "seeds", "fine-tuned"]
    print_table([*headers, *last, "std"], table)


def read_options() -> argparse.Namespace:
    options_parser = parser(__doc__)
    options_parser.add_argument("--data", type=Path, help=f"the folder of {FOLDER}")
    options_parser.add_argument("--checkpoints", type=Path, help=f"the folder of {CHECKPOINT}")
    options_parser.add_argument("--work", type=Path, help="a folder to keep models in, to go on")
    options_parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options_parser.add_argument("--samples", type=int, default=500, help="images for the scores")
    options_parser.add_argument("--held-out", type=int, default=5000, help="images to choose by")
    options_parser.add_argument("--test", type=int, help="test images; default all")
    options_parser.add_argument("--k", type=int, default=50, help="eigenpairs")
    options_parser.add_argument(
        "--stages", type=int, nargs="+", default=[1, 4, 16], help="numbers of stages to try"
    )
    options_parser.add_argument(
        "--eigenspace-stages", action="store_true", help="stages for the eigenspace as well"
    )
    options_parser.add_argument(
        "--only", nargs="+", metavar="KIND: SETTING: STAGES", help="try these alone"
    )
    options_parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS))
    options_parser.add_argument("--seeds", type=int, default=3)
    options_parser.add_argument("--tuned-seeds", type=int, default=1, help="of the second table")
    options_parser.add_argument(
        "--epochs", type=float, default=1, help="of fine-tuning, for the best setting of each kind"
    )
    options_parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1], help="first rates to try"
    )
    options_parser.add_argument(
        "--part", type=int, default=4096, help="images of the short training that chooses"
    )
    options = options_parser.parse_args()
    if not options.quick and (options.data is None or options.checkpoints is None):
        options_parser.error("expected --data and --checkpoints, or --quick")
    if options.quick:
        options.samples, options.held_out, options.k, options.stages = 100, 300, 10, [1, 2]
        options.seeds, options.part, options.targets = 1, 300, [1.5]
    return options


def main() -> None:
    options = read_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    images = synthetic() if options.quick else cifar10(options.data, options.checkpoints)
    images.x_test, images.y_test = images.x_test[: options.test], images.y_test[: options.test]

    report = Report("structured", options)
    test = list(zip(images.x_test.split(BATCH), images.y_test.split(BATCH), strict=True))
    print(f"dense: {accuracy(images.model, test):.2f}")
    measure = Measuring(images, options)
    found = [measure.pruned(*tried) for tried in settings_of(options, measure.contenders)]
    columns = ["one_shot", "tuned"] if options.epochs else ["one_shot"]
    for row in found if options.epochs else ():
        if row["seed"] == 0:
            measure.train_briefly(row)
    chosen = {
        (kind, target, column): best_of(found, kind, target, CHOSEN_BY[column])
        for target in options.targets
        for kind in options.kinds
        for column in columns
    }
    measure_on_test(measure, chosen, test)
    for column in columns:
        show(chosen, column)
    both_sides = set(THEIRS) & set(options.kinds) and set(OURS) & set(options.kinds)
    for target in options.targets if both_sides else ():
        for column in columns:
            judge(report, chosen, target, column)
    report.rows = [{k: v for k, v in row.items() if k != "model"} for row in found]
    report.write()


def judge(report: Report, chosen: dict[Any, Any], target: float, column: str) -> None:
    """Compare our best kind, chosen on the held-out images, with torch-pruning's that took part.

    And its magnitude with our compensation, by itself: that has no importance of ours.
    """
    rows = {
        kind: chosen[kind, target, column] for kind in KINDS if (kind, target, column) in chosen
    }
    ours = max(
        (kind for kind in OURS if kind in rows),
        key=lambda kind: over_seeds(rows[kind], CHOSEN_BY[column]),
    )
    theirs = [kind for kind in THEIRS if kind in rows]
    value = {kind: over_seeds(found, column) for kind, found in rows.items()}
    beside = ", ".join(f"{kind} {value[kind]:.2f}" for kind in theirs)
    for kind in [ours, *(["both"] if "both" in rows else [])]:
        report.judge(
            f"{kind}, {column.replace('_', ' ')} at {target}x fewer MACs, ahead of torch-pruning's",
            value[kind] > max(value[other] for other in theirs),
            f"{value[kind]:.2f}; {beside}",
        )


if __name__ == "__main__":
    main()
