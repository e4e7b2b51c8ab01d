"""Does curvature pay over magnitude pruning in the same time? ResNet-20 on CIFAR-10.

    python examples/benchmarks/equal_time.py --data DIR --checkpoints DIR [--stages 4]
    python examples/benchmarks/equal_time.py --quick

`prune_model` takes so many seconds. Magnitude pruning takes none, and spends the same seconds on
training what is left by SGD with frozen masks: momentum .9, weight decay 5e-4, batches of 128,
images shifted and mirrored, a rate that falls linearly to zero; with batch norms in eval mode, as
`prune_model` leaves them, and in training mode, which measures their statistics anew. The rate is
chosen among three, each for the whole time, by accuracy on held-out training images. Rows:

    curvature          prune_model in stages, and with the statistics measured anew (+ BN)
    magnitude + SGD    for as many seconds
    curvature + SGD    prune_model in one stage, and SGD for the seconds that are left
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from pruning import task
from pruning_cases import Case, load
from results import Report, parser, print_table
from samples import augmented
from torch import nn
from torch.nn import functional as F

from hesscurv.pruning import PruningOptions, prune_model, recalibrate_

SPARSITIES, RATES = (0.7, 0.8, 0.9), (0.1, 0.03, 0.01)


def pruned(case: Case, sparsity: float, method: str, stages: int, quick: bool) -> nn.Module:
    data, model = case.split(0), copy.deepcopy(case.model)
    prune_model(
        model,
        task(),
        data["gradients"],
        sparsity,
        method=method,
        stages=stages,
        steps_per_stage=1 if stages > 1 or method == "magnitude" else 4,
        gradients_per_stage=200 if quick else 1000,
        weights=case.selected,
        options=PruningOptions(calibration=data["calibration"], layer_losses=False),
    )
    return model


def tune(case: Case, model: nn.Module, seconds: float, rate: float, *, norms: bool) -> int:
    """Train with frozen masks for some seconds; return the steps taken."""
    x, y = (torch.cat(parts) for parts in zip(*case.split(0)["gradients"], strict=True))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    model.train(norms)
    begun, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - passed / seconds)
        index = torch.randint(len(y), (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(augmented(x[index], generator)), y[index]).backward()
        optimizer.step()
        steps += 1
    model.eval()
    return steps


def best_tuned(
    case: Case, dense: nn.Module, seconds: float, *, norms: bool
) -> tuple[float, float, int]:
    """Return test accuracy, rate and steps of the rate that is best on held-out images."""
    found = []
    for rate in RATES:
        model = copy.deepcopy(dense)
        steps = tune(case, model, seconds, rate, norms=norms)
        held_out = case.accuracy(model, case.split(0)["held_out"])
        found.append((held_out, case.accuracy(model), rate, steps))
    return max(found)[1:]


def enter(rows: dict[str, float], label: str, accuracy: float, how: str = "") -> None:
    rows[label] = accuracy
    print(f"  {label}: {accuracy:.2f} {how}".rstrip(), flush=True)


def enter_tuned(
    rows: dict[str, float], label: str, tuned: tuple[float, float, int], seconds: float
) -> None:
    accuracy, rows[f"{label}: rate"], rows[f"{label}: steps"] = tuned
    enter(rows, label, accuracy, f"in {seconds:.0f} s, {tuned[2]} steps at rate {tuned[1]:g}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, metavar="DIR")
    options.add_argument("--checkpoints", type=Path, metavar="DIR")
    options.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    options.add_argument(
        "--stages", type=int, default=10, help="of the first row; curvature + SGD has one"
    )
    options = options.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.quick and (options.data is None or options.checkpoints is None):
        raise SystemExit("expected --data and --checkpoints, or --quick")
    case = load("resnet20", options.data, options.checkpoints, quick=options.quick)
    report = Report("equal_time", options)
    table = []
    for sparsity in options.sparsities[-1:] if options.quick else options.sparsities:
        rows: dict[str, float] = {}
        print(f"sparsity {sparsity}", flush=True)
        begun = time.perf_counter()
        curved = pruned(case, sparsity, "obs", options.stages, options.quick)
        seconds = time.perf_counter() - begun
        enter(rows, "curvature", case.accuracy(curved), f"in {seconds:.0f} s")
        recalibrate_(curved, task(), case.split(0)["gradients"][:20])
        enter(rows, "curvature + BN", case.accuracy(curved))
        flat = pruned(case, sparsity, "magnitude", 1, options.quick)
        enter(rows, "magnitude", case.accuracy(flat))
        for norms in (False, True):
            label = "magnitude + SGD" + (" + BN" if norms else "")
            tuned = best_tuned(case, flat, seconds, norms=norms)
            enter_tuned(rows, label, tuned, seconds)
        begun = time.perf_counter()
        once = pruned(case, sparsity, "obs", 1, options.quick)
        left = max(0.0, seconds - (time.perf_counter() - begun))
        tuned = best_tuned(case, once, left, norms=True)
        enter_tuned(rows, "curvature + SGD + BN", tuned, seconds)
        report.rows.append({"sparsity": sparsity, "seconds": seconds, **rows})
        shown = [k for k in rows if ":" not in k]
        table.append([sparsity, f"{seconds:.0f}", *(f"{rows[k]:.2f}" for k in shown)])
        report.judge(
            f"{sparsity}: curvature ahead of magnitude + SGD in the same time, norms in eval mode",
            rows["curvature"] >= rows["magnitude + SGD"],
            f"{rows['curvature']:.2f} against {rows['magnitude + SGD']:.2f}",
        )
        best = max(rows["curvature + BN"], rows["curvature + SGD + BN"])
        report.judge(
            f"{sparsity}: the same with statistics measured anew",
            best >= rows["magnitude + SGD + BN"],
            f"{best:.2f} against {rows['magnitude + SGD + BN']:.2f}",
        )
    print_table(["sparsity", "seconds", *shown], table)
    report.write()


if __name__ == "__main__":
    main()
