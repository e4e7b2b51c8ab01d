"""The same call gives the same bits in every process on one machine, on new and used operators."""

import os
import subprocess
import sys
from pathlib import Path

from support.forks import run_source

SCRIPT = """
import hashlib, sys, torch, hesscurv
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))
batches = [(torch.randn(64, 20), torch.randint(5, (64,)))]
H = hesscurv.HessianOperator(net, hesscurv.supervised(torch.nn.CrossEntropyLoss()), batches)
for method in ("block_krylov", "single_pass", "rayleigh_ritz") * 2:
    pairs = hesscurv.eigsh(H, 20, method, tol=1e9)
    tensors = (pairs.eigenvalues, pairs.eigenvectors, pairs.residuals)
    data = b"".join(t.contiguous().numpy().tobytes() for t in tensors)
    print(method, hashlib.sha256(data).hexdigest(), pairs.num_matvecs)
    H @ torch.ones(H.shape[0], 300)  # other work in between
"""


def run(cache):
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "HESSCURV_CACHE": str(cache), "PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_two_processes_give_the_same_bits(tmp_path):
    first = run(tmp_path)
    lines = first.splitlines()
    assert len(lines) == 6
    assert lines[:3] == lines[3:]
    # The choice of the way is measured by the first process and read by the second.
    assert len(list(tmp_path.iterdir())) >= 1
    assert run_source(SCRIPT, cwd=tmp_path, HESSCURV_CACHE=str(tmp_path)) == first
