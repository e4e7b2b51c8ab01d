"""An optimizer, and the same one with the top Hessian eigenspace damped, on ill-conditioned data.

Least squares on random features of scikit-learn's digits, odd ones told from even ones: the
curvature falls by four orders of magnitude within a hundred directions. SGD's learning rate is
bounded by the steepest of them, and all others wait. `PreconditionedOptimizer` damps the steepest
ones, leaves the rest as it is, and sets the rate to a share of what is stable then. Both train by
the same mini-batches; SGD has the best of several rates. Losses are above the least one there is.

    pip install 'hesscurv[examples]'
    python examples/precondition.py                        # under a minute
    python examples/precondition.py --figure rate.png      # the same, drawn too
"""

import argparse
import functools
import math
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv.optim import PreconditionedOptimizer

BATCH = 50
HEIGHT = "training loss above the least"
TASK = hesscurv.supervised(nn.MSELoss())


def load_data(features):
    """Return random ReLU features of 1,500 digits, and whether each is odd, 1 or -1."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    y = (2.0 * (y % 2) - 1)[:, None]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=generator)[:1500]
    weights = torch.randn(x.shape[1], features, generator=generator) / math.sqrt(x.shape[1])
    return F.relu(x[order] @ weights), y[order]


def least_loss(data):
    """Return the loss of the least-squares solution."""
    x, y = (t.double() for t in data)
    return float((x @ torch.linalg.lstsq(x, y, driver="gelsd").solution - y).square().mean())


def train(data, make, epochs, least):
    """Return the optimizer, and by epoch: seconds of training, and the loss above the least."""
    (x, y), generator = data, torch.Generator().manual_seed(1)
    model = nn.Linear(x.shape[1], 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer, seconds, curve = make(model), 0.0, []
    for _ in range(epochs):
        start = time.perf_counter()
        for index in torch.randperm(len(y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            TASK(model, (x[index], y[index])).backward()
            optimizer.step()
        seconds += time.perf_counter() - start
        with torch.no_grad():
            curve.append((seconds, float(TASK(model, data)) - least))
    return optimizer, curve


def plot(path, curves, report):
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo figure: it needs matplotlib, pip install 'hesscurv[examples]'.")
        return
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    style |= {"axes.titlesize": 11, "legend.fontsize": 9, "legend.frameon": False}
    matplotlib.rcParams.update(style | {"lines.linewidth": 1.8})
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_epoch, by_second, spectrum = figure.subplots(1, 3)
    for (label, curve), color in zip(curves.items(), ("#888888", "#0072B2"), strict=True):
        losses = [loss for _, loss in curve]
        epochs = range(1, len(curve) + 1)
        by_epoch.semilogy(epochs, losses, color=color, label=label)
        by_second.semilogy([s for s, _ in curve], losses, color=color, label=label)
    by_epoch.set(xlabel="epoch", ylabel=HEIGHT)
    by_epoch.set_title("The same mini-batches")
    by_epoch.legend()
    by_second.set(xlabel="seconds, the eigenspace's included", ylabel=HEIGHT)
    by_second.set_title("The same clock")
    before = [abs(value) for value in report.eigenvalues[: len(report.gains)]]
    after = [gain * value for gain, value in zip(report.gains, before, strict=True)]
    places = range(1, len(before) + 1)
    spectrum.loglog(places, before, ".", color="#888888", label="Hessian")
    spectrum.loglog(places, after, ".", color="#0072B2", label="preconditioned")
    spectrum.set(xlabel="i", ylabel="|eigenvalue i|")
    spectrum.set_title("What bounds the learning rate")
    spectrum.legend(loc="upper right")
    figure.savefig(path, dpi=110)
    print(f"\nFigure in {path}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the curves there")
    parser.add_argument("--quick", action="store_true", help="fewer features, epochs and pairs")
    args = parser.parse_args()
    if args.figure is not None and not args.figure.resolve().parent.is_dir():
        parser.error(f"--figure: there is no folder {args.figure.resolve().parent}")
    features, epochs, rank = (100, 10, 40) if args.quick else (500, 40, 100)
    start = time.perf_counter()
    torch.set_num_threads(1)
    data = load_data(features)
    least = least_loss(data)

    print("SGD, the loss after", epochs, "epochs by rate:")
    runs = {}
    for rate in (0.001, 0.003, 0.01, 0.03, 0.1):
        sgd = functools.partial(torch.optim.SGD, lr=rate)
        runs[rate] = train(data, lambda m, sgd=sgd: sgd(m.parameters()), epochs, least)[1]
        print(f"  {rate:5.3g}  {runs[rate][-1][1]:.4f}  in {runs[rate][-1][0]:.2f} s")
    best = min(runs, key=lambda rate: runs[rate][-1][1] if math.isfinite(runs[rate][-1][1]) else 9)
    plain = runs[best]

    def make(model):
        sgd = torch.optim.SGD(model.parameters(), best)
        options = {"rank": rank, "refresh_every": 10_000, "learning_rate": "auto"}
        # Curvature from samples of its own is the better choice where there are more of them.
        return PreconditionedOptimizer(sgd, model, TASK, [data], samples=750, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, curve = train(data, make, epochs, least)
    report = optimizer.report()
    print(f"\nThe same, preconditioned, after {epochs} epochs: {curve[-1][1]:.4f}\n{report}")
    reached = next((i for i, (_, loss) in enumerate(curve, 1) if loss <= plain[-1][1]), None)
    assert reached is not None, "SGD's loss has not been reached"
    print(
        f"\nSGD's loss of {plain[-1][1]:.4f}, {epochs} epochs and {plain[-1][0]:.2f} s of it, is "
        f"reached in {reached} epochs and {curve[reached - 1][0]:.2f} s."
    )
    if args.figure is not None:
        sgd = functools.partial(torch.optim.SGD, lr=best)
        longer = train(data, lambda m: sgd(m.parameters()), 3 * epochs, least)[1]
        plot(args.figure, {f"SGD, rate {best:g}": longer, "preconditioned": curve}, report)
    print(f"{time.perf_counter() - start:.0f} s in all.")
    assert reached <= epochs / 4, "preconditioning has saved fewer than three epochs of four"
    assert max(report.gains) <= 1, "a direction is amplified"


if __name__ == "__main__":
    main()
