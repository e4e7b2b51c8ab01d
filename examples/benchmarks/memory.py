"""Peak memory of eigsh against its basis, and how orthonormal 2000 vectors in float32 are.

    python examples/benchmarks/memory.py [--quick]

Each peak is taken in a process of its own, twice: once with the solve, once with all but the solve,
which is the model's own: torch, the network and its data, the operator, products with one block.
The solves are asked for more than can be had, so that they fill the basis to its cap, restart, and
end when their products are used up; the script checks that they did. Columns:

    D, k, b    length of a vector, eigenpairs, vectors in a block
    basis      vectors stored when the basis is full: eigsh's max_basis, to within one block
    basis GB   basis x D x 4 bytes
    block GB   b x D x 4 bytes
    own GB     the model's own peak
    peak GB    the peak of the process that solves
    ratio      (peak - own - block) / basis, by bytes; to be at most 1.25

    synthetic  a diagonal plus a matrix of rank 8, D = 2,000,000, the default basis; by
               `single_pass` and `rayleigh_ritz` too, whose basis has 2 k vectors
    3c3d       895,210 parameters, 64 images, a basis capped at k + 100

Orthonormality: the k = 2000 vectors, D = 200,000, that eigsh returns from a Krylov space of an
operator with eigenvalues 1 / i^1.5; max |V^T V - I| in float64 arithmetic, to be at most 1e-5.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# torch is imported by the processes that measure alone: see `peak_bytes`.
from results import Report, parser, print_table

MOST_RATIO = 1.25
MOST_ERROR = 1e-5


@dataclass(frozen=True)
class Case:
    """One solve: the operator's kind and size, and what is asked of eigsh."""

    kind: str
    dim: int
    k: int
    block: int
    max_basis: int | None = None
    rank: int = 8
    power: float = 0.5  # the diagonal's decay
    method: str = "block_krylov"

    @property
    def basis(self) -> int:
        """How many vectors are stored when the basis is full."""
        krylov = 2 * self.k + 10 * self.block + 30
        return (self.max_basis or krylov) if self.method == "block_krylov" else 2 * self.k


CASES = (
    Case("synthetic", 2_000_000, k=100, block=16),
    Case("3c3d", 895_210, k=200, block=16, max_basis=300),
    Case("synthetic", 2_000_000, k=100, block=16, method="single_pass"),
    Case("synthetic", 2_000_000, k=100, block=16, method="rayleigh_ritz"),
)
QUICK_CASES = (
    Case("synthetic", 1_000_000, k=20, block=8, max_basis=60),
    Case("3c3d", 895_210, k=20, block=8, max_basis=60),
    Case("synthetic", 1_000_000, k=30, block=8, method="single_pass"),
)
ORTHONORMALITY = Case("synthetic", 200_000, k=2000, block=32, power=1.5)
QUICK_ORTHONORMALITY = Case("synthetic", 20_000, k=300, block=16, power=1.5)


# -- in a process of its own --------------------------------------------------------------------


def peak_bytes() -> int:
    """Return the most memory that this process has held.

    On Linux by VmHWM, since ru_maxrss starts from what the parent process held when it forked.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def anonymous_bytes() -> int:
    """Return the memory that this process holds now, without files that are mapped to it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return peak_bytes()  # not Linux


def make_operator(case: Case) -> Any:
    """Return a case's operator: a Hessian, or a diagonal plus a low-rank matrix."""
    import torch

    import hesscurv

    class DiagonalPlusLowRank(hesscurv.LinearOperator):
        def __init__(self) -> None:
            super().__init__(case.dim, torch.float32, torch.device("cpu"))
            generator = torch.Generator().manual_seed(0)
            signs = 1 - 2 * torch.randint(2, (case.dim,), generator=generator)
            self.diagonal_D = signs * torch.arange(1.0, case.dim + 1).pow(-case.power)
            U_Dr = torch.randn(case.dim, case.rank, generator=generator)
            self.U_Dr = U_Dr / U_Dr.norm(dim=0)

        def _matmat(self, vectors_DB: torch.Tensor) -> torch.Tensor:
            out_DB = self.diagonal_D[:, None] * vectors_DB
            return out_DB.addmm_(self.U_Dr, self.U_Dr.mT @ vectors_DB)

    if case.kind == "synthetic":
        return DiagonalPlusLowRank()
    from models import build

    problem = build(case.kind, steps=0)  # what is stored does not depend on the weights
    task = hesscurv.supervised(problem.loss_fn)
    # Choosing the way by calibration tries wide blocks, which would hide the solve's own peak.
    return hesscurv.HessianOperator(problem.model, task, problem.batches, way="retained")


def run_case(case: Case, solve: bool, gram: bool) -> dict[str, Any]:
    """Build the operator, multiply one block with it, solve if asked, and return what it took."""
    import torch

    import hesscurv

    H = make_operator(case)
    for _ in range(5):  # memory given back and taken again leaves holes
        H @ torch.randn(case.block, case.dim).mT
    if not solve:
        return {"peak": peak_bytes()}
    # For a space of just over k vectors where orthonormality is asked, of more than the cap else.
    products = case.k + 4 * case.block if gram else case.basis + 6 * case.block
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        options: dict[str, Any] = {"method": case.method, "block_size": case.block}
        if case.method == "block_krylov":
            options |= {"tol": 0.0, "max_matvecs": products, "max_basis": case.max_basis}
        pairs = hesscurv.eigsh(H, case.k, **options)
    out = {
        "peak": peak_bytes(),
        "seconds": time.perf_counter() - start,
        "products": pairs.num_matvecs,
        "max_basis": pairs.info.get("max_basis", case.basis),
    }
    if gram:
        out["error"] = orthonormality_error(pairs.eigenvectors)
    return out


def orthonormality_error(V_Dk: Any) -> float:
    """Return max |V^T V - I|, summed up in float64."""
    import torch

    gram_kk = torch.zeros(V_Dk.shape[1], V_Dk.shape[1], dtype=torch.float64)
    for rows in V_Dk.split(20_000):
        rows = rows.double()
        gram_kk.addmm_(rows.mT, rows)
    gram_kk.diagonal().sub_(1)
    return float(gram_kk.abs().max())


def in_own_process(case: Case, options: Any, *, solve: bool, gram: bool = False) -> dict[str, Any]:
    job = {"case": asdict(case), "solve": solve, "gram": gram, "threads": options.threads}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(job)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"the process of {case} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(job: dict[str, Any]) -> None:
    """Run what `in_own_process` asked for, and print it as one line of JSON."""
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    print(json.dumps(run_case(Case(**job["case"]), job["solve"], job["gram"])))


# -- the run ------------------------------------------------------------------------------------


def measure_peak(case: Case, options: Any) -> dict[str, Any]:
    own = in_own_process(case, options, solve=False)["peak"]
    full = in_own_process(case, options, solve=True)
    basis, block = (4 * case.dim * vectors for vectors in (full["max_basis"], case.block))
    return {
        "case": case.kind,
        "method": case.method,
        "D": case.dim,
        "k": case.k,
        "block": case.block,
        "max_basis": full["max_basis"],
        "products": full["products"],
        "filled": case.method != "block_krylov"
        or full["products"] >= full["max_basis"] + 2 * case.block,
        "basis_bytes": basis,
        "block_bytes": block,
        "own_bytes": own,
        "peak_bytes": full["peak"],
        "ratio": (full["peak"] - own - block) / basis,
        "seconds": full["seconds"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    sizes = ["D", "k", "block", "max_basis"]
    parts = ["basis_bytes", "block_bytes", "own_bytes", "peak_bytes"]
    print_table(
        [
            "case",
            "method",
            "D",
            "k",
            "b",
            "basis",
            "basis GB",
            "block GB",
            "own GB",
            "peak GB",
            "ratio",
        ],
        [
            (
                row["case"],
                row["method"],
                *(row[key] for key in sizes),
                *(row[key] / 1e9 for key in parts),
                row["ratio"],
            )
            for row in rows
        ],
    )
    print()


def main() -> None:
    options = parse()
    if options.worker:
        work(json.loads(options.worker))
        return
    report = Report("memory", options)
    for case in QUICK_CASES if options.quick else CASES:
        report.rows.append(measure_peak(case, options))
        print(f"measured {case.kind}", flush=True)
    print()
    show(report.rows)
    for row in report.rows:
        where = f"{row['case']}, {row['method']}"
        target = f"{where}: peak at most {MOST_RATIO} x basis + one block + the model's own"
        if row["filled"]:
            report.judge(target, row["ratio"] <= MOST_RATIO, f"{row['ratio']:.3f} x basis")
        else:
            report.judge(target, None, f"{row['products']} products did not fill the basis")
    case = QUICK_ORTHONORMALITY if options.quick else ORTHONORMALITY
    done = in_own_process(case, options, solve=True, gram=True)
    report.rows.append({"case": "orthonormality", "D": case.dim, "k": case.k, **done})
    target = f"orthonormal to {MOST_ERROR:.0e} in float32: {case.k} vectors, D = {case.dim:,}"
    report.judge(target, done["error"] <= MOST_ERROR, f"max |V^T V - I| = {done['error']:.1e}")
    report.write()


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)
    return options.parse_args()


if __name__ == "__main__":
    main()
