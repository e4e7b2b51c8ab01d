"""Do a net's largest parameters lie where its loss curves most? Measured while it trains.

Trains the 7,030-parameter net of the paper (Fernandez et al., TMLR 2025, arXiv 2504.14701) on 16x16
digits. Every 100 steps it takes two spaces of k = 355 dimensions, the axes of the k largest
parameters and the k Hessian eigenvectors of largest |eigenvalue|, and measures their overlap: 1 when
they are the same, k/D by chance. The eigenvectors come from `block_krylov`, from the paper's
single-pass sketch and, at three steps, from the dense Hessian, which the first must agree with.

    pip install 'hesscurv[examples]'
    python examples/overlap.py              # scikit-learn's digits, about 3 minutes on 2 cores
    python examples/overlap.py --data DIR   # MNIST in torchvision's layout, beside the paper's figures
    python examples/overlap.py --quick      # 8x8 images, 3,190 parameters, 100 steps, k = 160

The set-up is that of the paper's published script: PyTorch's default initialisation, cross-entropy,
SGD without momentum or weight decay, pixels in [0, 1] and nothing else done to them, and the Hessian
of the first 50 test images of each class. Its random draws differ: seeds, order of the training
images, sketch. Its figures are those of its sketch, so they belong beside single_pass, not exact.
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
from torch import nn

import hesscurv

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

WIDTHS = (20, 20, 20, 20, 20, 10)
TASK = hesscurv.supervised(nn.CrossEntropyLoss())
PAPER = {0: 0.136, 100: 0.156, 1000: 0.094}
TOLERANCE = 1e-3  # of block_krylov's overlap against the exact one
BLUE, RED, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#777777"  # Okabe-Ito


# -- data and net -----------------------------------------------------------------------------------


def read_idx(folder, name):
    """Read one of MNIST's files, compressed or not, where torchvision or the user put it."""
    places = [folder / "MNIST" / "raw", folder / "raw", folder]
    for path in (place / (name + end) for place in places for end in ("", ".gz")):
        if path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix else path.read_bytes()
            shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
            pixels = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
            return torch.from_numpy(pixels.copy())
    raise SystemExit(
        f"Found no {name} or {name}.gz in {', '.join(map(str, places))}. Give --data the folder that "
        "torchvision.datasets.MNIST(DIR, download=True) filled, or leave it out for the small digits."
    )


def load_data(folder, size):
    """Return (images, labels) to train on, and 50 test images of each class."""
    if folder:
        x, x_test = (read_idx(folder, f"{s}-images-idx3-ubyte") / 255 for s in ("train", "t10k"))
        y, y_test = (read_idx(folder, f"{s}-labels-idx1-ubyte").long() for s in ("train", "t10k"))
        x, y = x[:50_000], y[:50_000]  # the paper keeps 10,000 for validation
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32) / 16
        y = torch.tensor(digits.target)
        x_test, y_test = x, y
    chosen = torch.cat([(y_test == digit).nonzero()[:50, 0] for digit in range(10)]).sort().values
    x_test, y_test = x_test[chosen], y_test[chosen]
    if not folder:  # one set for both: train on the rest
        rest = torch.ones(len(y), dtype=torch.bool)
        rest[chosen] = False
        x, y = x[rest], y[rest]

    def resized(images):
        images = F.interpolate(images[:, None], (size, size), mode="bilinear", antialias=True)
        return images.flatten(1)

    return (resized(x), y), (resized(x_test), y_test)


def make_net(num_inputs):
    layers = []
    for fan_in, fan_out in itertools.pairwise((num_inputs, *WIDTHS)):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def random_batches(count, size, generator):
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


# -- measurement ------------------------------------------------------------------------------------


def exact_eigenpairs(net, batches, k):
    """Return the k eigenvalues of largest magnitude and their vectors, from the dense Hessian.

    Those are the k largest eigenvalues of H^2, one end of a spectrum, for which LAPACK needs a third
    of the time of all eigenvectors. In float64 the overlap is good to 1e-9, whatever the squaring
    costs.
    """
    H = hesscurv.HessianOperator(net, TASK, batches, compute_dtype=torch.float64).to_dense()
    D = H.shape[0]
    V = scipy.linalg.eigh((H @ H).numpy(), subset_by_index=(D - k, D - 1), overwrite_a=True)[1]
    V = torch.from_numpy(V).flip(1)  # largest first
    return (V * (H @ V)).sum(0), V


def measure(step, net, test, k, with_exact):
    """Measure at one step, print the table's row bit by bit, and return it."""
    with torch.no_grad():
        logits = net(test[0])
    loss, accuracy = F.cross_entropy(logits, test[1]), (logits.argmax(1) == test[1]).float().mean()
    print(f"{step:5d}  {loss:5.3f}  {accuracy:4.0%}", end="", flush=True)

    mask = hesscurv.magnitude_mask(net, k)
    row = {"step": step, "magnitudes": nn.utils.parameters_to_vector(net.parameters()).abs()}
    if with_exact:
        row["eigenvalues"], V = exact_eigenpairs(net, [test], k)
        row["exact"] = hesscurv.overlap(mask, V)
    print(f"  {row['exact']:.4f}" if with_exact else "       -", end="", flush=True)

    H = hesscurv.HessianOperator(net, TASK, [test])
    row["pairs"] = pairs = hesscurv.eigsh(H, k)  # from scratch: 100 steps on, a warm start costs more
    row["block_krylov"] = hesscurv.overlap(mask, pairs)
    seconds = pairs.info["seconds"]
    print(f"  {row['block_krylov']:.4f} {pairs.num_matvecs:5d} {seconds:5.1f}s", end="", flush=True)

    sketches = {}
    for outer in (k, 2 * k):  # the paper's, and twice that
        sketches[outer] = hesscurv.eigsh(
            H, k, method="single_pass", outer=outer, inner=2 * outer, residuals=False
        )
    row["sketch"] = sketches[k].eigenvalues
    row["single_pass"] = hesscurv.overlap(mask, sketches[k])
    row["single_pass_2k"] = hesscurv.overlap(mask, sketches[2 * k])
    chance = hesscurv.chance_overlap(k, len(mask)).mean
    row["ratio"] = row["block_krylov"] / chance
    row["z"] = hesscurv.overlap_z_score(mask, pairs)
    print(
        f"  {row['single_pass']:.4f} {row['single_pass_2k']:.4f}  {chance:.4f}  {row['ratio']:4.1f}x"
        f"  {row['z']:5.0f}",
        flush=True,
    )
    return row


# -- report -----------------------------------------------------------------------------------------


def plot(rows, k, D, path):
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (by_step, by_k, spectrum) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    steps = [row["step"] for row in rows]
    exact = [row for row in rows if "exact" in row]
    chance = hesscurv.chance_overlap(k, D)

    by_step.plot(steps, [r["single_pass_2k"] for r in rows], ":", color=ORANGE, label="single pass, 2k / 4k")
    by_step.plot(steps, [r["single_pass"] for r in rows], "--", color=RED, label="single pass, k / 2k")
    by_step.plot(steps, [r["block_krylov"] for r in rows], color=BLUE, label="block Krylov")
    by_step.plot(
        [r["step"] for r in exact], [r["exact"] for r in exact], "o", color="black", label="exact"
    )
    by_step.axhspan(
        chance.mean - 3 * chance.std, chance.mean + 3 * chance.std, color=GREY, label="chance"
    )
    by_step.set(xlabel="training step", ylabel="overlap", ylim=(0, None), title=f"k = {k} of {D:,}")
    by_step.legend()

    ks = torch.arange(1, k + 1)
    for row, color in zip(exact, (BLUE, GREEN, ORANGE), strict=False):
        curve = hesscurv.overlap_by_k(row["magnitudes"], row["pairs"])
        by_k.plot(ks, curve, color=color, label=f"step {row['step']}")
    by_k.plot(ks, ks / D, color=GREY, label="chance, k / D")
    by_k.set(xscale="log", yscale="log", xlabel="k", ylabel="overlap")
    by_k.legend()

    last = rows[-1]
    eigenvalues, index = last["eigenvalues"], torch.arange(1, k + 1)
    for sign, color, label in ((1, BLUE, "positive"), (-1, RED, "negative")):
        chosen = eigenvalues.sign() == sign
        spectrum.plot(index[chosen], eigenvalues[chosen].abs(), ".", color=color, label=label)
    spectrum.plot(index, last["sketch"].abs(), "--", color="black", label="single pass, k / 2k")
    spectrum.plot(index, last["pairs"].residuals, color=GREY, label="residual, block Krylov")
    spectrum.set(yscale="log", xlabel="index", ylabel="|eigenvalue|", title=f"step {last['step']}")
    spectrum.legend()
    figure.savefig(path, dpi=200)


def summarize(rows, k, D):
    first, last = rows[0], rows[-1]
    exact = [row for row in rows if "exact" in row]

    def worst(name):
        return max(abs(row[name] - row["exact"]) for row in exact)

    print(
        f"\nThe {k} largest of {D:,} parameters overlap with the top {k} Hessian eigenvectors"
        f" {first['ratio']:.1f} times\nas much as chance at step {first['step']} and"
        f" {last['ratio']:.1f} times as much at step {last['step']}."
        f" Of these eigenvalues, {int((last['eigenvalues'] < 0).sum())} of {k} are\nnegative"
        f" at step {last['step']}. Largest distance from the exact overlap: block_krylov"
        f" {worst('block_krylov'):.0e},\nsingle_pass {worst('single_pass'):.0e} with k / 2k"
        f" measurements, {worst('single_pass_2k'):.0e} with 2k / 4k."
    )
    return worst("block_krylov")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST; default scikit-learn's digits")
    parser.add_argument("--out", type=Path, default=Path("overlap.png"), help="where the figure goes")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and order of batches")
    parser.add_argument("--quick", action="store_true", help="a smaller net and 100 steps: seconds")
    args = parser.parse_args()
    if not args.out.resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.resolve().parent}")
    start = time.perf_counter()
    size, k, num_steps = (8, 160, 100) if args.quick else (16, 355, 1000)

    (x, y), test = load_data(args.data, size)
    torch.manual_seed(args.seed)
    net = make_net(size * size)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    batches = random_batches(len(y), 500, torch.Generator().manual_seed(args.seed))
    D = sum(p.numel() for p in net.parameters())

    print(f"{D:,} parameters, {len(y):,} training images; Hessian of {len(test[1])} test images")
    print(f"{'':28}  block_krylov          single_pass")
    print(" step   loss   acc   exact  overlap  HVPs   time   k/2k   2k/4k  chance  ratio      z")
    rows = []
    for step, batch in zip(range(num_steps + 1), batches, strict=False):
        if step % 100 == 0:
            rows.append(measure(step, net, test, k, with_exact=step in (0, 100, num_steps)))
        optimizer.zero_grad()
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()

    gap = summarize(rows, k, D)
    if args.data and not args.quick:
        print("\n step   paper  single_pass   exact")
        for row in (row for row in rows if row["step"] in PAPER):
            print(f"{row['step']:5d}    {PAPER[row['step']]:.3f}        {row['single_pass']:.3f}   {row['exact']:.3f}")
    plot(rows, k, D, args.out)
    print(f"\nFigure in {args.out}; {time.perf_counter() - start:.0f} s in all.")
    assert all(row["pairs"].converged.all() for row in rows), "block_krylov has not converged"
    assert gap < TOLERANCE, f"block_krylov is {gap:.1e} from the exact overlap, over {TOLERANCE:g}"


if __name__ == "__main__":
    main()
