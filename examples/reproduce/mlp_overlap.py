"""Overlap of masks with the top eigenspace, by k and by step, of the paper's MLP.

    python examples/reproduce/mlp_overlap.py                # digits, two minutes on a core
    python examples/reproduce/mlp_overlap.py --data DIR     # MNIST, DIR/MNIST/raw
        --figure mlp_overlap.png

At steps 0, 100, ..., 1000 the top k = 355 eigenpairs of the Hessian of 500 test images, and of 500
training images, and the overlap of their span with three masks of k parameters:

    magnitude   the k largest, the paper's
    best        the k of largest leverage in the span: no mask overlaps more
    random      k at random, mean of five

and, beside chance k/D, the level of random masks that keep as many entries of each weight matrix
and bias as the magnitude mask does: what lies between the two comes of which layers the large
parameters are in. The paper (Fernandez et al., TMLR 2025, arXiv 2504.14701) has the overlap from a
single-pass sketch, which is here too; one of that size is some thousandths above the exact overlap.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import torch
from mlp import Snapshot, chance_by_layer, converged, mlp_options, snapshots, source
from panels import BLUE, GREEN, GREY, ORANGE, RED, SKY, dress, panels, save
from results import Report, print_table

import hesscurv

PAPER = {0: 0.136, 100: 0.156, 1000: 0.094}
DRAWS = 5
MASKS = {"magnitude": BLUE, "best": GREEN, "random": GREY}


def main() -> None:
    options = mlp_options(__doc__)
    report = Report("reproduce mlp overlap", options)
    shots = snapshots(options, ("test", "train"), sketched=True)
    k, D = options.k, len(shots[0].magnitudes)
    chance, std = hesscurv.chance_overlap(k, D)
    rows = [row_of(shot, k) for shot in shots]
    shown = [shots[0], shots[1], shots[-1]]
    ks = sorted({round(k ** (i / 24)) for i in range(25)} | set(range(k, 0, -max(1, k // 20))))
    curves = {shot.step: by_k(shot, ks) for shot in shown}
    paper = PAPER if options.data and not options.quick else {}

    print(f"\noverlap at k = {k}; chance {chance:.4f} ± {std:.4f}")
    columns = ["magnitude", "single pass", "paper", "× chance", "same layers", "best", "random"]
    table = []
    for row in rows:
        names = ("magnitude test", "single pass", "paper", "ratio", "same layers", "best test")
        cells = {**row, "paper": paper.get(row["step"]), "ratio": row["magnitude test"] / chance}
        table.append([row["step"], *(cells[n] for n in names), row["random test"]])
        table[-1] += [row["magnitude train"], row["best train"]]
    print_table(["step", *columns, "magnitude, train", "best, train"], table)
    print("\nby k, test Hessian: overlap over chance k/D")
    print_table(
        ["k", *(f"{name}, {step}" for step in curves for name in ("magnitude", "best"))],
        [
            [
                n,
                *(
                    c[m][ks.index(n)] * D / n
                    for c in curves.values()
                    for m in ("magnitude", "best")
                ),
            ]
            for n in ks
            if n in (1, 10, k) or n in ks[:: len(ks) // 6]
        ],
    )
    report.rows += rows + [{"step": step, "ks": ks, **curve} for step, curve in curves.items()]
    print()
    judge(report, shots, rows, chance, std, paper)
    if options.figure:
        draw(rows, ks, curves, k, D, paper, source(options), options.figure)
    report.write()


def row_of(shot: Snapshot, k: int) -> dict[str, float]:
    """Return the overlaps of one step."""
    row, mask, D = {"step": shot.step}, shot.mask(k), len(shot.magnitudes)
    for name, pairs in shot.pairs.items():
        row[f"magnitude {name}"] = hesscurv.overlap(mask, pairs)
        row[f"best {name}"] = hesscurv.overlap(hesscurv.best_mask(pairs), pairs)
        draws = [hesscurv.overlap(random_mask(D, k, seed), pairs) for seed in range(DRAWS)]
        row[f"random {name}"] = mean(draws)
    row["same layers"] = chance_by_layer(mask, shot.pairs["test"])
    row["test and train"] = hesscurv.overlap(shot.pairs["test"], shot.pairs["train"])
    row["single pass"] = hesscurv.overlap(mask, shot.sketch)
    return row


def random_mask(D: int, k: int, seed: int) -> torch.Tensor:
    return hesscurv.random_mask(D, k, generator=torch.Generator().manual_seed(seed))


def by_k(shot: Snapshot, ks: list[int]) -> dict[str, list[float]]:
    """Return the overlap of k-masks with the top k eigenvectors of the test Hessian, by k."""
    pairs, D = shot.pairs["test"], len(shot.magnitudes)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(D, generator=generator).float() for _ in range(DRAWS)]
    random = [hesscurv.overlap_by_k(order, pairs, ks) for order in orders]
    # The best masks of two k are not nested: each is of its own leverage scores.
    best = [hesscurv.overlap(hesscurv.best_mask(pairs, k), pairs.truncate(k)) for k in ks]
    return {
        "magnitude": hesscurv.overlap_by_k(shot.magnitudes, pairs, ks).tolist(),
        "best": best,
        "random": torch.stack(random).mean(0).tolist(),
    }


def judge(
    report: Report, shots: list[Snapshot], rows: list[dict], chance: float, std: float, paper: dict
) -> None:
    report.judge("every eigenpair converged", *converged(shots))
    for data in ("test", "train"):
        least = min(row[f"magnitude {data}"] for row in rows)
        report.judge(
            f"the magnitude mask is above chance at every step, {data} Hessian",
            least > chance + 3 * std,
            f"at least {least:.4f}, chance {chance:.4f} ± {std:.4f}",
        )
    report.judge(
        "no mask is above the best one",
        all(
            row[f"best {data}"] >= max(row[f"magnitude {data}"], row[f"random {data}"])
            for row in rows
            for data in ("test", "train")
        ),
        f"best {min(r['best test'] for r in rows):.3f} to {max(r['best test'] for r in rows):.3f}",
    )
    for step, value in paper.items():
        ours = next(row["single pass"] for row in rows if row["step"] == step)
        report.judge(
            f"step {step}: single pass within .02 of the paper's",
            abs(ours - value) <= 0.02,
            f"{ours:.4f}, paper {value}",
        )


def draw(
    rows: list[dict],
    ks: list[int],
    curves: dict[int, dict[str, list[float]]],
    k: int,
    D: int,
    paper: dict[int, float],
    data: str,
    path: Path,
) -> None:
    by_step, by_rank, ratio = panels(3, width=4.5)
    steps, (chance, std) = [row["step"] for row in rows], hesscurv.chance_overlap(k, D)
    for name, color in MASKS.items():
        for data_name, look in (("test", "-"), ("train", "--")):
            values = [row[f"{name} {data_name}"] for row in rows]
            label = f"{name}, {data_name} Hessian" if name != "random" or look == "-" else None
            by_step.plot(steps, values, look, color=color, linewidth=1.8, label=label)
    layers = [row["same layers"] for row in rows]
    by_step.plot(steps, layers, ":", color=ORANGE, linewidth=1.8, label="random, same layers")
    if paper:
        look = {"color": RED, "markerfacecolor": "none"}
        by_step.plot(paper.keys(), paper.values(), "D", label="magnitude, the paper's", **look)
    by_step.axhspan(chance - 3 * std, chance + 3 * std, color=GREY, alpha=0.35)
    top = 1.75 * max(row["best test"] for row in rows)
    dress(
        by_step,
        f"By step, k = {k}, {data}",
        legend={"loc": "upper right", "ncols": 1},
        xlabel="training step",
        ylabel="overlap",
        ylim=(0, top),
    )
    levels = [hesscurv.chance_overlap(n, D) for n in ks]
    for axes, scale in ((by_rank, [1] * len(ks)), (ratio, [D / n for n in ks])):
        low = [max(1e-3, (c.mean - 3 * c.std) * s) for c, s in zip(levels, scale, strict=True)]
        high = [(c.mean + 3 * c.std) * s for c, s in zip(levels, scale, strict=True)]
        axes.fill_between(
            ks, low, high, color=GREY, alpha=0.35, linewidth=0, label="chance ± 3 std"
        )
        for (step, curve), color in zip(curves.items(), (SKY, BLUE, "black"), strict=True):
            for name, look in (("magnitude", "-"), ("best", "--"), ("random", ":")):
                values = [v * s for v, s in zip(curve[name], scale, strict=True)]
                label = f"{name}, step {step}" if name == "magnitude" else None
                axes.plot(ks, values, look, color=color, linewidth=1.8, label=label)
    for look, name in (("--", "best masks"), (":", "random masks")):
        by_rank.plot([], [], look, color=GREY, linewidth=1.8, label=name)
    dress(
        by_rank, "By k, test Hessian", legend={"loc": "upper right"}, xlabel="k", ylabel="overlap"
    )
    highest = max(max(curve["best"]) for curve in curves.values())
    by_rank.set(xlim=(0, k), ylim=(0, 1.75 * highest), ylabel="overlap")
    dress(
        ratio,
        "The same over chance k / D",
        xlabel="k",
        ylabel="overlap / chance",
        xscale="log",
        yscale="log",
        ylim=(0.1, None),
        xlim=(1, k),
    )
    save(ratio, path)


if __name__ == "__main__":
    main()
