"""Cost of the comparisons with independent references, as a share of a whole eigsh.

    python examples/benchmarks/checks.py [--data DIR] [--quick]

Three trained networks, their data in one batch and in four. A run builds the operator and solves;
the way of computing is chosen once before, and remembered. Runs with and without the comparisons
take turns in one process. Columns:

    batches    how the data are cut
    products   products with the Hessian
    seconds    median of a run without the comparisons, with quartiles
    with them  median of a run with them
    overhead   median, over the rounds, of the time that they add, in percent

What is compared: derivatives with differences of gradients, at construction; each way of computing
with the reference, on every micro-batch; and all products of the solve, at its end. Target: the
median overhead of the nets, each with its data in one batch and in four, is at most 3 %.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from models import Problem, build
from results import Report, parser, print_table
from timing import interleaved

import hesscurv
from hesscurv.operators import curvature_operator
from hesscurv.operators.checks.agreement import Agreement

MOST = 3.0  # percent
RUNS = {"mlp": 150, "small convnet": 60, "small mlp": 60}  # k
QUICK_RUNS = {"small mlp": 40, "small convnet": 20}
CUTS = (1, 4)


@dataclass(frozen=True)
class Case:
    """One network, the number of pairs, and the number of batches that its data are cut into."""

    problem: Problem
    k: int
    cuts: int

    def solve(self) -> int:
        """Build the operator and solve; return the number of products."""
        task = hesscurv.supervised(self.problem.loss_fn)
        H = hesscurv.HessianOperator(self.problem.model, task, self.batches())
        return hesscurv.eigsh(H, k=self.k).num_matvecs

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        inputs, targets = (torch.cat(parts) for parts in zip(*self.problem.batches, strict=True))
        size = -(-len(inputs) // self.cuts)
        return list(zip(inputs.split(size), targets.split(size), strict=True))


@contextmanager
def without_comparisons() -> Iterator[None]:
    """Leave out every comparison that the library makes by itself."""
    operator = curvature_operator.CurvatureOperator
    with (
        mock.patch.object(Agreement, "is_due", return_value=False),
        mock.patch.object(operator, "confirm"),
        mock.patch.object(curvature_operator, "check_gradients"),
    ):
        yield


def bare(case: Case) -> Callable[[], int]:
    def solve() -> int:
        with without_comparisons():
            return case.solve()

    return solve


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, metavar="DIR", help="a folder of MNIST and CIFAR-10")
    options.add_argument("--rounds", type=int, default=5, help="rounds of each case; default 5")
    arguments = options.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = Report("checks", arguments)
    rounds = 2 if arguments.quick else arguments.rounds
    rows, overheads = [], []
    for name, k in (QUICK_RUNS if arguments.quick else RUNS).items():
        problem = build(name, arguments.data)
        for cuts in CUTS:
            case = Case(problem, k, cuts)
            times = interleaved({"without": bare(case), "with": case.solve}, rounds, keep=int)
            # Ratios within a round: the machine's own changes cancel.
            overhead = 100 * (times["with"].over(times["without"]).median - 1)
            overheads.append(overhead)
            row = {
                "network": name,
                "k": k,
                "batches": cuts,
                "products": times["with"].first,
                "seconds": str(times["without"]),
                "with them": times["with"].median,
                "overhead": overhead,
            }
            rows.append(list(row.values()))
            report.rows.append({**row, "seconds": times["without"].summary()})
    print_table(["network", "k", "batches", "products", "seconds", "with them", "overhead"], rows)
    found = statistics.median(overheads)
    report.judge(
        f"comparisons cost at most {MOST:g} % of an eigsh",
        None if arguments.quick else found <= MOST,
        f"median {found:.1f} %, largest {max(overheads):.1f} %",
    )
    report.write()


if __name__ == "__main__":
    main()
