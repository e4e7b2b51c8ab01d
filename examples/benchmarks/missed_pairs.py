"""Pairs that a solve missed and called converged, over 1,000 planted spectra.

    python examples/benchmarks/missed_pairs.py [--spectra N] [--quick]

Diagonal operators in float64 whose eigenvalues are known: 300 to 3,000 of them, a power law of both
signs or of one, some repeated 2 to 30 times, some in a cluster, some with a flat tail. Each is
solved once, for 10 to 100 pairs, tol 1e-2, with a block of 1, 2, 4, 8 or 16 vectors, a basis of
the default size or a small one. A pair that is called converged was *missed*, where fewer
eigenvalues of at least its size were returned than there are. Columns:

    configuration  what is solved: the kind, the block, the storage or the method
    spectra        how many
    all converged  of these, with every pair called converged
    missed         spectra with a missed pair among converged ones, and such pairs in all
    products       median, as a multiple of k

Target: no missed pair. The search for missed pairs lets one escape with a probability of at most
1e-3 a search.
"""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from results import Report, parser, print_table
from torch import Tensor

import hesscurv

BLOCKS = (1, 2, 4, 8, 16)
TOL = 1e-2


class Diagonal:
    """A diagonal matrix as another library's operator."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.dtype, self.device = values, values.dtype, values.device
        self.shape = torch.Size((len(values), len(values)))

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.values * other if other.ndim == 1 else self.values[:, None] * other


@dataclass(frozen=True)
class Case:
    """One spectrum and how it is solved."""

    kind: str
    values: Tensor
    k: int
    which: str
    options: dict[str, Any]

    def missed(self) -> tuple[int, bool, int]:
        """Solve; return missed pairs among converged ones, whether all converged, and products."""
        options = dict(self.options)
        if self.which != "LM":
            options["which"] = self.which
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
            pairs = hesscurv.eigsh(
                Diagonal(self.values), self.k, generator=torch.Generator().manual_seed(0), **options
            )
        sizes = {"LM": torch.abs, "LA": torch.clone, "SA": torch.neg}[self.which]
        true = sizes(self.values).sort(descending=True).values[: self.k]
        found = sizes(pairs.eigenvalues.double()).sort(descending=True).values
        # The i-th of the returned ones is to be the i-th there is, up to what a residual allows.
        short = true - found > 2 * TOL * true.abs() + 1e-9 * float(self.values.abs().max())
        converged = pairs.converged[sizes(pairs.eigenvalues).argsort(descending=True)]
        return int((short & converged).sum()), bool(converged.all()), pairs.num_matvecs


def spectrum(kind: str, seed: int) -> Tensor:
    """Return the eigenvalues of one planted spectrum, in random order."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=g))

    size = int(draw(300, 3000))
    i = torch.arange(1, size + 1, dtype=torch.float64)
    values = 20 * i ** -draw(0.5, 1.5)
    values = values * (1 + 0.2 * torch.rand(size, generator=g, dtype=torch.float64))
    if kind != "positive":
        negative = (torch.rand(size, generator=g) < 0.45) & (i > 5)
        values = torch.where(negative, -values, values)
    at, times = int(draw(3, 90)), int(draw(2, 31))
    if kind in ("repeated", "positive"):
        values[at : at + times] = values[at].clone()
    if kind == "cluster":
        values[at : at + times] = values[at] * (
            1 + 1e-3 * torch.rand(times, generator=g, dtype=torch.float64)
        )
    if kind == "flat tail":
        values[at : at + times] = values[at].clone()
        values[100:] = 0.3 * values[99].abs()
    return values[torch.randperm(size, generator=g)]


def cases(count: int) -> list[tuple[str, Case]]:
    """Return so many cases, over all configurations in turns."""
    kinds = ("repeated", "cluster", "positive", "flat tail")
    plans: list[tuple[str, str, str, dict[str, Any]]] = []
    for kind in kinds:
        for block in BLOCKS:
            plans.append((f"{kind}, block {block}", kind, "LM", {"block_size": block}))
        plans.append((f"{kind}, small basis", kind, "LM", {"block_size": 4, "max_basis": 0}))
    plans.append(("repeated, own block", "repeated", "LM", {}))
    for which in ("LA", "SA"):
        plans.append((f"repeated, {which}", "repeated", which, {"block_size": 4}))
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        plans.append((f"repeated, {name}", "repeated", "LM", {"storage_dtype": dtype}))
    for method in ("rayleigh_ritz", "single_pass"):
        plans.append((f"repeated, {method}", "repeated", "LM", {"method": method}))
    out = []
    for number in range(count):
        name, kind, which, options = plans[number % len(plans)]
        values = spectrum(kind, number)
        k = min(10 + 13 * (number % 8), len(values) // 4)
        options = {"tol": TOL, **options}
        if options.get("max_basis") == 0:
            options["max_basis"] = k + 24
        out.append((name, Case(kind, values, k, which, options)))
    return out


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--spectra", type=int, default=1000, help="how many; default 1000")
    arguments = options.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = Report("missed_pairs", arguments)
    found: dict[str, list[tuple[int, bool, float]]] = defaultdict(list)
    for name, case in cases(60 if arguments.quick else arguments.spectra):
        try:
            missed, converged, products = case.missed()
        except TypeError:  # a version without `which`
            continue
        found[name].append((missed, converged, products / case.k))
    rows = []
    for name, results in found.items():
        row = {
            "configuration": name,
            "spectra": len(results),
            "all converged": sum(converged for _, converged, _ in results),
            "missed in": sum(missed > 0 for missed, _, _ in results),
            "missed pairs": sum(missed for missed, _, _ in results),
            "products / k": statistics.median(products for _, _, products in results),
        }
        rows.append(list(row.values()))
        report.rows.append(row)
    print_table(list(report.rows[0]), rows)
    total = sum(row["missed pairs"] for row in report.rows)
    spectra = sum(row["spectra"] for row in report.rows)
    report.judge(
        "no pair is missed among those called converged",
        total == 0,
        f"{total} pairs in {sum(row['missed in'] for row in report.rows)} of {spectra} spectra",
    )
    report.write()


if __name__ == "__main__":
    main()
