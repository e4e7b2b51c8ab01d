"""Do a net's largest parameters lie where its loss curves most? Measured while it trains.

Trains the 7,030-parameter net of the paper (Fernandez et al., TMLR 2025, arXiv 2504.14701) on 16x16
digits. At several steps it takes two spaces of k = 355 dimensions, the axes of the k largest
parameters and the k Hessian eigenvectors of largest |eigenvalue|, and measures their overlap: 1 if
they are the same, k/D by chance. At the end SciPy's `eigsh` computes the same eigenvectors from the
same products and must agree.

    pip install 'hesscurv[examples]'
    python examples/overlap.py              # scikit-learn's digits; half a minute on 2 cores
    python examples/overlap.py --full       # every 100 steps, beside the dense Hessian; minutes
    python examples/overlap.py --data DIR   # MNIST in torchvision's layout; with --full the paper's
    python examples/overlap.py --quick      # 8x8 images, 3,190 parameters, 100 steps; seconds

`--full` has the eigenvectors from the single-pass sketch of the paper too and, at three steps, from
the dense Hessian, with which `block_krylov` must agree.

The set-up is that of the paper's published script: PyTorch's default initialisation, cross-entropy,
SGD without momentum or weight decay, pixels in [0, 1] with no other normalisation, the Hessian of
the first 50 test images of each class. What differs is chance: the initial weights, the order of
the training images and the sketch. The paper has one seed; seeds 0 to 4 here give single-pass
overlaps of .131 to .140 at step 0, .142 to .161 at step 100 and .089 to .098 at step 1000.
"""

import argparse
import gzip
import itertools
import os
import shlex
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    START = time.perf_counter()
    if not {"-h", "--help"} & set(sys.argv):
        print("Loading PyTorch and hesscurv ...", flush=True)  # takes seconds, the first time

import matplotlib
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits  # scikit-learn brings it along
from torch import nn

import hesscurv

WIDTHS = (20, 20, 20, 20, 20, 10)
TASK = hesscurv.supervised(nn.CrossEntropyLoss())
TOLERANCE = 1e-3  # of block_krylov's overlap, against the exact one
PAPER = {0: 0.136, 100: 0.156, 1000: 0.094}  # by its single pass: to be compared with ours


def read_idx(folder, name):
    """Read one of MNIST's files, compressed or not, from where torchvision or the user put it."""
    places = [folder / "MNIST" / "raw", folder / "raw", folder]
    for path in (place / (name + ending) for place in places for ending in ("", ".gz")):
        if path.is_file():
            data = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
            shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
            values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
            return torch.from_numpy(values.reshape(shape).copy())
    raise SystemExit(
        f"Found no {name} or {name}.gz in {', '.join(map(str, places))}.\nGive --data the folder "
        "that torchvision.datasets.MNIST(DIR, download=True) fills, or leave it out."
    )


def load_data(folder, size):
    """Return (images, labels) to train on, and those of 50 test images of each class."""
    if folder:
        x, x_test = (read_idx(folder, f"{s}-images-idx3-ubyte") / 255 for s in ("train", "t10k"))
        y, y_test = (read_idx(folder, f"{s}-labels-idx1-ubyte").long() for s in ("train", "t10k"))
        train = slice(50_000)  # the paper keeps 10,000 for validation
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()  # one set, with pixels from 0 to 16
        x = x_test = torch.tensor(digits.images, dtype=torch.float32) / 16
        y = y_test = torch.tensor(digits.target)
    test = torch.cat([(y_test == digit).nonzero()[:50, 0] for digit in range(10)])
    if not folder:
        train = torch.ones(len(y), dtype=torch.bool).index_fill(0, test, False)

    def resized(images):
        images = F.interpolate(images[:, None], (size, size), mode="bilinear", antialias=True)
        return images.flatten(1)

    return (resized(x[train]), y[train]), (resized(x_test[test]), y_test[test])


def make_net(num_inputs, widths=WIDTHS):
    layers = []
    for fan_in, fan_out in itertools.pairwise((num_inputs, *widths)):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def random_batches(count, size, generator):
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def train(net, data, optimizer, num_steps, seed):
    """Yield the steps 0 to num_steps, each when the net has been trained for so many."""
    x, y = data
    batches = random_batches(len(y), 500, torch.Generator().manual_seed(seed))
    for step, batch in zip(range(num_steps + 1), batches, strict=False):
        yield step
        optimizer.zero_grad()
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()


def exact_eigenpairs(H, net, batches, k):
    """Return the k eigenvalues of largest magnitude and their vectors, from the dense Hessian.

    They are the k largest of H^2: one end of a spectrum, for which LAPACK needs half the time that
    all eigenvectors take. All in float64, so that the overlap is good to about 1e-9.
    """
    H = hesscurv.HessianOperator(net, TASK, batches, compute_dtype=torch.float64).to_dense()
    D = H.shape[0]
    V = scipy.linalg.eigh((H @ H).numpy(), subset_by_index=(D - k, D - 1))[1]
    V = torch.from_numpy(V).flip(1)  # largest first
    return (V * (H @ V)).sum(0), V


def scipy_eigenpairs(H, net, batches, k):
    """Return the same from SciPy's `eigsh` (ARPACK), which takes the products of H one by one.

    On one thread, as hesscurv here: more gain nothing on vectors of this length.
    """
    start = np.random.default_rng(0).standard_normal(H.shape[0], dtype=np.float32)
    with threadpool_limits(1):
        values, V = scipy.sparse.linalg.eigsh(H.to_scipy(), k, v0=start, tol=1e-3)
    order = np.argsort(-np.abs(values))
    return torch.from_numpy(values[order]), torch.from_numpy(V[:, order])


def measure(step, net, test, k, reference, with_sketches):
    """Measure at one step, print the row of the table bit by bit, and return it."""
    with torch.no_grad():
        logits = net(test[0])
    loss, accuracy = F.cross_entropy(logits, test[1]), (logits.argmax(1) == test[1]).float().mean()
    print(f"{step:5d}  {loss:5.3f} {accuracy:5.1%}", end="", flush=True)

    mask = hesscurv.magnitude_mask(net, k)
    row = {"step": step, "magnitudes": nn.utils.parameters_to_vector(net.parameters()).abs()}

    # Started from the pairs of 100 steps before it would take twice the products.
    H = hesscurv.HessianOperator(net, TASK, [test])
    row["pairs"] = pairs = hesscurv.eigsh(H, k, method="block_krylov")
    row["block_krylov"] = hesscurv.overlap(mask, pairs)
    seconds = pairs.info["seconds"]
    print(f"  {row['block_krylov']:.4f} {pairs.num_matvecs:5d} {seconds:5.1f}", end="", flush=True)

    chance, z = hesscurv.chance_overlap(k, len(mask)).mean, hesscurv.overlap_z_score(mask, pairs)
    row["ratio"] = row["block_krylov"] / chance
    print(f"   {chance:.4f} {row['ratio']:5.2f} {z:6.0f}", end="", flush=True)

    if with_sketches:  # the paper's, and one twice as large
        for name, outer in (("single_pass", k), ("single_pass_2k", 2 * k)):
            options = {"outer": outer, "inner": 2 * outer, "residuals": False}
            sketched = hesscurv.eigsh(H, k, "single_pass", **options)
            row.setdefault("sketched_eigenvalues", sketched.eigenvalues)
            row[name] = hesscurv.overlap(mask, sketched)
            print(f"   {row[name]:.4f}", end="", flush=True)
    if reference:
        begun = time.perf_counter()
        row["eigenvalues"], V = reference(H, net, [test], k)
        row["reference_seconds"] = time.perf_counter() - begun
        row["reference"] = hesscurv.overlap(mask, V)
        print(f"   {row['reference']:.4f} {row['reference_seconds']:5.1f}", end="", flush=True)
    print(flush=True)
    return row


def plot(rows, k, D, path, reference_name, with_paper):
    blue, red, green, sky, grey = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#888888"
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    style |= {"axes.titlesize": 11, "legend.fontsize": 9, "legend.frameon": False}
    matplotlib.rcParams.update(style | {"lines.linewidth": 1.8})
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_step, by_k, spectrum = figure.subplots(1, 3)
    last, drawn = rows[-1], [rows[0], *(row for row in rows[1:] if row["step"] in (100, 1000))]

    for name, look, color, label in (
        ("block_krylov", "-", blue, "block Krylov"),
        ("single_pass", "--", red, "single pass, k / 2k"),
        ("single_pass_2k", ":", green, "single pass, 2k / 4k"),
        ("reference", "o", "black", reference_name),
    ):
        points = {row["step"]: row[name] for row in rows if name in row}
        if points:
            by_step.plot(points.keys(), points.values(), look, color=color, label=label)
    if with_paper:
        points = PAPER.keys(), PAPER.values()
        by_step.plot(*points, "D", color=red, markerfacecolor="none", label="paper, k / 2k")
    mean, std = hesscurv.chance_overlap(k, D)
    by_step.axhspan(mean - 3 * std, mean + 3 * std, color=grey, label="chance ± 3 std")
    by_step.set(xlabel="training step", ylabel="overlap", ylim=(0, None))
    by_step.set_title(f"Overlap while training, k = {k}, D = {D:,}")
    by_step.legend(loc="lower left", ncols=2)

    ks = torch.arange(1, k + 1)
    for row, color in zip(drawn, (sky, blue, "black"), strict=False):
        overlaps = hesscurv.overlap_by_k(row["magnitudes"], row["pairs"])
        by_k.plot(ks, overlaps, color=color, label=f"step {row['step']}")
    by_k.plot(ks, ks / D, "--", color=grey, label="chance, k / D")
    by_k.set(xlabel="k", ylabel="overlap", xlim=(0, None), ylim=(0, None))
    by_k.set_title("Overlap against k, block Krylov")
    by_k.legend()

    last["krylov_eigenvalues"] = last["pairs"].eigenvalues
    if "sketched_eigenvalues" in last:
        curves = [
            ("eigenvalues", "-", "exact"),
            ("sketched_eigenvalues", "--", "single pass, k / 2k"),
        ]
    else:
        curves = [
            ("krylov_eigenvalues", "-", "block Krylov"),
            ("eigenvalues", "k:", "SciPy's eigsh"),
        ]
    for sign, color, name in ((1, blue, "positive"), (-1, red, "negative")):
        for key, look, source in curves:
            values = sign * last[key][sign * last[key] > 0]
            ranks = range(1, len(values) + 1)
            style = {} if look[0] == "k" else {"color": color}
            spectrum.plot(ranks, values, look, label=f"{name}, {source}", **style)
    floor = float(last["pairs"].residuals.max())
    spectrum.axhline(floor, linestyle=":", color=grey)
    spectrum.text(1, 1.3 * floor, "largest residual, block Krylov", fontsize=9, color="#555555")
    spectrum.set(xlabel="rank among those of its sign", ylabel="|eigenvalue|", yscale="log")
    spectrum.set(ylim=(floor / 3, None), title=f"The {k} eigenvalues at step {last['step']}")
    spectrum.legend(loc=(0.02, 0.2))
    figure.savefig(path, dpi=200)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="every 100 steps, exact and sketched")
    parser.add_argument("--data", type=Path, help="folder of MNIST; default: scikit-learn's digits")
    parser.add_argument("--out", type=Path, default=Path("overlap.png"), help="the figure's file")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--quick", action="store_true", help="a smaller net and fewer steps")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    written = args.out if args.out.exists() else args.out.parent
    if args.out.is_dir() or not os.access(written, os.W_OK):
        parser.error(f"--out: cannot write {args.out}; name another file")
    return args


def report_full(rows, k, D, steps, with_paper):
    """Print what the exact overlap says about the others."""
    exact = [row for row in rows if "reference" in row]
    mean, std = hesscurv.chance_overlap(k, D)

    def largest_error(name):
        return max(abs(row[name] - row["reference"]) for row in exact)

    print(
        f"\nThe {k} largest parameters and the top {k} Hessian eigenvectors overlap"
        f" {rows[0]['ratio']:.1f} times as much as\nchance ({mean:.4f} ± {std:.4f}) at step 0 and"
        f" {rows[-1]['ratio']:.1f} times as much at step {steps[-1]}. Largest distance\nfrom the"
        f" exact overlap: {largest_error('block_krylov'):.0e} by block_krylov,"
        f" {largest_error('single_pass'):.0e} by a single pass of {2 * k} products,"
        f"\n{largest_error('single_pass_2k'):.0e} by one of {4 * k}."
    )
    if with_paper:
        print("\n step   paper  single_pass   exact     (the paper's come from a single pass too)")
        for row in exact:
            paper, ours = PAPER[row["step"]], row["single_pass"]
            print(f"{row['step']:5d}   {paper:.3f}        {ours:.3f}   {row['reference']:.3f}")


def report(rows, k, D):
    """Print the three numbers that the demo shows."""
    last, most = rows[-1], max(row["ratio"] for row in rows)
    pairs, (mean, std) = last["pairs"], hesscurv.chance_overlap(k, D)
    largest, smallest = pairs.eigenvalues.abs()[[0, -1]].tolist()
    gap = abs(last["reference"] - last["block_krylov"])
    print(
        f"\nOverlap           {last['block_krylov']:.4f} at step {last['step']},"
        f" {last['ratio']:.1f} times chance ({mean:.4f} ± {std:.4f}); at most {most:.1f} times"
        f"\nLargest residual  {pairs.residuals.max():.1e} of {k} pairs, |eigenvalue| {largest:.3g}"
        f" to {smallest:.3g}; {int(pairs.converged.sum())} have converged"
        f"\nSeconds           {pairs.info['seconds']:.1f} by hesscurv.eigsh,"
        f" {last['reference_seconds']:.1f} by SciPy's eigsh on the same products, each on a thread;"
        f"\n                  their overlaps differ by {gap:.0e}"
    )


def print_next():
    """Print what to type next, with paths as they are from here."""

    def command(script, *arguments):
        paths = (sys.executable, str(Path(__file__).resolve().parent / script))
        return shlex.join([*(min(p, os.path.relpath(p), key=len) for p in paths), *arguments])

    print("\nNext:")
    for line, meaning in (
        (command("overlap.py", "--full"), "beside the exact Hessian and the paper's sketch"),
        (command("quick_start.py"), "the same for a net of your own, in 45 lines"),
        (command("watch_training.py"), "the eigenspace while a net trains"),
    ):
        print(f"  {line}\n      {meaning}")


def main():
    args = parse_arguments()
    size, k = (8, 160) if args.quick else (16, 355)
    if args.full:
        steps = range(0, 101 if args.quick else 1001, 100)
        reference, reference_name = exact_eigenpairs, "exact (dense)"
        checked = {100} if args.quick else {0, 100, 1000}
    else:
        steps = (0, 100) if args.quick else (0, 100, 200, 400, 700, 1000)
        reference, reference_name, checked = scipy_eigenpairs, "SciPy's eigsh", {steps[-1]}

    # More threads gain little on so small a net, and their rounding leads training elsewhere.
    torch.set_num_threads(1)
    data, test = load_data(args.data, size)
    torch.manual_seed(args.seed)
    net = make_net(size * size)
    D = sum(p.numel() for p in net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)

    print(
        f"A net of {D:,} parameters learns {len(data[1]):,} images of digits. At {len(steps)} steps"
        f" the space of its {k} largest\nparameters is compared with that of the top {k}"
        " eigenvectors of its loss Hessian (500 other images):\nif they overlap far above chance,"
        " pruning by magnitude keeps what the loss depends on most.\n"
    )
    if args.full:
        print("The exact overlap takes most of the time.\n")
    sketches = "   k / 2k 2k / 4k" if args.full else ""
    print(" step   loss   acc overlap  HVPs  secs   chance  ratio     z" + sketches, end="")
    print(f"   {'exact' if args.full else 'SciPy'}   secs", flush=True)
    rows = []
    for step in train(net, data, optimizer, steps[-1], args.seed):
        if step in steps:
            look = reference if step in checked else None
            rows.append(measure(step, net, test, k, look, args.full))

    with_paper = args.full and args.data is not None and not args.quick
    if args.full:
        report_full(rows, k, D, steps, with_paper)
    else:
        report(rows, k, D)
    plot(rows, k, D, args.out, reference_name, with_paper)
    print(f"\nFigure in {args.out}. {time.perf_counter() - START:.0f} s in all.")

    assert all(row["pairs"].converged.all() for row in rows), "block_krylov has not converged"
    error = max(abs(r["block_krylov"] - r["reference"]) for r in rows if "reference" in r)
    assert error < TOLERANCE, f"block_krylov is {error:.1e} off {reference_name}, not {TOLERANCE}"
    print_next()


if __name__ == "__main__":
    main()
