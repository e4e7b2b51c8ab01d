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
chance: at the fixed share k/D = .01 (.05 too, as in the paper, where the width is 20), and at the k
that this is for the narrowest net. "Layers" is what random masks reach that keep as many entries of
each weight matrix and bias, in times of chance, and "within" the overlap in times of that: their
product is the overlap in times of chance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from figures import BLUE, GREEN, GREY, RED, dress, panels, save
from mlp import TASK, chance_by_layer, check_figure, figure_options, parameter_count, source
from overlap import load_data, make_net, train
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
SHARES = (0.01, 0.05)
MOMENTS = ("start", "equal loss", "equal steps")
PARTS = {"widths": "width", "curvatures": "curvature", "optimizers": "optimizer"}


def main() -> None:
    options = parse()
    report = Report("reproduce beyond", options)
    data, test = load_data(options.data, options.side)
    print(f"{len(data[1]):,} training images of {source(options)}, curvature of {len(test[1])}.")
    cases = {"widths": width_cases, "curvatures": curvature_cases, "optimizers": optimizer_cases}
    for part in options.parts:
        for case in cases[part](options, data):
            for row in measured(case, options, data, test):
                report.rows.append({"part": part, **row})
                print(
                    f"{part}: {row[PARTS[part]]}, seed {row['seed']}, {row['moment']} (step "
                    f"{row['step']}, loss {row['loss']:.3f}): {row['ratio .01']:.2f} times chance"
                )
    for part in options.parts:
        show(part, [row for row in report.rows if row["part"] == part])
    print()
    done, asked = (sum(row[n] for row in report.rows) for n in ("converged", "pairs"))
    report.judge("every eigenpair converged to tol 1e-2", done == asked, f"{done} of {asked}")
    expected = len(options.seeds) * sum(count(part, options) for part in options.parts)
    report.judge(
        f"the loss {options.loss} was reached in every run",
        None if options.quick else len(report.rows) == expected,
        f"{len(report.rows)} of {expected} measurements",
    )
    if options.figure:
        draw(options, report.rows)
    report.write()


# -- the runs -----------------------------------------------------------------------------------


def width_cases(options: argparse.Namespace, data: Any) -> Iterator[dict[str, Any]]:
    for seed in options.seeds:
        for width in options.widths:
            yield {"seed": seed, "width": width, "shares": SHARES[:1]}


def curvature_cases(options: argparse.Namespace, data: Any) -> Iterator[dict[str, Any]]:
    for seed in options.seeds:
        yield {"seed": seed, "curvatures": list(CURVATURES)}


def optimizer_cases(options: argparse.Namespace, data: Any) -> Iterator[dict[str, Any]]:
    rate = best_rate(options, data)
    for seed in options.seeds:
        yield {"seed": seed, "optimizer": "SGD"}
        yield {"seed": seed, "optimizer": "AdamW", "rate": rate}


def count(part: str, options: argparse.Namespace) -> int:
    """Return how many measurements a seed has."""
    return 3 * {"widths": len(options.widths), "curvatures": 3, "optimizers": 2}[part]


def best_rate(options: argparse.Namespace, data: Any) -> float:
    """Return AdamW's rate of least training loss after all steps, seed 0."""
    losses = {}
    for rate in ADAMW_RATES:
        torch.manual_seed(0)
        net = make_net(options.side**2, hidden(20))
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
        for _ in train(net, data, optimizer, options.steps, 0):
            pass
        losses[rate] = training_loss(net, data)
    print("AdamW, training loss by rate:", ", ".join(f"{r:g}: {v:.4f}" for r, v in losses.items()))
    return min(losses, key=losses.__getitem__)


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


def measured(
    case: dict[str, Any], options: argparse.Namespace, data: Any, test: Any
) -> Iterator[dict[str, Any]]:
    """Train the net of a case, and yield what is measured at each moment."""
    seed, width, name = case["seed"], case.get("width", 20), case.get("optimizer", "SGD")
    torch.manual_seed(seed)
    net = make_net(options.side**2, hidden(width))
    make: Callable[..., Any] = getattr(torch.optim, name)
    optimizer = make(net.parameters(), lr=case.get("rate", SGD_RATE))
    for moment, step in moments(net, optimizer, options, data, seed):
        for curvature in case.get("curvatures", ["Hessian"]):
            yield {
                **{"seed": seed, "width": width, "optimizer": name, "curvature": curvature},
                **{"rate": optimizer.param_groups[0]["lr"], "moment": moment, "step": step},
                "loss": training_loss(net, data),
                **overlaps(net, CURVATURES[curvature], test, options, case.get("shares", SHARES)),
            }


def overlaps(
    net: nn.Module, operator: Any, test: Any, options: argparse.Namespace, shares: tuple
) -> dict[str, Any]:
    """Return the overlaps of magnitude masks and eigenspaces, in times of chance."""
    H = operator(net, TASK, [test])
    D = H.shape[0]
    sizes = {f" {str(share)[1:]}": round(share * D) for share in shares}
    sizes |= {" k": options.fixed}
    pairs = hesscurv.eigsh(H, max(sizes.values()), tol=1e-2)
    row: dict[str, Any] = {"D": D, "pairs": len(pairs), "converged": int(pairs.converged.sum())}
    row["last / first"] = float((pairs.eigenvalues[-1] / pairs.eigenvalues[0]).abs())
    for name, k in sizes.items():
        mask, top = hesscurv.magnitude_mask(net, k), pairs.truncate(k)
        value, chance = hesscurv.overlap(mask, top), hesscurv.chance_overlap(k, D).mean
        by_layer = chance_by_layer(mask, top)
        row |= {f"k{name}": k, f"ratio{name}": value / chance}
        row |= {f"layers{name}": by_layer / chance, f"within{name}": value / by_layer}
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
    kinds = [n for n in (" .01", " .05", " k") if f"ratio{n}" in rows[0]]
    print(f"\n{part}: times chance, mean ± standard deviation over {count_seeds(rows)} seeds")
    table = []
    for (moment, value), found in grouped(rows, key).items():
        cells = [moment, str(value), found[0]["D"], mean(r["step"] for r in found)]
        cells.append(mean(r["loss"] for r in found))
        for kind in kinds:
            cells.append(found[0][f"k{kind}"])
            cells += ["{:.2f} ± {:.2f}".format(*spread(found, f"{n}{kind}"))
                      for n in ("ratio", "layers", "within")]  # fmt: skip
        table.append(cells)
    columns = ["moment", key, "D", "step", "loss"]
    for kind in kinds:
        columns += ["k", f"ratio{kind}", "layers", "within"]
    print_table(columns, table)
    compare(key, rows, kinds)


def count_seeds(rows: list[dict]) -> int:
    return len({row["seed"] for row in rows})


def compare(key: str, rows: list[dict], kinds: list[str]) -> None:
    """Print the quotient of the last and the first value, seed by seed."""
    values = list(dict.fromkeys(row[key] for row in rows))
    for other in values[1:] if key != "width" else values[-1:]:
        for moment in MOMENTS:
            parts = []
            for kind in kinds:
                quotients = []
                for seed in {row["seed"] for row in rows}:
                    found = {
                        r[key]: r[f"ratio{kind}"]
                        for r in rows
                        if r["seed"] == seed and r["moment"] == moment
                    }
                    if values[0] in found and other in found:
                        quotients.append(found[other] / found[values[0]])
                if quotients:
                    error = stdev(quotients) if len(quotients) > 1 else 0.0
                    parts.append(f"{kind.strip()}: {mean(quotients):.2f} ± {error:.2f}")
            print(f"{other} over {values[0]}, {moment}: {', '.join(parts)}")


def draw(options: argparse.Namespace, rows: list[dict]) -> None:
    parts = [part for part in PARTS if any(row["part"] == part for row in rows)]
    shapes = {"widths": 2, "curvatures": 1, "optimizers": 1}
    axes = list(np.atleast_1d(panels(sum(shapes[part] for part in parts), width=3.9)))
    colors, left = dict(zip(MOMENTS, (GREY, BLUE, RED), strict=True)), iter(axes)
    for part in parts:
        found = [row for row in rows if row["part"] == part]
        if part == "widths":
            for kind, title in ((" .01", "fixed k/D = .01"), (" k", f"fixed k = {options.fixed}")):
                draw_widths(next(left), found, kind, f"Width, {title}", colors)
        else:
            title = f"{part.capitalize()}, k/D = .05"
            draw_choices(next(left), found, PARTS[part], colors, title)
    save(axes[0], options.figure)


def draw_widths(ax: Any, rows: list[dict], kind: str, title: str, colors: dict[str, str]) -> None:
    for name, look in (("ratio", "o-"), ("layers", ":")):
        for moment, color in colors.items():
            groups = {v: f for (m, v), f in grouped(rows, "width").items() if m == moment}
            values = [spread(f, f"{name}{kind}") for f in groups.values()]
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


def draw_choices(ax: Any, rows: list[dict], key: str, colors: dict[str, str], title: str) -> None:
    groups, values = grouped(rows, key), list(dict.fromkeys(row[key] for row in rows))
    for i, (moment, color) in enumerate(colors.items()):
        places = [(j, v) for j, v in enumerate(values) if (moment, v) in groups]
        for name in ("ratio", "layers"):
            found = [spread(groups[moment, v], f"{name} .05") for _, v in places]
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
    out.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    out.add_argument("--widths", type=int, nargs="+", help="default 10 20 40 80; 5 10 20 40 digits")
    out.add_argument("--seeds", type=int, nargs="+", default=None, help="default 0 1 2")
    options = out.parse_args()
    check_figure(out, options)
    torch.set_num_threads(options.threads or 1)
    sys.stdout.reconfigure(line_buffering=True)
    options.side, options.steps, options.loss = (8, 20, 2.25) if options.quick else (16, 1000, 0.35)
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    if options.widths is None:
        options.widths = [5, 10, 20, 40] if options.data is None else [10, 20, 40, 80]
        options.widths = [5, 10] if options.quick else options.widths
    options.widths = sorted(set(options.widths))
    narrowest = make_net(options.side**2, hidden(options.widths[0]))
    options.fixed = max(1, round(SHARES[0] * parameter_count(narrowest)))
    return options


if __name__ == "__main__":
    main()
