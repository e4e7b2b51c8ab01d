"""Watch the Hessian of a small net while it trains on digits, without changing the training.

A plain loop with a `CurvatureMonitor`, dense at first and sparse later. Printed are the sharpness
beside what the learning rate can bear, the share of the gradient that lies in the top eigenspace,
how much the largest weights overlap with that space, and how fast the space and the mask of the
largest weights settle. The same loop without the monitor ends with the same weights, bit for bit.

    pip install 'hesscurv[examples]'
    python examples/watch_training.py                        # under a minute
    python examples/watch_training.py --report run.html      # the figures too, on one page
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import hesscurv
from hesscurv.hooks import CurvatureMonitor, JSONLinesWriter, dense_then_sparse, read_records

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
K = 30


def load_data():
    """Return 1,297 digits to train on, and 500 that only the monitor sees."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[500:], y[500:]), [(x[:500], y[:500])]


def train(data, steps, watch=None):
    """Train a net by SGD; `watch` makes a monitor of it. Return the net and the monitor."""
    x, y = data
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    monitor = None if watch is None else watch(model, optimizer)
    for step in range(steps):
        part = torch.randint(len(y), (100,))
        optimizer.zero_grad()
        TASK(model, (x[part], y[part])).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step(step)
    return model, monitor


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page with figures")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)
    steps = 601 if args.quick else 3001
    data, probe = load_data()

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        lines = Path(folder) / "curvature.jsonl"

        def watch(model, optimizer):
            return CurvatureMonitor(
                model,
                TASK,
                probe,
                k=K,
                quantities="full",
                schedule=dense_then_sparse(until=100, dense=25, sparse=250),
                optimizer=optimizer,
                loggers=[JSONLinesWriter(lines)],
            )

        model, monitor = train(data, steps, watch)
        assert read_records(lines) == monitor.records

    print(" step  loss  sharpness  stable rate  gradient  overlap (z)   space   mask  products")
    for r in monitor.records:
        print(
            f"{r['step']:5d} {r['loss']:5.3f} {r['sharpness']:10.3g} {r['stable_rate']:12.3g} "
            f"{r['gradient_share']:9.2f} {r['overlap']:8.3f} ({r['overlap_z_score']:3.0f}) "
            f"{r.get('space_overlap', float('nan')):7.3f} {r.get('mask_iou', float('nan')):6.2f} "
            f"{r['num_matvecs']:9d}"
        )
    if args.report is not None:
        monitor.report(args.report)
        print(f"\nFigures in {args.report}.")

    plain, _ = train(data, steps)
    first, last = monitor.records[0], monitor.records[-1]
    cost = sum(r["seconds"] for r in monitor.records)
    print(f"\n{len(monitor.records)} measurements of {K} eigenpairs, {cost:.1f} s.")
    print(f"{time.perf_counter() - start:.0f} s in all.")

    same = zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same), "the monitor has changed the training"
    assert all(r["status"] == "ok" for r in monitor.records)
    D = sum(p.numel() for p in model.parameters())
    assert first["gradient_share"] > 3 * K / D, "the gradient is not in the top eigenspace"
    second = monitor.records[1]
    assert last["space_overlap"] > second["space_overlap"], "the eigenspace does not settle"
    assert last["mask_iou"] > second["mask_iou"], "the mask does not settle"
    assert last["num_matvecs"] <= 3 * K + 16, "a refresh took more than three products a pair"


if __name__ == "__main__":
    main()
