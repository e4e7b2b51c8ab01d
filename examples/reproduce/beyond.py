"""One step beyond the paper: does the overlap depend on width, on the curvature, on the optimizer?

    python examples/reproduce/beyond.py                # digits, some minutes on a core
    python examples/reproduce/beyond.py --data DIR     # MNIST, DIR/MNIST/raw
        --figure beyond.png --parts widths             # one of the three alone

The paper (Fernandez et al., TMLR 2025, arXiv 2504.14701) finds that the k largest parameters and
the top k Hessian eigenvectors overlap above chance, more so for larger nets; its nets differ in
kind, data and k/D as well. Here its MLP, all else equal, with three seeds:

    widths      five hidden layers of 10, 20, 40 and 80 units instead of 20
    curvatures  width 20: Hessian, GGN (for cross-entropy that is the Fisher) and empirical Fisher
    optimizers  width 20: SGD at the paper's rate, AdamW at the one that has the least training loss
                of three after as many steps

Each is measured at the start, at equal training loss, and after equally many steps, in times of
chance: at the fixed share k/D = .01, and at the k that this is for the narrowest net. "Layers" is
what random masks reach that keep as many entries of each weight matrix and bias, in times of
chance, and "within" the overlap in times of that: their product is the overlap in times of chance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from mlp import TASK, chance_by_layer, check_figure, figure_options, parameter_count, source
from overlap import load_data, make_net, train
from panels import BLUE, GREEN, GREY, RED, dress, panels, save
from results import Report, parser, print_table
from torch import nn
from torch.nn import functional as F

import hesscurv

CURVATURES = {
    "Hessian": hesscurv.HessianOperator,
    "GGN": hesscurv.GGNOperator,
    "empirical Fisher": hesscurv.EmpiricalFisherOperator,
}
SGD_RATE, ADAMW_RATES = 0.3, (1e-3, 3e-3, 1e-2)
SHARE = 0.01  # k/D
MOMENTS = ("start", "equal loss", "equal steps")
KINDS = {"share": f"k/D = {SHARE}", "k": "fixed k"}
PARTS = {"widths": "width", "curvatures": "curvature", "optimizers": "optimizer"}


def main() -> None:
    options = parse()
    report = Report("reproduce beyond", options)
    data, test = load_data(options.data, options.side)
    print(f"{len(data[1]):,} training images of {source(options)}, curvature of {len(test[1])}.")
    for case in cases(options):
        rows = found(case, options)
        report.rows += rows if rows else measure(case, options, data, test)
    for part in options.parts:
        show(part, rows_of(part, report.rows))
    print()
    done, asked = (sum(row[n] for row in report.rows) for n in ("converged", "pairs"))
    report.judge("every eigenpair converged to tol 1e-2", done == asked, f"{done} of {asked}")
    reached = sum(row["moment"] == "equal loss" for row in report.rows)
    runs = sum(row["moment"] == "start" for row in report.rows)
    report.judge(
        f"the loss {options.loss} was reached in every run",
        None if options.quick else reached == runs,
        f"{reached} of {runs} measurements",
    )
    if options.figure:
        draw(options, report.rows)
    report.write()


# -- the runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    seed: int
    width: int = 20
    optimizer: str = "SGD"


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the nets to train, small ones first; some serve several parts."""
    out = []
    for seed in options.seeds:
        out += [Case(seed, width) for width in options.widths if "widths" in options.parts]
        out += [Case(seed)] if {"curvatures", "optimizers"} & set(options.parts) else []
        out += [Case(seed, optimizer="AdamW")] if "optimizers" in options.parts else []
    return sorted(set(out), key=lambda case: (case.width, case.optimizer == "AdamW", case.seed))


def rows_of(part: str, rows: list[dict]) -> list[dict]:
    """Return the rows in which nothing else varies."""
    normal = {"width": 20, "curvature": "Hessian", "optimizer": "SGD"}
    del normal[PARTS[part]]
    return [row for row in rows if all(row[key] == value for key, value in normal.items())]


def found(case: Case, options: argparse.Namespace) -> list[dict]:
    """Return the rows of a case that an earlier call has left in --rows."""
    if options.rows is None or not options.rows.is_file():
        return []
    same = {**vars(case), "data": source(options), "fixed": options.fixed}
    rows = map(json.loads, options.rows.read_text().splitlines())
    return [row for row in rows if all(row[key] == value for key, value in same.items())]


def measure(case: Case, options: argparse.Namespace, data: Any, test: Any) -> list[dict]:
    """Train the net of a case, and return what is measured at each moment."""
    rate = SGD_RATE if case.optimizer == "SGD" else best_rate(options, data)
    torch.manual_seed(case.seed)
    net = make_net(options.side**2, hidden(case.width))
    optimizer = getattr(torch.optim, case.optimizer)(net.parameters(), lr=rate)
    normal, rows = case.width == 20 and case.optimizer == "SGD", []
    for moment, step in moments(net, optimizer, options, data, case.seed):
        for curvature in CURVATURES if normal and "curvatures" in options.parts else ["Hessian"]:
            row = {**vars(case), "curvature": curvature, "data": source(options), "rate": rate}
            row |= {"moment": moment, "step": step, "loss": training_loss(net, data)}
            row |= {"fixed": options.fixed, **overlaps(net, CURVATURES[curvature], test, options)}
            rows.append(row)
            print(
                f"width {case.width}, {case.optimizer}, seed {case.seed}, {moment} (step {step}, "
                f"loss {row['loss']:.3f}), {curvature}: {row['ratio, share']:.2f} times chance"
            )
    if options.rows is not None:  # a case at once, whole or not at all
        with open(options.rows, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def best_rate(options: argparse.Namespace, data: Any) -> float:
    """Return AdamW's rate of least training loss after all steps, seed 0."""
    if options.adamw_rate is not None:
        return options.adamw_rate
    losses = {}
    for rate in ADAMW_RATES:
        torch.manual_seed(0)
        net = make_net(options.side**2, hidden(20))
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
        for _ in train(net, data, optimizer, options.steps, 0):
            pass
        losses[rate] = training_loss(net, data)
    print("AdamW, training loss by rate:", ", ".join(f"{r:g}: {v:.4f}" for r, v in losses.items()))
    options.adamw_rate = min(losses, key=losses.__getitem__)
    return options.adamw_rate


def hidden(width: int) -> tuple[int, ...]:
    return (*[width] * 5, 10)


def training_loss(net: nn.Module, data: Any) -> float:
    """Return the loss on a fixed part of the training images."""
    with torch.no_grad():
        return float(F.cross_entropy(net(data[0][:2000]), data[1][:2000]))


def moments(
    net: nn.Module, optimizer: Any, options: argparse.Namespace, data: Any, seed: int
) -> Iterator[tuple[str, int]]:
    """Train a net, and yield at the start, when the loss is reached, and after all steps."""
    reached = False
    for step in train(net, data, optimizer, 3 * options.steps, seed):
        if step == 0:
            yield "start", step
        if not reached and step % 10 == 0 and training_loss(net, data) <= options.loss:
            reached = True
            yield "equal loss", step
        if step == options.steps:
            yield "equal steps", step
        if reached and step >= options.steps:
            return


def overlaps(
    net: nn.Module, operator: Any, test: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the overlaps of magnitude masks and eigenspaces, in times of chance."""
    H = operator(net, TASK, [test])
    D = H.shape[0]
    sizes = {"share": round(SHARE * D), "k": options.fixed}
    pairs = hesscurv.eigsh(H, max(sizes.values()), tol=1e-2)
    row: dict[str, Any] = {"D": D, "pairs": len(pairs), "converged": int(pairs.converged.sum())}
    row["last / first"] = float((pairs.eigenvalues[-1] / pairs.eigenvalues[0]).abs())
    for name, k in sizes.items():
        mask, top = hesscurv.magnitude_mask(net, k), pairs.truncate(k)
        value, chance = hesscurv.overlap(mask, top), hesscurv.chance_overlap(k, D).mean
        by_layer = chance_by_layer(mask, top)
        row |= {f"k, {name}": k, f"ratio, {name}": value / chance}
        row |= {f"layers, {name}": by_layer / chance, f"within, {name}": value / by_layer}
    return row


# -- what is shown ------------------------------------------------------------------------------


def grouped(rows: list[dict], key: str) -> dict[tuple[str, Any], list[dict]]:
    """Return the rows of all seeds by moment and by what varies."""
    values = dict.fromkeys(row[key] for row in rows)
    return {
        (moment, value): found
        for moment in MOMENTS
        for value in values
        if (found := [r for r in rows if r["moment"] == moment and r[key] == value])
    }


def spread(rows: list[dict], name: str) -> tuple[float, float]:
    """Return mean and standard deviation over the seeds."""
    values = [row[name] for row in rows]
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def show(part: str, rows: list[dict]) -> None:
    key = PARTS[part]
    print(f"\n{part}: times chance, mean ± standard deviation over {count_seeds(rows)} seeds")
    table = []
    for (moment, value), group in grouped(rows, key).items():
        cells = [moment, str(value), group[0]["D"], round(mean(r["step"] for r in group))]
        cells.append(mean(r["loss"] for r in group))
        for kind in KINDS:
            cells.append(group[0][f"k, {kind}"])
            for name in ("ratio", "layers", "within"):
                cells.append("{:.2f} ± {:.2f}".format(*spread(group, f"{name}, {kind}")))
        table.append(cells)
    columns = ["moment", key, "D", "step", "loss"]
    for _ in KINDS:
        columns += ["k", "overlap", "layers", "within"]
    print_table(columns, table)
    compare(key, rows)


def count_seeds(rows: list[dict]) -> int:
    return len({row["seed"] for row in rows})


def compare(key: str, rows: list[dict]) -> None:
    """Print the quotient of the last and the first value, seed by seed."""
    values = list(dict.fromkeys(row[key] for row in rows))
    for other in values[1:] if key != "width" else values[-1:]:
        for moment in MOMENTS:
            parts = []
            for kind, name in KINDS.items():
                quotients = []
                for seed in {row["seed"] for row in rows}:
                    ratios = {
                        r[key]: r[f"ratio, {kind}"]
                        for r in rows
                        if r["seed"] == seed and r["moment"] == moment
                    }
                    if values[0] in ratios and other in ratios:
                        quotients.append(ratios[other] / ratios[values[0]])
                if quotients:
                    error = stdev(quotients) if len(quotients) > 1 else 0.0
                    parts.append(f"{name}: {mean(quotients):.2f} ± {error:.2f}")
            print(f"{other} over {values[0]}, {moment}: {', '.join(parts)}")


def draw(options: argparse.Namespace, rows: list[dict]) -> None:
    columns = [(part, kind) for part in options.parts for kind in KINDS]
    axes = np.atleast_1d(panels(len(columns), width=4.4)) if len(options.parts) < 3 else None
    if axes is None:  # widths above, choices below
        axes = panels(3, 2, width=4.6).T.flatten()
    colors = dict(zip(MOMENTS, (GREY, BLUE, RED), strict=True))
    for ax, (part, kind) in zip(axes, columns, strict=True):
        rows_here = rows_of(part, rows)
        at = KINDS[kind] if kind == "share" else f"k = {options.fixed}"
        shown = draw_widths if part == "widths" else draw_choices
        shown(ax, rows_here, PARTS[part], kind, f"{part.capitalize()}, {at}", colors)
    save(axes[0], options.figure)


def draw_widths(
    ax: Any, rows: list[dict], key: str, kind: str, title: str, colors: dict[str, str]
) -> None:
    for name, look in (("ratio", "o-"), ("layers", ":")):
        for moment, color in colors.items():
            groups = {v: f for (m, v), f in grouped(rows, key).items() if m == moment}
            values = [spread(f, f"{name}, {kind}") for f in groups.values()]
            error = [s for _, s in values] if name == "ratio" else None
            label = moment if name == "ratio" else None
            ax.errorbar(groups.keys(), [m for m, _ in values], error, fmt=look, color=color,
                        capsize=3, markersize=5, label=label)  # fmt: skip
    ax.plot([], [], ":", color=GREY, label="random, same layers")
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    dress(ax, title, legend={"loc": "best"}, xlabel="width of the hidden layers")
    ax.set(xscale="log", ylim=(0, None), ylabel="overlap / chance")
    widths = sorted({row["width"] for row in rows})
    ax.set_xticks(widths, [str(w) for w in widths])
    ax.minorticks_off()


def draw_choices(
    ax: Any, rows: list[dict], key: str, kind: str, title: str, colors: dict[str, str]
) -> None:
    groups, values = grouped(rows, key), list(dict.fromkeys(row[key] for row in rows))
    for i, (moment, color) in enumerate(colors.items()):
        places = [(j, v) for j, v in enumerate(values) if (moment, v) in groups]
        for name in ("ratio", "layers"):
            found = [spread(groups[moment, v], f"{name}, {kind}") for _, v in places]
            x = [j + 0.25 * (i - 1) for j, _ in places]
            heights = [m for m, _ in found]
            if name == "ratio":
                ax.bar(x, heights, 0.22, yerr=[s for _, s in found], color=color, capsize=3,
                       label=moment, error_kw={"elinewidth": 1})  # fmt: skip
            else:
                ax.plot(x, heights, "_", markersize=15, markeredgewidth=2, color=GREEN,
                        label="random, same layers" if i == 0 else None)  # fmt: skip
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    dress(ax, title, legend={"loc": "upper right"}, ylabel="overlap / chance")
    ax.set_xticks(range(len(values)), [str(v).replace(" ", "\n") for v in values])
    ax.set_ylim(0, 1.45 * ax.get_ylim()[1])


def parse() -> argparse.Namespace:
    out = parser(__doc__)
    figure_options(out)
    out.add_argument(
        "--rows", type=Path, metavar="FILE", help="keep each net's rows there, or find them there"
    )
    out.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    out.add_argument("--widths", type=int, nargs="+", help="default 10 20 40 80; 5 10 20 40 digits")
    out.add_argument(
        "--k", type=int, dest="fixed", help="the fixed k; default .01 D, narrowest net"
    )
    out.add_argument("--seeds", type=int, nargs="+", default=None, help="default 0 1 2")
    options = out.parse_args()
    check_figure(out, options)
    torch.set_num_threads(options.threads or 1)
    sys.stdout.reconfigure(line_buffering=True)
    options.side, options.steps, options.loss = (8, 20, 2.25) if options.quick else (16, 1000, 0.35)
    options.adamw_rate = None  # chosen when it is needed
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    if options.widths is None:
        options.widths = [5, 10, 20, 40] if options.data is None else [10, 20, 40, 80]
        options.widths = [5, 10] if options.quick else options.widths
    options.widths = sorted(set(options.widths))
    if options.fixed is None:
        narrowest = make_net(options.side**2, hidden(options.widths[0]))
        options.fixed = max(1, round(SHARE * parameter_count(narrowest)))
    return options


if __name__ == "__main__":
    main()
