"""Draw how a net's curvature changes while it trains, with `hesscurv.plots`.

Full-batch gradient descent on 500 of scikit-learn's digits, watched by a `CurvatureMonitor`. The
sharpness shoots past 2 / learning rate, above which a step along the first eigenvector overshoots,
and falls with the loss; the eigenspace, which was new at each look in the beginning, settles.

    pip install 'hesscurv[examples]'
    python examples/figures.py                        # under a minute; figures.png
    python examples/figures.py --report run.html      # all that was recorded, on one page
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import hesscurv
from hesscurv import plots

TASK = hesscurv.supervised(nn.CrossEntropyLoss())


def load_data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.data[:500]).float() / 16, torch.tensor(digits.target[:500])


def train(data, rate, steps):
    """Train, and return the monitor."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    monitor = hesscurv.hooks.CurvatureMonitor(
        *(model, TASK, [data]),
        k=20,
        quantities="full",
        schedule=hesscurv.hooks.dense_then_sparse(until=100, dense=10, sparse=50),
        optimizer=optimizer,
        options=hesscurv.hooks.MonitorOptions(history=30),
    )
    for step in range(steps + 1):
        monitor.step(step)
        optimizer.zero_grad()
        TASK(model, data).backward()
        optimizer.step()
    return monitor


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("figures.png"), help="the figure's file")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page of all, too")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    monitor = train(load_data(), rate=0.5, steps=100 if args.quick else 500)

    figure = Figure(figsize=(13, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plots.sharpness(monitor, left)
    plots.space_overlaps(monitor, middle)
    plots.leverage(monitor, right)
    figure.savefig(args.out, dpi=110)
    print(f"Figure in {args.out}.")
    if args.report is not None:
        monitor.report(args.report)
        print(f"Page in {args.report}.")

    print(" step   loss  sharpness  2 / rate  overlap with the last space")
    for r in monitor.records:
        print(f"{r['step']:5d}  {r['loss']:.3f}  {r['sharpness']:9.3f}", end="")
        print(f"  {2 / r['learning_rate']:8.1f}  {r.get('space_overlap', float('nan')):.3f}")
    assert all(record["status"] == "ok" for record in monitor.records)
    highest = max(record["sharpness_ratio"] for record in monitor.records)
    assert highest > 1, f"the sharpness stays at {highest:.2f} of 2 / learning rate"
    settled, early = (monitor.records[i]["space_overlap"] for i in (-1, 1))
    assert settled > early, "the eigenspace does not settle"


if __name__ == "__main__":
    main()
