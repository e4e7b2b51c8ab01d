"""Do a net's largest parameters lie where its loss curves most? Measured while it trains.

Trains the 7,030-parameter net of the paper (Fernandez et al., TMLR 2025, arXiv 2504.14701) on 16x16
digits. Every 100 steps it takes two spaces of k = 355 dimensions, the axes of the k largest
parameters and the k Hessian eigenvectors of largest |eigenvalue|, and measures their overlap: 1 if
they are the same, k/D by chance. The eigenvectors come from `block_krylov`, from the single-pass
sketch of the paper and, at three steps, from the dense Hessian, with which the first must agree.

    pip install 'hesscurv[examples]'
    python examples/overlap.py              # scikit-learn's digits; 2 to 3 minutes on 2 cores
    python examples/overlap.py --data DIR   # MNIST in torchvision's layout, beside the paper
    python examples/overlap.py --quick      # 8x8 images, 3,190 parameters, 100 steps; seconds

The set-up is that of the paper's published script: PyTorch's default initialisation, cross-entropy,
SGD without momentum or weight decay, pixels in [0, 1] with no other normalisation, the Hessian of
the first 50 test images of each class. What differs is chance: the initial weights, the order of
the training images and the sketch. The paper has one seed; seeds 0 to 4 here give single-pass
overlaps of .131 to .140 at step 0, .142 to .161 at step 100 and .089 to .098 at step 1000.
"""

import argparse
import gzip
import itertools
import time
from pathlib import Path

import matplotlib
import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
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


def exact_eigenpairs(net, batches, k):
    """Return the k eigenvalues of largest magnitude and their vectors, from the dense Hessian.

    They are the k largest of H^2: one end of a spectrum, for which LAPACK needs half the time that
    all eigenvectors take. All in float64, so that the overlap is good to about 1e-9.
    """
    H = hesscurv.HessianOperator(net, TASK, batches, compute_dtype=torch.float64).to_dense()
    D = H.shape[0]
    V = scipy.linalg.eigh((H @ H).numpy(), subset_by_index=(D - k, D - 1))[1]
    V = torch.from_numpy(V).flip(1)  # largest first
    return (V * (H @ V)).sum(0), V


def measure(step, net, test, k, with_exact):
    """Measure at one step, print the row of the table bit by bit, and return it."""
    with torch.no_grad():
        logits = net(test[0])
    loss, accuracy = F.cross_entropy(logits, test[1]), (logits.argmax(1) == test[1]).float().mean()
    print(f"{step:5d}  {loss:5.3f} {accuracy:5.1%}", end="", flush=True)

    mask = hesscurv.magnitude_mask(net, k)
    row = {"step": step, "magnitudes": nn.utils.parameters_to_vector(net.parameters()).abs()}
    if with_exact:
        row["eigenvalues"], V = exact_eigenpairs(net, [test], k)
        row["exact"] = hesscurv.overlap(mask, V)
    print(f"  {row['exact']:.4f}" if with_exact else "       -", end="", flush=True)

    # Started from the pairs of 100 steps before it would take twice the products.
    H = hesscurv.HessianOperator(net, TASK, [test])
    row["pairs"] = pairs = hesscurv.eigsh(H, k, method="block_krylov")
    row["block_krylov"] = hesscurv.overlap(mask, pairs)
    seconds = pairs.info["seconds"]
    print(f"   {row['block_krylov']:.4f} {pairs.num_matvecs:5d} {seconds:5.1f}", end="", flush=True)

    small, large = (  # the paper's sketch, and one twice as large
        hesscurv.eigsh(H, k, "single_pass", outer=outer, inner=2 * outer, residuals=False)
        for outer in (k, 2 * k)
    )
    row["sketched_eigenvalues"] = small.eigenvalues
    row["single_pass"], row["single_pass_2k"] = (hesscurv.overlap(mask, s) for s in (small, large))

    chance, z = hesscurv.chance_overlap(k, len(mask)).mean, hesscurv.overlap_z_score(mask, pairs)
    row["ratio"] = row["block_krylov"] / chance
    print(f"   {row['single_pass']:.4f}  {row['single_pass_2k']:.4f}", end="")
    print(f"   {chance:.4f} {row['ratio']:5.2f} {z:6.0f}", flush=True)
    return row


def plot(rows, k, D, path, with_paper):
    blue, red, green, sky, grey = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#888888"
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    style |= {"axes.titlesize": 11, "legend.fontsize": 9, "legend.frameon": False}
    matplotlib.rcParams.update(style | {"lines.linewidth": 1.8})
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_step, by_k, spectrum = figure.subplots(1, 3)
    last, exact = rows[-1], [row for row in rows if "exact" in row]

    for name, look, color, label in (
        ("block_krylov", "-", blue, "block Krylov"),
        ("single_pass", "--", red, "single pass, k / 2k"),
        ("single_pass_2k", ":", green, "single pass, 2k / 4k"),
        ("exact", "o", "black", "exact (dense)"),
    ):
        points = {row["step"]: row[name] for row in rows if name in row}
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
    for row, color in zip(exact, (sky, blue, "black"), strict=False):
        overlaps = hesscurv.overlap_by_k(row["magnitudes"], row["pairs"])
        by_k.plot(ks, overlaps, color=color, label=f"step {row['step']}")
    by_k.plot(ks, ks / D, "--", color=grey, label="chance, k / D")
    by_k.set(xlabel="k", ylabel="overlap", xlim=(0, None), ylim=(0, None))
    by_k.set_title("Overlap against k, block Krylov")
    by_k.legend()

    for sign, color, name in ((1, blue, "positive"), (-1, red, "negative")):
        for key, look, source in (
            ("eigenvalues", "-", "exact"),
            ("sketched_eigenvalues", "--", "single pass, k / 2k"),
        ):
            values = sign * last[key][sign * last[key] > 0]
            ranks = range(1, len(values) + 1)
            spectrum.plot(ranks, values, look, color=color, label=f"{name}, {source}")
    floor = float(last["pairs"].residuals.max())
    spectrum.axhline(floor, linestyle=":", color=grey)
    spectrum.text(1, 1.3 * floor, "largest residual, block Krylov", fontsize=9, color="#555555")
    spectrum.set(xlabel="rank among those of its sign", ylabel="|eigenvalue|", yscale="log")
    spectrum.set(ylim=(floor / 3, None), title=f"The {k} eigenvalues at step {last['step']}")
    spectrum.legend(loc=(0.02, 0.2))
    figure.savefig(path, dpi=200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST; default: scikit-learn's digits")
    parser.add_argument("--out", type=Path, default=Path("overlap.png"), help="the figure's file")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--quick", action="store_true", help="a smaller net and fewer steps")
    args = parser.parse_args()
    if not args.out.resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.resolve().parent}")
    size, k, num_steps = (8, 160, 100) if args.quick else (16, 355, 1000)
    start = time.perf_counter()

    # More threads gain little on so small a net, and their rounding leads training elsewhere.
    torch.set_num_threads(1)
    data, test = load_data(args.data, size)
    torch.manual_seed(args.seed)
    net = make_net(size * size)
    D = sum(p.numel() for p in net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)

    print(f"{D:,} parameters, {len(data[1]):,} training images, Hessian of 500 others, k = {k}.")
    print(f"The exact overlap takes most of the time.\n\n{'':29} block_krylov         single_pass")
    print(" step   loss   acc   exact  overlap  HVPs  secs   k / 2k 2k / 4k   chance  ratio     z")
    rows, with_exact = [], {num_steps} if args.quick else {0, 100, num_steps}
    for step in train(net, data, optimizer, num_steps, args.seed):
        if step % 100 == 0:
            rows.append(measure(step, net, test, k, with_exact=step in with_exact))

    def largest_error(name):
        return max(abs(row[name] - row["exact"]) for row in exact)

    exact = [row for row in rows if "exact" in row]
    mean, std = hesscurv.chance_overlap(k, D)
    print(
        f"\nThe {k} largest parameters and the top {k} Hessian eigenvectors overlap"
        f" {rows[0]['ratio']:.1f} times as much as\nchance ({mean:.4f} ± {std:.4f}) at step 0 and"
        f" {rows[-1]['ratio']:.1f} times as much at step {num_steps}. Largest distance\nfrom the"
        f" exact overlap: {largest_error('block_krylov'):.0e} by block_krylov,"
        f" {largest_error('single_pass'):.0e} by a single pass of {2 * k} products,"
        f"\n{largest_error('single_pass_2k'):.0e} by one of {4 * k}."
    )
    with_paper = args.data is not None and not args.quick
    if with_paper:
        print("\n step   paper  single_pass   exact     (the paper's come from a single pass too)")
        for row in exact:
            paper, ours = PAPER[row["step"]], row["single_pass"]
            print(f"{row['step']:5d}   {paper:.3f}        {ours:.3f}   {row['exact']:.3f}")
    plot(rows, k, D, args.out, with_paper)
    print(f"\nFigure in {args.out}. {time.perf_counter() - start:.0f} s in all.")

    assert all(row["pairs"].converged.all() for row in rows), "block_krylov has not converged"
    error = largest_error("block_krylov")
    assert error < TOLERANCE, f"block_krylov is {error:.1e} from the exact overlap, not {TOLERANCE}"


if __name__ == "__main__":
    main()
