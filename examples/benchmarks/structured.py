"""Channel pruning of ResNet-56 by torch-pruning: our importances beside its own, one shot.

    python examples/benchmarks/structured.py --data DIR --checkpoints DIR [--epochs 1]
    python examples/benchmarks/structured.py --quick

The inner width of every residual block is pruned, globally, to 1.5 and 2 times fewer multiply-adds
(MACs): the shortcuts, which pad with zeros, fix the width of the stream. The procedure is the same
for all importances: in each of some stages the pruner's ratio is bisected until the model has the
stage's MACs, the channels go, and scores are computed anew; no weight is trained. What looks at
data sees the same training images, other ones for every seed. The settings of each kind, the number
of stages among them, are chosen by accuracy on training images that no score has seen, the mean
over seeds; test images choose nothing. That is hours of search: with `--seeds 1 --epochs 0` first,
`--only` then takes a few settings of each kind into a run of all seeds. Kinds and settings:

    eigenspace   top eigenpairs of the GGN of a quarter of the images
    fisher, ggn  `FisherImportance`'s two kinds of rows; all three of ours: each channel by itself,
                 per loss or per MAC; or jointly, per MAC (`rank_jointly`)
    magnitude, taylor, hessian
                 torch-pruning's, with its defaults, or with sums in the loss's own unit

"hessian" is used as torch-pruning documents it. Its `accumulate_grad` never finds what it has
accumulated, so that the last sample alone counts.

Columns: fewer MACs (times), settings chosen, accuracy on the held-out training images and on the
test images (mean over seeds, with the standard deviation), and after fine-tuning the first seed's
model.
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
import torch_pruning as tp
from models import CIFARResNet
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
from torch import Tensor, nn
from torch.nn import functional as F

import hesscurv
from hesscurv.integrations import EigenspaceImportance, FisherImportance, macs_per_entry

TARGETS = (1.5, 2.0)
OURS = ("eigenspace", "fisher", "ggn")
THEIRS = ("magnitude", "taylor", "hessian")
JOINTLY = "per MAC, jointly"
UNITS = {"group_reduction": "sum", "normalizer": None}
Make = Callable[[nn.Module, Batches, int], Any]  # model, batches, seed -> an importance


# -- contenders ---------------------------------------------------------------------------------


def task() -> hesscurv.Task:
    return hesscurv.supervised(nn.CrossEntropyLoss())


def taylor(model: nn.Module, batches: Batches, **options: Any) -> Any:
    """Return torch-pruning's Taylor importance, with the mean gradient in .grad as it asks for."""
    model.zero_grad()
    for x, y in batches:
        (F.cross_entropy(model(x), y) / len(batches)).backward()
    return tp.importance.GroupTaylorImportance(**options)


def hessian(model: nn.Module, batches: Batches, **options: Any) -> Any:
    """Return torch-pruning's Hessian importance, used as its documentation shows."""
    importance = tp.importance.GroupHessianImportance(**options)
    importance.zero_grad()
    for x, y in batches:
        for i in range(len(x)):
            model.zero_grad()
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            importance.accumulate_grad(model)
    return importance


def eigenspace(k: int, costs: dict[str, float] | None) -> Make:
    known: dict[Any, hesscurv.Eigenpairs] = {}

    def compute(model: nn.Module, batches: Batches, seed: int) -> hesscurv.Eigenpairs:
        widths = tuple(len(p) for p in model.parameters())
        key = (seed, widths, float(sum(p.detach().double().sum() for p in model.parameters())))
        if key not in known:  # the dense model's serve all targets
            part = [(x[: len(x) // 4], y[: len(y) // 4]) for x, y in batches]
            G = hesscurv.GGNOperator(model, task(), part)
            known[key] = hesscurv.eigsh(G, k, tol=5e-2)
        return known[key]

    return lambda model, batches, seed: EigenspaceImportance(
        model, lambda m: compute(m, batches, seed), weights="readers", costs=costs
    )


def rows(kind: Any, costs: dict[str, float] | None) -> Make:
    return lambda model, batches, seed: FisherImportance(
        model,
        task(),
        batches,
        rows=kind,
        weights="readers",
        costs=costs,
        generator=torch.Generator().manual_seed(seed),
    )


def contenders(costs: dict[str, float], k: int) -> dict[tuple[str, str], Make]:
    """Return an importance for each kind and setting."""
    out: dict[tuple[str, str], Make] = {}
    for setting, given in [("per loss", None), ("per MAC", costs), (JOINTLY, costs)]:
        out["eigenspace", setting] = eigenspace(k, given)
        out["fisher", setting] = rows("fisher", given)
        out["ggn", setting] = rows("ggn", given)
    for name, options in [("defaults", {}), ("sum, None", UNITS)]:
        out["magnitude", name] = lambda model, batches, seed, options=options: (
            tp.importance.GroupMagnitudeImportance(**options)
        )
        out["taylor", name] = lambda model, batches, seed, options=options: taylor(
            model, batches, **options
        )
        out["hessian", name] = lambda model, batches, seed, options=options: hessian(
            model, batches, **options
        )
    return out


# -- pruning to a number of MACs ----------------------------------------------------------------


def macs(model: nn.Module, example: Tensor) -> float:
    return tp.utils.count_ops_and_params(model, example)[0]


def prune(
    model: CIFARResNet, importance: Any, example: Tensor, budget: float, jointly: bool = False
) -> None:
    """Prune a model in place, globally, to the most channels with at most `budget` MACs."""
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance,
        global_pruning=True,
        ignored_layers=[model.conv1, model.linear, *(block.conv2 for block in model.blocks())],
    )
    if jointly:
        importance.rank_jointly(pruner)
    before = macs(model, example)
    per_entry = macs_per_entry(model, example)
    names = {m: name for name, m in model.named_modules()}

    def chosen(ratio: float) -> list[Any]:
        # Groups are yielded before they are pruned: a ratio is tried without a copy.
        pruner.per_step_pruning_ratio, pruner.current_step = [0.0, ratio], 0
        return list(pruner.step(interactive=True))

    def saved(groups: list[Any]) -> float:
        total = 0.0
        for group in groups:
            name = names[group[0].dep.target.module]
            first, second = model.get_submodule(name), model.get_submodule(name[:-1] + "2")
            # All outputs of the one, all inputs of the other: no other weight goes.
            for layer, axis in ((first, 0), (second, 1)):
                weight = layer.weight
                per_channel = (
                    weight.numel() / weight.shape[axis] * per_entry[names[layer] + ".weight"]
                )
                total += len(group[0].idxs) * per_channel
        return total

    low, high = 0.0, 0.97
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if before - saved(chosen(middle)) > budget else (low, middle)
    for group in chosen(high):
        group.prune()
    if macs(model, example) > 1.02 * budget:
        raise RuntimeError(f"expected at most {budget:.3g} MACs, got {macs(model, example):.3g}")


def shrunk(
    images: Images,
    make: Make,
    batches: Batches,
    seed: int,
    target: float,
    stages: int,
    jointly: bool,
) -> CIFARResNet:
    """Return the dense model with `target` times fewer MACs, reached in equal factors."""
    model, example = copy.deepcopy(images.model), images.x[:1]
    dense = macs(model, example)
    for stage in range(1, stages + 1):
        model.eval()
        budget = dense / target ** (stage / stages)
        prune(model, make(model, batches, seed), example, budget, jointly)
    model.zero_grad()
    return model


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


class Measuring:
    """Prunes by one contender with one seed, and measures on the held-out images."""

    def __init__(self, images: Images, options: argparse.Namespace) -> None:
        self.images, self.options = images, options
        self.held_out = images.held_out(options.held_out)
        self.dense = macs(images.model, images.x[:1])
        costs = macs_per_entry(images.model, images.x[:1])
        self.contenders = contenders(costs, options.k)

    def __call__(
        self, kind: str, setting: str, stages: int, target: float, seed: int
    ) -> dict[str, Any]:
        images, make = self.images, self.contenders[kind, setting]
        batches = images.batches(self.options.samples, seed)
        start = time.perf_counter()
        model = shrunk(images, make, batches, seed, target, stages, setting == JOINTLY)
        seconds = time.perf_counter() - start
        row = {
            "kind": kind,
            "setting": setting,
            "stages": stages,
            "seed": seed,
            "target": target,
            "times": self.dense / macs(model, images.x[:1]),
            "widths": [block.conv1.out_channels for block in model.blocks()],
            "held_out": accuracy(model, self.held_out),
            "seconds": seconds,
        }
        print(
            f"{kind:10}  {setting:16}  {stages:2} stages  seed {seed}  "
            f"{row['times']:.3f}x  held out {row['held_out']:.2f}  {seconds:.0f} s",
            flush=True,
        )
        return {**row, "model": model}


def best_of(found: list[dict[str, Any]], kind: str, target: float) -> list[dict[str, Any]]:
    """Return the rows, one a seed, of a kind's setting that is best on the held-out images."""
    by_setting: dict[Any, list[dict[str, Any]]] = {}
    for row in found:
        if row["kind"] == kind and row["target"] == target:
            by_setting.setdefault((row["setting"], row["stages"]), []).append(row)
    return max(by_setting.values(), key=lambda rows: mean(row["held_out"] for row in rows))


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--data", type=Path, help=f"the folder of {FOLDER}")
    options_parser.add_argument("--checkpoints", type=Path, help=f"the folder of {CHECKPOINT}")
    options_parser.add_argument("--kinds", nargs="+", choices=OURS + THEIRS, default=OURS + THEIRS)
    options_parser.add_argument("--samples", type=int, default=1000, help="images for the scores")
    options_parser.add_argument("--held-out", type=int, default=2000, help="images to choose by")
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
    options_parser.add_argument(
        "--epochs", type=int, default=1, help="of fine-tuning, for the best setting of each kind"
    )
    options = options_parser.parse_args()
    if not options.quick and (options.data is None or options.checkpoints is None):
        options_parser.error("expected --data and --checkpoints, or --quick")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.samples, options.held_out, options.k, options.stages = 100, 300, 10, [1, 2]
        options.seeds, images = 1, synthetic()
    else:
        images = cifar10(options.data, options.checkpoints)
    images.x_test, images.y_test = images.x_test[: options.test], images.y_test[: options.test]

    report = Report("structured", options)
    test = list(zip(images.x_test.split(BATCH), images.y_test.split(BATCH), strict=True))
    print(f"dense: {accuracy(images.model, test):.2f}")
    measure = Measuring(images, options)
    found = [measure(*tried) for tried in settings_of(options, measure.contenders)]
    winners = {
        (kind, t): best_of(found, kind, t) for t in options.targets for kind in options.kinds
    }
    for (kind, target), rows in winners.items():
        for row in rows:
            row["one_shot"] = accuracy(row["model"], test)
        tuned = None
        if options.epochs:
            tune(rows[0]["model"], images, options.epochs, shifted=not options.quick)
            tuned = accuracy(rows[0]["model"], test)
            print(f"{kind}, {target}x, fine-tuned: {tuned:.2f}", flush=True)
        rows[0]["tuned"] = tuned
    table = [
        (
            kind,
            f"{rows[0]['setting']}, {rows[0]['stages']} stages",
            mean(row["times"] for row in rows),
            mean(row["held_out"] for row in rows),
            mean(row["one_shot"] for row in rows),
            pstdev([row["one_shot"] for row in rows]),
            rows[0]["tuned"],
        )
        for (kind, _), rows in winners.items()
    ]
    print_table(["kind", "settings", "MACs", "held out", "one shot", "std", "fine-tuned"], table)
    complete = set(THEIRS) <= set(options.kinds) and set(OURS) & set(options.kinds)
    for target in options.targets if complete else ():
        judge(report, winners, target)
    report.rows = [{k: v for k, v in row.items() if k != "model"} for row in found]
    report.write()


def judge(report: Report, winners: dict[Any, list[dict[str, Any]]], target: float) -> None:
    """Compare our best kind, chosen on the held-out images, with each of torch-pruning's."""
    held_out = lambda kind: mean(row["held_out"] for row in winners[kind, target])  # noqa: E731
    ours = max((kind for kind in OURS if (kind, target) in winners), key=held_out)
    for key in ("one_shot", "tuned"):
        if winners[ours, target][0][key] is None:
            continue
        seeds = slice(1 if key == "tuned" else None)
        value = {
            kind: mean(row[key] for row in winners[kind, target][seeds]) for kind in (ours, *THEIRS)
        }
        beside = ", ".join(f"{kind} {value[kind]:.2f}" for kind in THEIRS)
        report.judge(
            f"{key.replace('_', ' ')} at {target}x fewer MACs, ahead of torch-pruning's",
            value[ours] > max(value[kind] for kind in THEIRS),
            f"{ours} {value[ours]:.2f}; {beside}",
        )


if __name__ == "__main__":
    main()
