"""Curvature of the paper's 3c3d on CIFAR-10, watched by `CurvatureMonitor` in one training run.

    python examples/reproduce/cifar10_monitor.py --data DIR    # DIR/cifar-10-batches-py
        --figure cifar10_monitor.png
    python examples/reproduce/cifar10_monitor.py               # digits as 3x32x32, few steps
    python examples/reproduce/cifar10_monitor.py --quick       # seconds, a smoke test

Network (895,210 parameters), initialisation and training are those of `cifar10_3c3d.py`, which
takes 1000 eigenpairs at three steps. Here 20 are followed closely, each solve started from the last
eigenspace: sharpness beside the edge of stability 2 / rate, the share of the gradient in the top
space, the overlap of that space with the axes of the 1000 largest parameters, and how much mask and
space still change. The Hessian is in eval mode on the first 20 test images of each class. The
figure is drawn anew after every measurement.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from cifar10_3c3d import initialize_as_deepobs
from mlp import check_figure, figure_options, parameter_count
from models import three_c_three_d
from panels import BLUE, GREEN, GREY, RED, dress, panels, save
from results import Report, parser, print_table
from torch import nn
from torch.nn import functional as F
from training import check_cifar10, colour_images, shuffled

import hesscurv
from hesscurv import plots
from hesscurv.hooks import CurvatureMonitor, MonitorOptions, dense_then_sparse

RATE, SIZE = 0.0226, 895_210


def main() -> None:
    options = parse()
    check_cifar10(options.data)
    report = Report("reproduce 3c3d monitor", options)
    images = colour_images(options.data)
    torch.manual_seed(options.seed)
    net = three_c_three_d()
    initialize_as_deepobs(net)
    print(
        f"{parameter_count(net):,} parameters, {len(images.y):,} training images of "
        f"{images.source}; k = {options.k}, mask of {options.mask}, Hessian of {options.samples} "
        "test images."
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    monitor = CurvatureMonitor(
        net,
        hesscurv.supervised(nn.CrossEntropyLoss()),
        images.hessian_batches(options.samples, options.samples, "cpu"),
        k=options.k,
        quantities="overlap",
        schedule=dense_then_sparse(*options.schedule),
        optimizer=optimizer,
        options=MonitorOptions(mask_size=options.mask, history=1000),
    )
    start = time.perf_counter()
    batches = shuffled(len(images.y), 128, options.seed)
    for step, batch in zip(range(options.steps + 1), batches, strict=False):
        record = monitor.step(step)  # after `step` steps of training
        if record is not None:
            watch(record, options, monitor.records)
        if step == options.steps:
            break
        optimizer.zero_grad()
        F.cross_entropy(net(images.x[batch]), images.y[batch]).backward()
        optimizer.step()
    minutes = (time.perf_counter() - start) / 60

    report.rows += [{**record, **derived(record)} for record in monitor.records]
    show(report.rows)
    last = report.rows[-1]
    print(
        f"\n{len(report.rows)} measurements took {last['fraction']:.0%} of {minutes:.3g} minutes, "
        f"{sum(r['num_matvecs'] for r in report.rows)} products in all."
    )
    judge(report)
    if options.figure:
        save(draw(report.rows), options.figure)
    report.write()


def watch(record: dict[str, Any], options: argparse.Namespace, records: list) -> None:
    """Say what was measured, and draw all there is so far."""
    print(
        f"step {record['step']}: loss {record['loss']:.3f}, sharpness {record['sharpness']:.3g}, "
        f"overlap {derived(record)['ratio']:.3g} times chance; {record['num_matvecs']} products, "
        f"{record['seconds']:.1f} s"
    )
    if options.figure and len(records) > 1:
        axes = draw([{**r, **derived(r)} for r in records])
        axes.figure.savefig(options.figure, dpi=60)


def derived(record: dict[str, Any]) -> dict[str, float]:
    """Return the overlap, and that of random masks with as many entries of each layer, over chance.

    Chance keeps of each tensor the same fraction; those keep the mask's fraction of each. What they
    hold of the space is the sum of these fractions times the tensors' shares of its leverage.
    """
    fractions, shares = record["mask_by_parameter"], record["leverage_by_parameter"]
    held = sum(fraction * shares[name] for name, fraction in fractions.items())
    # The overlap is k times the share that the mask holds over sqrt(m k), chance sqrt(m k) / D.
    kept = record["overlap_chance"] ** 2 * SIZE / len(record["eigenvalues"])  # m / D
    return {"ratio": record["overlap"] / record["overlap_chance"], "layers": held / kept}


def show(rows: list[dict[str, Any]]) -> None:
    names = ["step", "loss", "sharpness", "sharpness_ratio", "gradient_share", "overlap", "ratio"]
    names += ["layers", "overlap_z_score", "mask_iou", "space_overlap", "num_matvecs", "seconds"]
    titles = {"sharpness_ratio": "× rate / 2", "gradient_share": "gradient", "ratio": "× chance"}
    titles |= {"overlap_z_score": "z", "mask_iou": "mask IoU", "space_overlap": "space overlap"}
    titles |= {"num_matvecs": "products"}
    print()
    print_table(
        [*(titles.get(n, n) for n in names), "converged"],
        [
            [*(row.get(n) for n in names), f"{row['converged']}/{len(row['eigenvalues'])}"]
            for row in rows
        ],
    )
    print("gradient: its share in the top space; layers: random masks with as many entries of each")
    print("weight matrix and bias, over chance; mask IoU and space overlap: with the row above")


def judge(report: Report) -> None:
    rows, quick = report.rows, report.options.quick
    done, asked = sum(r["converged"] for r in rows), sum(len(r["eigenvalues"]) for r in rows)
    worst = max(max(r["residuals"]) / abs(r["eigenvalues"][0]) for r in rows)
    report.judge(
        "eigenpairs converged to tol 1e-2: as many as 3 k products can refresh",
        None,
        f"{done} of {asked}; largest residual {worst:.1e} of the largest eigenvalue",
    )
    least = min(rows, key=lambda r: r["overlap_z_score"])
    report.judge(
        "the overlap is above chance + 3 standard deviations at every step",
        None if quick else least["overlap_z_score"] > 3,
        f"at least {least['ratio']:.3g} times chance, z = {least['overlap_z_score']:.3g}",
    )
    for name, key in (("mask", "mask_iou"), ("eigenspace", "space_overlap")):
        first, last = rows[1][key], rows[-1][key]
        gaps = [f"{rows[i - 1]['step']} to {rows[i]['step']}" for i in (1, len(rows) - 1)]
        report.judge(
            f"the {name} changes less at the end than at the start",
            None if quick else last > first,
            f"{key} {first:.3f} from step {gaps[0]}, {last:.3f} from {gaps[1]}",
        )


def draw(rows: list[dict[str, Any]]) -> Any:
    axes = panels(3, 2, width=4.7, height=3.6)
    sharpness, gradient, ratio, masks, spaces, change = axes.flat
    plots.sharpness(rows, sharpness)
    plots.by_step(rows, "gradient_share", gradient)
    gradient.set_title(
        f"Gradient in the top {len(rows[0]['eigenvalues'])}", loc="left", fontsize=11
    )
    gradient.set_ylim(0, 1)
    steps = [row["step"] for row in rows]
    ratio.plot(steps, [r["ratio"] for r in rows], "o-", color=BLUE, label="largest parameters")
    label = "random, as many of each layer"
    ratio.plot(steps, [r["layers"] for r in rows], "o-", color=GREEN, markersize=4, label=label)
    ratio.axhline(1, color=GREY, linestyle="--", label="chance")
    dress(ratio, "Mask and top eigenspace", legend={"loc": "best"}, xlabel="training step")
    ratio.set(ylabel="overlap / chance", ylim=(0, None))
    plots.mask_ious(rows, masks)
    plots.space_overlaps(rows, spaces)
    for key, color, name in (("mask_iou", RED, "mask, IoU"), ("space_overlap", BLUE, "space")):
        points = [(r["step"], r[key]) for r in rows if math.isfinite(r.get(key, math.nan))]
        change.plot(*zip(*points, strict=True), "o-", color=color, label=f"{name} with the last")
    dress(change, "How much still changes", legend={"loc": "best"}, xlabel="training step")
    change.set(ylim=(0, 1.02), ylabel="likeness to the measurement before")
    return ratio


def parse() -> argparse.Namespace:
    out = parser(__doc__)
    figure_options(out)
    out.add_argument("--steps", type=int, help="of training; default 1500, 200 on digits")
    out.add_argument("--k", type=int, help="eigenpairs; default 20")
    out.add_argument("--samples", type=int, help="of the Hessian; default 200")
    out.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    options = out.parse_args()
    check_figure(out, options)
    defaults = {"steps": 1500 if options.data else 200, "k": 20, "samples": 200}
    defaults |= {"steps": 4, "k": 3, "samples": 20} if options.quick else {}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.mask = 1000
    options.schedule = (2, 1, 2) if options.quick else (100, 50, 100)
    if options.threads:
        torch.set_num_threads(options.threads)
    sys.stdout.reconfigure(line_buffering=True)
    return options


if __name__ == "__main__":
    main()
