"""One Hessian over many processes: each has a share of the data and of the basis.

    torchrun --nproc-per-node 2 examples/many_processes.py
    python examples/many_processes.py       # starts the line above by itself

Every rank builds the operator on its own batches, and all call eigsh together. On GPUs, give each
rank its own device (`model.to(f"cuda:{LOCAL_RANK}")`) and the group NCCL; the rest is the same.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import hesscurv

K = 30
TASK = hesscurv.supervised(nn.CrossEntropyLoss())


def make_problem():
    """Return a net, the same on every rank, and all batches."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).flatten(1)[:480] / 16
    y = torch.tensor(digits.target)[:480]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
    model.append(nn.Linear(24, 10))
    return model, list(zip(x.split(60), y.split(60), strict=True))


def solve(share):
    """Return the top eigenpairs, and the overlap of their space with the largest weights."""
    model, batches = make_problem()
    H = hesscurv.HessianOperator(model, TASK, batches[share])
    pairs = hesscurv.eigsh(H, K, tol=1e-4)
    # Of pairs that are spread over ranks, all ranks ask together: rows are gathered.
    return pairs, hesscurv.overlap(hesscurv.magnitude_mask(model, K), pairs)


def be_rank():
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    pairs, overlap = solve(slice(rank, None, size))

    own = pairs.eigenvectors.to_local()  # eigenvectors is a DTensor, split by rows
    print(f"rank {rank} of {size} holds {len(own):,} of {len(pairs.eigenvectors):,} rows")
    pairs.save("pairs.pt")  # gathered, and written once
    if rank == 0:
        print(f"overlap with the {K} largest weights: {overlap:.4f}")
    torch.distributed.destroy_process_group()


def main():
    if "RANK" in os.environ:
        be_rank()
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", str(Path(__file__).resolve())]
        subprocess.run(command, check=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
        together = hesscurv.Eigenpairs.load(Path(folder) / "pairs.pt")
    alone, _ = solve(slice(None))
    gap = float((together.eigenvalues / alone.eigenvalues - 1).abs().max())
    print(f"largest relative gap to the eigenvalues of one process: {gap:.1e}")
    assert gap < 1e-5
    assert hesscurv.overlap(together, alone) > 1 - 1e-5


if __name__ == "__main__":
    main()
