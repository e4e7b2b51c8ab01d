"""All seven metrics between mask and eigenspace beside chance, on the paper's MLP.

    python examples/reproduce/mlp_metrics.py                # digits, a minute on a core
    python examples/reproduce/mlp_metrics.py --data DIR     # MNIST, DIR/MNIST/raw
        --figure mlp_metrics.png

A mask of k parameters and the top k eigenvectors of the Hessian (500 test images) are two points of
one Grassmann manifold. At steps 0, 100, ..., 1000 of training: the six distances between them that
the paper (Fernandez et al., TMLR 2025, arXiv 2504.14701) compares, each divided by its value for
orthogonal spaces, and the overlap. Beside, the same for the mask and random spaces, of the same k
and D, and for random spaces over all k/D. A distance is of use where the two can be told apart:
three of the six depend on the largest angles, which are near 90 degrees for any two spaces like
these.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import torch
from mlp import converged, mlp_options, snapshots, source
from panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, dress, panels, save
from results import Report, print_table

import hesscurv

PAPER = {"geodesic": 0.755, "chordal_f": 0.782, "projection_f": 0.894}  # random, k/D = .2
SATURATED = ("chordal_2", "projection_2", "fubini_study")
NAMES = (*PAPER, *SATURATED, "overlap")
COLORS = dict(zip(NAMES, (BLUE, GREEN, ORANGE, RED, PURPLE, SKY, "black"), strict=True))
DRAWS = 5
DENSITIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)


def main() -> None:
    options = mlp_options(__doc__)
    report = Report("reproduce mlp metrics", options)
    shots = snapshots(options)
    k, D = options.k, len(shots[0].magnitudes)
    rows = [{"step": s.step, **metrics(s.mask(k), s.pairs["test"].eigenvectors)} for s in shots]
    random = [metrics(shots[-1].mask(k), random_space(D, k, seed)) for seed in range(DRAWS)]
    by_density = {density: random_metrics(density, options) for density in DENSITIES}
    report.rows += rows + [{"random k/D": density, **v} for density, v in by_density.items()]

    print("\nmask of the largest weights and top eigenspace; distances over their maxima")
    print_table(["step", *NAMES], [[row["step"], *(row[n] for n in NAMES)] for row in rows])
    print(f"\nthe mask and random spaces of the same k and D, {DRAWS} draws")
    chance = {n: [values[n] for values in random] for n in NAMES}
    print_table(
        ["", *NAMES],
        [[name, *(f(chance[n]) for n in NAMES)] for name, f in (("mean", mean), ("std", stdev))],
    )
    z = {n: z_score(rows, chance[n], n) for n in NAMES}
    print("\nhow many of these standard deviations the closest of the steps is away from random")
    print_table(["", *NAMES], [["smallest |z|", *(z[n] for n in NAMES)]])
    print("\nrandom spaces, by k/D")
    print_table(["k/D", *NAMES], [[d, *(v[n] for n in NAMES)] for d, v in by_density.items()])
    print()
    report.judge("every eigenpair converged", *converged(shots))
    for name, value in PAPER.items():
        ours = by_density[0.2][name]
        report.judge(
            f"random spaces, k/D = .2: {name} within .005 of the paper's",
            abs(ours - value) <= 0.005,
            f"{ours:.4f}, paper {value}",
        )
    for name in SATURATED:
        least = min(row[name] for row in rows)
        report.judge(f"{name} is saturated, above .99, at every step", least > 0.99, f"{least:.5f}")
    if options.figure:
        draw(rows, chance, by_density, k, D, source(options), options.figure)
    report.write()


def metrics(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Return all six distances, normalised, and the overlap."""
    distances = hesscurv.grassmann_distances(a, b, normalized=True)
    return {**distances, "overlap": hesscurv.overlap(a, b)}


def random_space(D: int, k: int, seed: int) -> torch.Tensor:
    """Return an orthonormal basis (D, k) of a uniformly random space."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, k, generator=generator)).Q


def random_metrics(density: float, options) -> dict[str, float]:
    """Return the mean metrics of a mask and a random space, of rank `density` * D."""
    D = 400 if options.quick else 2000
    k = round(density * D)
    mask = torch.arange(D) < k  # every mask is alike to a random space
    draws = [metrics(mask, random_space(D, k, seed)) for seed in range(3)]
    return {name: mean(values[name] for values in draws) for name in NAMES}


def z_score(rows: list[dict], chance: list[float], name: str) -> float | None:
    """Return the least distance of a step from chance, in standard deviations of a draw."""
    # Saturated metrics have no spread to speak of: float64 rounds them to 1.
    if (spread := stdev(chance)) < 1e-12:
        return None
    return min(abs(row[name] - mean(chance)) for row in rows) / spread


def draw(
    rows: list[dict], chance: dict, by_density: dict, k: int, D: int, data: str, path: Path
) -> None:
    by_step, by_k, gap = panels(3, width=4.4)
    steps = [row["step"] for row in rows]
    # Three lie on one line near 1: other dashes let all be seen.
    dashes = {"chordal_2": (0, (5, 4)), "projection_2": (3, (3, 6)), "fubini_study": (0, (1, 3))}
    for name in NAMES:
        look = {"color": COLORS[name], "linewidth": 1.8, "linestyle": dashes.get(name, "-")}
        label = name.replace("_", "-")
        by_step.plot(steps, [row[name] for row in rows], label=label, **look)
        by_k.plot(by_density.keys(), [v[name] for v in by_density.values()], label=label, **look)
        by_step.axhline(mean(chance[name]), color=COLORS[name], linewidth=1, alpha=0.45)
        if name not in SATURATED:
            distance = [abs(row[name] - mean(chance[name])) for row in rows]
            relative = [d / mean(chance[name]) for d in distance]
            gap.plot(steps, relative, marker="o", markersize=4, label=label, **look)
    by_k.plot([0.2] * 3, PAPER.values(), "D", color="black", markerfacecolor="none", label="paper")
    legend = {"loc": (0.02, 0.32), "ncols": 2}
    dress(by_step, f"Mask and eigenspace, {data}", legend=legend, ylim=(0, 1.04))
    by_step.set(xlabel="training step", ylabel="distance / its maximum, or overlap")
    by_step.text(
        0.02, 0.26, "faint: the same mask and random spaces", transform=by_step.transAxes, size=9
    )
    dress(by_k, "Mask and random space", ylim=(0, 1.04), xlim=(0, 0.5), xlabel="k / D")
    handles, labels = by_k.get_legend_handles_labels()
    by_k.legend(handles[-1:], labels[-1:], fontsize=9, frameon=False, loc="lower right")
    dress(
        gap,
        f"How far from random, k = {k}, D = {D:,}",
        legend={"loc": "center right"},
        xlabel="training step",
        ylabel="|value - random| / random",
        yscale="log",
    )
    for ax in (by_step, gap):
        ax.set_xlim(0, None)
    by_k.axvline(k / D, color=GREY, linestyle=":", linewidth=1)
    save(gap, path)


if __name__ == "__main__":
    main()
