"""Share one eigendecomposition out between shells, machines or the jobs of a cluster's job array.

Each job takes a part of the measurements of the paper's sketch, which do not depend on each other,
and writes them to a folder that all of them see; they need not run at the same time. In two shells:

    python examples/measurement_jobs.py --folder eigenpairs --part 0/2
    python examples/measurement_jobs.py --folder eigenpairs --part 1/2

A job that was killed is run again by the same command. When both are done, in either shell:

    python examples/measurement_jobs.py --folder eigenpairs --assemble

Without a folder the script does all that by itself, in seconds: it starts the two jobs, kills one,
runs it again, assembles, and compares with `eigsh(method="single_pass")`. It needs scikit-learn:

    pip install 'hesscurv[examples]'
    python examples/measurement_jobs.py

Every job builds the same operator: the same weights and the same batches, which are compared before
the first product. This net is trained anew by each job, in a second; yours comes from a file.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import hesscurv

K = 50
SETTINGS = {"outer": 100, "inner": 200, "block_size": 8}  # the same for all jobs


def make_operator():
    """The Hessian of a small net on digits, the same in every process."""
    torch.set_num_threads(1)  # sums round differently on another number of threads
    torch.manual_seed(0)
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    targets = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    batches = [(inputs, targets)]
    return hesscurv.HessianOperator(model, task, batches, compute_dtype=torch.float64)


def take_part(folder, part):
    i, n = map(int, part.split("/"))
    H = make_operator()
    missing = hesscurv.measure(H, K, folder, part=(i, n), **SETTINGS)
    print(f"Part {part}: {H.num_matvecs} products. Missing in the folder: {missing or 'nothing'}")


def assemble(folder):
    # Neither the model nor the data are needed for that; with them there are residuals.
    pairs = hesscurv.assemble(folder)
    pairs.save(folder / "pairs.pt")
    print(pairs)
    return pairs


def demonstrate(folder):
    """Do what two users would do in two shells."""

    def start(*options):
        return subprocess.Popen([sys.executable, __file__, "--folder", str(folder), *options])

    def finish(job):
        assert job.wait() == 0

    first, second = start("--part", "0/2"), start("--part", "1/2")
    some = folder / "measurements_0000008_0000016.npz"  # the second file of the first part
    while not some.exists() and first.poll() is None:
        time.sleep(0.002)
    first.kill()
    if first.wait() != 0:
        print(f"Killed part 0/2. Missing in the folder: {hesscurv.missing(folder)}")
    finish(second)
    if missing := hesscurv.missing(folder):
        try:
            hesscurv.assemble(folder)
        except ValueError as error:  # it says what to run
            print(error)
        assert all(start >= 16 and stop <= 100 for start, stop in missing)  # not what was written
    finish(start("--part", "0/2"))
    assert hesscurv.missing(folder) == []
    finish(start("--assemble"))

    pairs = hesscurv.Eigenpairs.load(folder / "pairs.pt")
    H = make_operator()
    whole = hesscurv.eigsh(
        H, K, method="single_pass", generator=torch.Generator().manual_seed(0), tol=1e9, **SETTINGS
    )
    difference = (pairs.eigenvalues - whole.eigenvalues).abs().max() / whole.eigenvalues[0].abs()
    overlap = hesscurv.overlap(pairs, whole)
    print(f"Beside one process: eigenvalues differ by {difference:.1e}, overlap {overlap:.12f}")
    assert difference < 1e-9  # float64, and products that two processes may compute in two ways
    assert abs(overlap - 1) < 1e-9
    assert pairs.layout == H.layout


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where all jobs keep their measurements")
    parser.add_argument("--part", metavar="I/N", help="take part I = 0, ..., N-1 of N")
    parser.add_argument("--assemble", action="store_true", help="compute and save the eigenpairs")
    parser.add_argument(
        "--quick", action="store_true", help="the demonstration, as without options"
    )
    options = parser.parse_args()
    if options.folder is None:
        if options.part or options.assemble:
            parser.error("--part and --assemble need --folder")
        with tempfile.TemporaryDirectory() as parent:
            demonstrate(Path(parent) / "eigenpairs")
    elif options.part:
        take_part(options.folder, options.part)
    elif options.assemble:
        assemble(options.folder)
    else:
        parser.error("--folder needs --part I/N or --assemble")


if __name__ == "__main__":
    main()
