"""Worth of the overlap with the top eigenspace for pruning: masks by four scores, compared.

The leverage score of a weight, ``sum_j V_ij^2`` over the top k Hessian eigenvectors, says how much
of it lies in their space. The mask of the largest leverages overlaps most with the eigenspace, of
all masks of its size. Here a small net, trained on scikit-learn's digits, is pruned to a range of
sparsities, without any training after it, by

    leverage     the eigenvectors alone: the weights' values play no part
    magnitude    |w|, the weights' values alone
    OBD          w^2 sum_j |lambda_j| V_ij^2 / 2 and a constant for the rest: both, the same space
    random       neither

and for each mask the test accuracy, its overlap with the eigenspace and the overlaps of the masks
with each other are printed. Biases stay dense, and the Hessian is that of the weights alone.

    pip install 'hesscurv[examples]'
    python examples/leverage_pruning.py                      # three nets; seconds
    python examples/leverage_pruning.py --figure pruning.png # the same, drawn too, as in the README
"""

import argparse
import copy
import itertools
import time
from pathlib import Path
from statistics import mean, pstdev

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import hesscurv
from hesscurv.pruning import curvature_global, find_weights, masks_of, saliency

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
METHODS = ("leverage", "magnitude", "OBD", "random")
PAIRS = tuple(itertools.combinations(METHODS[:3], 2))


def load_data():
    """Return (images, labels) to train on, and 500 others to test on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return (x[order[500:]], y[order[500:]]), (x[order[:500]], y[order[:500]])


def train_net(data, epochs):
    x, y = data
    net = nn.Sequential(
        *(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for index in itertools.chain(*(torch.randperm(len(y)).split(50) for _ in range(epochs))):
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
    return net


@torch.no_grad()
def accuracy(net, data):
    return float((net(data[0]).argmax(1) == data[1]).double().mean())


def pruned(net, pairs, method, sparsity):
    """Return a pruned copy, over all layers together."""
    net = copy.deepcopy(net)
    weights = find_weights(net).values()
    if method == "magnitude":
        prune.global_unstructured(weights, prune.L1Unstructured, amount=sparsity)
    elif method == "random":
        prune.global_unstructured(weights, prune.RandomUnstructured, amount=sparsity)
    else:
        curvature_global(weights, sparsity, saliency(net, pairs, method.lower()))
    return net


def measure(net, pairs, test, sparsity):
    """Return accuracies, overlaps with the eigenspace over chance, and overlaps of the masks."""
    row, masks = {"sparsity": sparsity}, {}
    for method in METHODS:
        copied = pruned(net, pairs, method, sparsity)
        masks[method] = mask = pairs.layout.flatten(masks_of(copied))
        chance = hesscurv.chance_overlap(int(mask.sum()), len(mask), k2=len(pairs.eigenvalues)).mean
        row["accuracy", method] = accuracy(copied, test)
        row["overlap", method] = hesscurv.overlap(mask, pairs)
        row["ratio", method] = row["overlap", method] / chance
        row["chance"], row["density"] = chance, float(mask.double().mean())
    for one, other in PAIRS:
        row["masks", one, other] = hesscurv.overlap(masks[one], masks[other])
    return row


def average(rows):
    """Return the rows of one sparsity by seed as their mean, and standard deviation."""
    return tuple({key: f([row[key] for row in rows]) for key in rows[0]} for f in (mean, pstdev))


def print_tables(table, dense, k, D):
    print(f"\nTest accuracy, mean ± std over the nets; dense {dense:.1%}")
    print(f"{'sparsity':>8}" + "".join(f"{method:>15}" for method in METHODS))
    for row, std in table:
        cells = (f"{row['accuracy', m]:7.1%} ± {std['accuracy', m]:5.1%}" for m in METHODS)
        print(f"{row['sparsity']:8.2f}" + "".join(f"{cell:>15}" for cell in cells))
    print(f"\nOverlap of mask and top eigenspace, k = {k} of D = {D:,}, and how many times chance")
    print(f"{'sparsity':>8}" + "".join(f"{m:>15}" for m in METHODS) + f"{'chance':>10}")
    for row, _ in table:
        cells = (f"{row['overlap', m]:.3f} {row['ratio', m]:6.2f}" for m in METHODS)
        print(f"{row['sparsity']:8.2f}" + "".join(f"{c:>15}" for c in cells), end="")
        print(f"{row['chance']:10.3f}")
    print("\nOverlap of two masks: the part of the weights that both keep")
    print(f"{'sparsity':>8}" + "".join(f"{' - '.join(p):>22}" for p in PAIRS) + f"{'chance':>10}")
    for row, _ in table:
        cells = (f"{row[('masks', *pair)]:22.3f}" for pair in PAIRS)
        print(f"{row['sparsity']:8.2f}" + "".join(cells) + f"{row['density']:10.3f}")


def plot(table, dense, k, D, path):
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo figure: it needs matplotlib, pip install 'hesscurv[examples]'.")
        return
    blue, red, green, grey = "#0072B2", "#D55E00", "#009E73", "#888888"
    sky, purple = "#56B4E9", "#CC79A7"
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    style |= {"axes.titlesize": 11, "legend.fontsize": 9, "legend.frameon": False}
    style |= {"lines.linewidth": 1.8, "lines.markersize": 5, "legend.handlelength": 1.6}
    matplotlib.rcParams.update(style)
    figure = Figure(figsize=(11.5, 3.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    by_accuracy, by_overlap, by_masks = figure.subplots(1, 3)
    x = [row["sparsity"] for row, _ in table]

    def curve(axes, key, color, marker, label):
        y, error = ([part[key] for part in parts] for parts in zip(*table, strict=True))
        axes.errorbar(x, y, error, fmt=f"{marker}-", color=color, elinewidth=1, label=label)

    looks = (blue, "s"), (red, "^"), (green, "o"), (grey, "X")
    for method, look in zip(METHODS, looks, strict=True):
        curve(by_accuracy, ("accuracy", method), *look, method)
        curve(by_overlap, ("ratio", method), *look, method)
    by_accuracy.axhline(dense, linestyle=":", color="black", label="dense")
    by_accuracy.set(ylabel="test accuracy", ylim=(0, 1.02))
    by_accuracy.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    by_accuracy.set_title("Accuracy, without training after pruning")
    by_overlap.axhline(1, linestyle="--", color="black", zorder=1, label="chance")
    by_overlap.set(ylabel="overlap / chance", ylim=(0, None))
    by_overlap.set_title(f"Mask and eigenspace, k = {k}, D = {D:,}")
    # Other colours than the methods' own, since these are pairs of them.
    pairs = (purple, "v"), (sky, "D"), ("black", "o")
    for pair, look in zip(PAIRS, pairs, strict=True):
        curve(by_masks, ("masks", *pair), *look, " and ".join(pair))
    chance = [row["density"] for row, _ in table]
    by_masks.plot(x, chance, "--", color="black", zorder=1, label="chance")
    by_masks.set(ylabel="overlap", ylim=(0, 1.02))
    by_masks.set_title("Overlap of two masks")
    for axes in (by_accuracy, by_overlap, by_masks):
        axes.set(xlabel="sparsity", xticks=[0.3, 0.5, 0.7, 0.9])
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        # The curves first, as they lie in the picture, and then what they are compared with.
        lines, names = axes.get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda i: names[i] in ("dense", "chance"))
        place = "upper left" if axes is by_overlap else "lower left"
        axes.legend([lines[i] for i in order], [names[i] for i in order], loc=place)
    figure.savefig(path, dpi=120)
    print(f"\nFigure in {path}.")


def conclude(table, rows):
    """Say what the tables show, and what they do not."""
    row = min((row for row, _ in table), key=lambda row: abs(row["sparsity"] - 0.7))
    shown = {
        m: f"{row['ratio', m]:.2f} times chance, leaves {row['accuracy', m]:.1%}" for m in METHODS
    }
    cases = [row for net in rows for row in net]
    below = sum(row["accuracy", "leverage"] < row["accuracy", "random"] for row in cases)
    above = sum(row["accuracy", "OBD"] > row["accuracy", "magnitude"] for row in cases)
    print(
        f"\nAt sparsity {row['sparsity']}, the mask of most overlap, leverage's,"
        f" {shown['leverage']} accuracy;\nmagnitude's, {shown['magnitude']}; OBD's,"
        f" {shown['OBD']};\nthe random one's, {shown['random']}. Of {len(cases)} cases, a net and a"
        f" sparsity each,\nleverage is below random masks in {below}, OBD above magnitude in"
        f" {above}.\n\nSo here overlap with the eigenspace alone is worth nothing for pruning. It"
        " says where the loss is\nsensitive, not what setting a weight to zero costs, which takes"
        " the weight's value too: large\nweights of little leverage are lost. With the values, the"
        " same eigenvectors give OBD's score,\nwhose mask is mostly magnitude's and overlaps more"
        " with the eigenspace; it is not clearly better\nfor that. These are small nets, pruned at"
        " once, without training after it."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the tables there")
    parser.add_argument("--quick", action="store_true", help="one net, fewer pairs and sparsities")
    args = parser.parse_args()
    if args.figure is not None and not args.figure.resolve().parent.is_dir():
        parser.error(f"--figure: there is no folder {args.figure.resolve().parent}")
    seeds, k, sparsities = (0, 1, 2), 200, (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    if args.quick:
        seeds, k, sparsities = (0,), 100, (0.5, 0.7, 0.9)
    start = time.perf_counter()
    torch.set_num_threads(1)

    data, test = load_data()
    rows, dense, D = [], [], 0
    print(" net   loss  test acc   lambda_1   lambda_k  seconds")
    for seed in seeds:
        torch.manual_seed(seed)
        net = train_net(data, epochs=15)
        H = hesscurv.HessianOperator(net, TASK, [data], params=lambda _, p: p.ndim > 1)
        pairs = hesscurv.eigsh(H, k)
        D = H.shape[0]
        dense.append(accuracy(net, test))
        with torch.no_grad():
            loss = float(F.cross_entropy(net(data[0]), data[1]))
        ends = pairs.eigenvalues[[0, -1]].tolist()
        print(f"{seed:4d}  {loss:5.3f}  {dense[-1]:8.1%} {ends[0]:10.3g} {ends[1]:10.3g}", end="")
        print(f"{pairs.info['seconds']:9.1f}", flush=True)
        assert pairs.converged.all(), "eigsh has not converged"
        rows.append([measure(net, pairs, test, sparsity) for sparsity in sparsities])
    table = [average(column) for column in zip(*rows, strict=True)]
    print_tables(table, mean(dense), k, D)
    if args.figure is not None:
        plot(table, mean(dense), k, D, args.figure)
    conclude(table, rows)
    print(f"{time.perf_counter() - start:.0f} s in all.")

    for row in itertools.chain(*rows):
        ratios = {method: row["ratio", method] for method in METHODS}
        assert ratios["leverage"] == max(ratios.values()), "a mask overlaps more than the best one"
        assert min(ratios[m] for m in METHODS[:3]) > 1, "an overlap is not above chance"
    for row, _ in table:
        for method in ("magnitude", "OBD"):
            assert row["accuracy", method] > row["accuracy", "leverage"], "leverage prunes better"


if __name__ == "__main__":
    main()
