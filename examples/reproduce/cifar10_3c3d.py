"""The paper's 3c3d (895,210 parameters) on CIFAR-10: 1000 Hessian eigenpairs while it trains.

    python examples/reproduce/cifar10_3c3d.py --data DIR --folder WORK   # 2 cores, 24 GB, hours
    python examples/reproduce/cifar10_3c3d.py --quick                    # seconds, a smoke test

Training as in the paper (Fernandez et al., TMLR 2025, arXiv 2504.14701), as far as it says: SGD
with batches of 128, rate 0.0226, cross-entropy; no momentum, weight decay or augmentation. The
network is DeepOBS's, and so is its initialisation here: Xavier, normal for convolutions and uniform
for dense layers, zero biases. (With `--init default`, PyTorch's, the largest parameters lie
elsewhere at the start, and so does the overlap.) Images are normalised by CIFAR-10's own mean and
deviation. At steps 0, 2000 and 8000 the Hessian, in eval mode, on the first 50 test images of each
class: its top 1000 eigenpairs, and their overlap with the axes of the 1000 largest parameters. Test
loss and accuracy are of all test images.

`--data` is the folder that holds `cifar-10-batches-py`; without it, scikit-learn's digits enlarged
to 3x32x32. In `--folder` lie the weights, a checkpoint of every decomposition, and what is done:
after a kill, the same command goes on. Each decomposition has a process of its own, whose peak
memory is printed; minutes are of operator and eigsh, over all pieces of a run that was killed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from decompositions import (
    decompose,
    in_own_process,
    judge_pairs,
    print_plan,
    shared_options,
    show,
    start,
    work_folder,
)
from models import three_c_three_d
from results import Report
from torch import nn
from torch.nn import functional as F
from training import (
    Images,
    check_cifar10,
    colour_images,
    load_weights,
    loss_and_accuracy,
    shuffled,
    train,
)

PAPER_RATIO = {0: 17.0, 8000: 9.0}  # overlap over chance, by its single pass
PAPER_MINUTES = 97  # a decomposition, on a node of a GPU cluster
MOST_MINUTES, MOST_GB = 45, 14


def main() -> None:
    options = parse()
    check_cifar10(options.data)
    if options.worker is not None:
        work(options)
        return
    source = "digits" if options.data is None else "CIFAR-10"
    settings = {"script": "3c3d", "data": source, "seed": options.seed, "init": options.init}
    work_folder(options, settings)
    report = Report("reproduce 3c3d", options)
    images = colour_images(options.data)
    if options.data is None:
        print(f"No --data: {images.source}, not CIFAR-10. Nothing here is the paper's.")
    print_plan(options, three_c_three_d(), images.source)

    images.hessian_batches(options.samples, options.batch, "cpu")  # or say that it cannot be had
    train_as_in_paper(options, images)
    del images
    for step in options.steps:
        report.rows.append(in_own_process(options, step))
    show(report.rows, PAPER_RATIO if options.data else None)
    for row in report.rows:
        judge_pairs(report, row)
        judge_cost(report, row)
    report.write()


def train_as_in_paper(options: argparse.Namespace, images: Images) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(options.seed)
        model = three_c_three_d()
        if options.init == "deepobs":
            initialize_as_deepobs(model)
        model.to(options.device)
        return model, torch.optim.SGD(model.parameters(), lr=0.0226)

    def loss_of(model: nn.Module, part: torch.Tensor, step: int) -> torch.Tensor:
        x, y = images.x[part].to(options.device), images.y[part].to(options.device)
        return F.cross_entropy(model(x), y)

    batches = shuffled(len(images.y), 128, options.seed)
    train(options.folder, options.steps, make, batches, loss_of)


def initialize_as_deepobs(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(module.bias)


def judge_cost(report: Report, row: dict) -> None:
    """Say whether minutes and memory are below the bounds, for the paper's problem alone."""
    options, step = report.options, row["step"]
    papers = options.data is not None and row["k"] == 1000 and row["samples"] == 500
    minutes, gigabytes = row["seconds"] / 60, row["peak_bytes"] / 1e9
    report.judge(
        f"step {step}: under {MOST_MINUTES} minutes",
        minutes < MOST_MINUTES if papers else None,
        f"{minutes:.3g} minutes in {row['pieces']} piece(s); the paper took {PAPER_MINUTES}",
    )
    report.judge(
        f"step {step}: under {MOST_GB} GB",
        gigabytes < MOST_GB if papers else None,
        f"{gigabytes:.3g} GB at its peak",
    )
    if papers and step in PAPER_RATIO:
        print(f"step {step}: {row['ratio']:.3g} times chance; paper {PAPER_RATIO[step]:g} times")


def work(options: argparse.Namespace) -> None:
    """Decompose the Hessian of one step, in this process."""
    images, device = colour_images(options.data, test_only=True), options.device
    model = load_weights(three_c_three_d(), options.folder, options.worker, device)
    facts = loss_and_accuracy(model, images.x_test, images.y_test, device)
    batches = images.hessian_batches(options.samples, options.batch, device)
    del images
    decompose(options, model, nn.CrossEntropyLoss(), batches, facts)


def parse() -> argparse.Namespace:
    out = shared_options(__doc__)
    out.add_argument("--steps", type=int, nargs="+", help="where to measure; default 0 2000 8000")
    out.add_argument("--init", choices=["deepobs", "default"], default="deepobs")
    options = out.parse_args()
    defaults = {"steps": [0, 2000, 8000], "k": 1000, "samples": 500, "batch": 500}
    quick = {"steps": [0, 3], "k": 5, "samples": 20, "batch": 20}
    start(options, quick if options.quick else defaults)
    if min(options.steps) < 0:
        out.error(f"--steps: expected numbers from 0, got {options.steps}")
    options.steps = sorted(set(options.steps))
    return options


if __name__ == "__main__":
    main()
