"""Settling of the largest weights and of the top eigenspace of the paper's MLP, at all steps.

    python examples/reproduce/mlp_crystallisation.py                # digits, a minute on a core
    python examples/reproduce/mlp_crystallisation.py --data DIR     # MNIST, DIR/MNIST/raw
        --figure mlp_crystallisation.png

The paper's claim (Fernandez et al., TMLR 2025, arXiv 2504.14701): early in training the mask of the
k largest parameters crystallises, and so does the span of the top k eigenvectors of the Hessian.
Here for every two of the steps 0, 100, ..., 1000: the intersection over union of their masks, and
the overlap of their eigenspaces, of the Hessian on 500 test images. Two random masks have the IoU
k / (2 D - k), nearly, two random spaces the overlap k / D.
"""

from __future__ import annotations

from pathlib import Path

from mlp import Snapshot, converged, mlp_options, snapshots, source
from panels import BLUE, GREY, RED, dress, panels, save
from results import Report, print_table

import hesscurv
from hesscurv import plots


def main() -> None:
    options = mlp_options(__doc__)
    report = Report("reproduce mlp crystallisation", options)
    shots = snapshots(options)
    k, D = options.k, len(shots[0].magnitudes)
    records = compare(shots, k)
    chance = {"mask_ious": k / (2 * D - k), "space_overlaps": k / D}
    report.rows += [{"k": k, "D": D, **record} for record in records]

    for key, name in (("mask_ious", "IoU of masks"), ("space_overlaps", "overlap of spaces")):
        print(f"\n{name} of two steps; chance {chance[key]:.4f}")
        steps = [record["step"] for record in records]
        print_table(
            ["step", *map(str, steps[:-1])],
            [[r["step"], *(v for _, v in r[key]), *[None] * (len(steps) - 1 - len(r[key]))]
             for r in records[1:]],
        )  # fmt: skip
    print("\nwith the measurement before, and with the last one")
    print_table(
        ["step", "mask IoU", "space overlap", "mask IoU, last", "space overlap, last"],
        [[r["step"], *(s[r["step"]] for s in series(records).values())] for r in records[1:-1]],
    )
    print()
    report.judge("every eigenpair converged", *converged(shots))
    for key, name in (("mask_ious", "mask"), ("space_overlaps", "eigenspace")):
        first, last = records[1][key][0][1], records[-1][key][-1][1]
        report.judge(
            f"the {name} crystallises: more like its last self at the end than at the start",
            None if options.quick else last > first,
            f"{first:.3f} from step {records[0]['step']} to {records[1]['step']}, {last:.3f} from "
            f"{records[-2]['step']} to {records[-1]['step']}; chance {chance[key]:.3f}",
        )
    if options.figure:
        draw(records, chance, source(options), options.figure)
    report.write()


def compare(shots: list[Snapshot], k: int) -> list[dict]:
    """Return a record a step, like those of a monitor, that compares it with all earlier ones."""
    records = []
    for i, shot in enumerate(shots):
        mask, pairs = shot.mask(k), shot.pairs["test"]
        records.append(
            {
                "step": shot.step,
                "mask_ious": [
                    [s.step, hesscurv.intersection_over_union(s.mask(k), mask)] for s in shots[:i]
                ],
                "space_overlaps": [
                    [s.step, hesscurv.overlap(s.pairs["test"], pairs)] for s in shots[:i]
                ],
            }
        )
    return records


def series(records: list[dict]) -> dict[str, dict[int, float]]:
    """Return, by step, the likeness of mask and space to those before, and to the last ones."""
    before = {
        key: {r["step"]: r[key][-1][1] for r in records[1:]}
        for key in ("mask_ious", "space_overlaps")
    }
    last = {f"{key}, last": dict(records[-1][key]) for key in before}
    return before | last


def draw(records: list[dict], chance: dict[str, float], data: str, path: Path) -> None:
    masks, spaces, curves = panels(3, width=4.7)
    plots.mask_ious(records, masks)
    plots.space_overlaps(records, spaces)
    masks.set_title(f"Masks of the largest weights, {data}", loc="left", fontsize=11)
    spaces.set_title("Top eigenspaces of the Hessian", loc="left", fontsize=11)
    looks = {"mask_ious": (RED, "mask, IoU"), "space_overlaps": (BLUE, "space, overlap")}
    for key, points in series(records).items():
        color, name = looks[key.partition(",")[0]]
        end = key.endswith("last")
        label = f"{name} with the {'last step' if end else 'step before'}"
        curves.plot(points.keys(), points.values(), "--" if end else "o-", color=color, label=label)
    curves.axhline(chance["space_overlaps"], linestyle=":", color=GREY, label="chance (overlap)")
    dress(
        curves,
        "Likeness to other steps",
        legend={"loc": (0.3, 0.07)},
        xlabel="training step",
        ylim=(0, 1),
    )
    save(curves, path)


if __name__ == "__main__":
    main()
