"""Trace, diagonal and spectral density beside curvlinops' estimators, at equal products.

    python examples/benchmarks/spectra.py [--problems NAME ...] [--data DIR] [--quick]

The errors are measured on the dense Hessian, which both libraries multiply with alike, and are root
mean squares over seeds. The times are measured on each library's own Hessian operator, in turns,
with curvlinops' blocks cut into the width that it is fastest with. Columns of the table:

    quantity     trace, diagonal or density
    estimator    the library and its method
    products     n, the same for all; the density has n/4 steps of 4 probes
    error        relative to the trace; to the norm of the diagonal; of the density, the area
                 between the curves, both smoothed by curvlinops' own width
    stated       hesscurv's standard error over its true error; 1 is right
    seconds      of one estimate, median with quartiles

The dense Hessian and its eigenvalues take D products and D^2 floats: some minutes for 7,030
parameters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import Counted, curvlinops_hessian, fastest_width, is_installed
from models import Problem, build
from results import Report, parser, print_table
from timing import interleaved
from torch import Tensor

import hesscurv

PROBLEMS = ("mlp",)
QUICK_PROBLEMS = ("small mlp",)
PROBES = 4
KAPPA = 3.0  # curvlinops' default smoothing
# An estimate of a quantity from n products with H, by seed; and its standard error where known.
Estimator = Callable[[Any, int, int], "tuple[Tensor, Tensor | None]"]


class Estimable(Counted):
    """An operator that has what curvlinops' estimators ask for, too."""

    def adjoint(self) -> Estimable:
        return self

    def to_scipy(self) -> None:
        """Stand in for what is built, but not used where the boundaries are given."""


class Exact:
    """The dense Hessian with its trace, diagonal and eigenvalues, in float64."""

    def __init__(self, problem: Problem) -> None:
        task = hesscurv.supervised(problem.loss_fn)
        H = hesscurv.HessianOperator(problem.model, task, problem.batches)
        H.calibrate(expected=problem.size)
        self.matrix = H.to_dense().double()
        self.diagonal = self.matrix.diagonal()
        self.trace = self.diagonal.sum()
        self.eigenvalues = torch.linalg.eigvalsh(self.matrix)
        self.boundaries = (self.eigenvalues[0].item(), self.eigenvalues[-1].item())

    def grid_and_sigma(self, steps: int) -> tuple[Tensor, float]:
        """Return curvlinops' grid and the width of its bumps, in units of the eigenvalues."""
        low, high = self.boundaries
        pad = 0.05 * (high - low)
        half = (high - low) / 2 + pad
        grid = torch.linspace(low - pad, high + pad, 1024, dtype=torch.float64)
        return grid, half * 2 / (steps - 1) / math.sqrt(8 * math.log(KAPPA))

    def density(self, steps: int) -> Tensor:
        grid, sigma = self.grid_and_sigma(steps)
        bumps = [torch.exp(-0.5 * ((t - self.eigenvalues) / sigma) ** 2).mean() for t in grid]
        return torch.stack(bumps) / sigma / math.sqrt(2 * math.pi)


def estimators(exact: Exact, with_peer: bool) -> dict[str, dict[str, Estimator]]:
    """Return the estimators of every quantity by name."""

    def by_trace(method: str) -> Estimator:
        def estimate(H: Any, n: int, seed: int) -> tuple[Tensor, Tensor]:
            out = hesscurv.trace(H, n, method, generator=seeded(seed))
            return torch.tensor(out.value), torch.tensor(out.standard_error)

        return estimate

    def by_diagonal(method: str) -> Estimator:
        def estimate(H: Any, n: int, seed: int) -> tuple[Tensor, Tensor]:
            out = hesscurv.diagonal(H, n, method, generator=seeded(seed))
            return out.values.double(), out.standard_error.double()

        return estimate

    def by_lanczos(reorthogonalize: bool) -> Estimator:
        def estimate(H: Any, n: int, seed: int) -> tuple[Tensor, Tensor]:
            steps = n // PROBES
            out = hesscurv.spectral_density(
                H, steps, PROBES, reorthogonalize=reorthogonalize, generator=seeded(seed)
            )
            return out.density(*exact.grid_and_sigma(steps))

        return estimate

    out: dict[str, dict[str, Estimator]] = {
        "trace": {f"hesscurv {m}": by_trace(m) for m in ("xtrace", "hutch++", "hutchinson")},
        "diagonal": {f"hesscurv {m}": by_diagonal(m) for m in ("xdiag", "hutchinson")},
        "density": {
            "hesscurv": by_lanczos(True),
            "hesscurv, no basis": by_lanczos(False),
        },
    }
    if not with_peer:
        return out
    import curvlinops as peer

    def globally(estimate: Callable[[Any, int], Any]) -> Estimator:
        def seeded_estimate(H: Any, n: int, seed: int) -> tuple[Tensor, None]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return torch.as_tensor(estimate(H, n)).double(), None

        return seeded_estimate

    def density(H: Any, n: int) -> Tensor:
        _, values = peer.lanczos_approximate_spectrum(
            H, n // PROBES, num_repeats=PROBES, kappa=KAPPA, boundaries=exact.boundaries
        )
        return values

    out["trace"] |= {
        "curvlinops xtrace": globally(peer.xtrace),
        "curvlinops hutch++": globally(peer.hutchpp_trace),
        "curvlinops hutchinson": globally(peer.hutchinson_trace),
    }
    out["diagonal"] |= {
        "curvlinops xdiag": globally(peer.xdiag),
        "curvlinops hutchinson": globally(peer.hutchinson_diag),
    }
    out["density"]["curvlinops"] = globally(density)
    return out


def measure(problem: Problem, options: Any) -> list[dict[str, Any]]:
    """Measure all estimators on one problem; one row for each and each number of products."""
    exact = Exact(problem)
    with_peer = is_installed("curvlinops", "scipy")
    task = hesscurv.supervised(problem.loss_fn)
    ours = hesscurv.HessianOperator(problem.model, task, problem.batches)
    ours.calibrate(expected=10_000)
    theirs: Any = None
    if with_peer:
        peer = curvlinops_hessian(problem)
        theirs = Estimable(peer, fastest_width(peer, 32))
    dense = Estimable(exact.matrix)
    rows = []
    for n in options.products:
        steps = n // PROBES
        grid, _ = exact.grid_and_sigma(steps)
        truths = {"trace": exact.trace, "diagonal": exact.diagonal, "density": exact.density(steps)}
        for quantity, methods in estimators(exact, with_peer).items():
            truth = truths[quantity]

            def size(values: Tensor, grid: Tensor = grid, quantity: str = quantity) -> float:
                if quantity == "density":
                    return float(torch.trapezoid(values.abs(), grid))
                return float(values.norm())

            calls = {}
            for name, method in methods.items():
                own = ours if name.startswith("hesscurv") else theirs
                calls[name] = lambda own=own, method=method, n=n: method(own, n, 0)
            times = interleaved(calls, options.rounds)
            for name, method in methods.items():
                gaps, stated = [], []
                for seed in range(options.seeds):
                    dense.num_matvecs = 0
                    value, error = method(dense, n, seed)
                    assert dense.num_matvecs <= n, f"{name} took {dense.num_matvecs} products"
                    gaps.append(size(value - truth))
                    stated += [] if error is None else [size(error)]
                rows.append(
                    {
                        "problem": problem.name,
                        "parameters": problem.size,
                        "samples": problem.num_samples,
                        "data": problem.data,
                        "quantity": quantity,
                        "estimator": name,
                        "products": n,
                        "seeds": options.seeds,
                        "error": root_mean_square(gaps) / size(truth),
                        "stated": root_mean_square(stated) / root_mean_square(gaps)
                        if stated and quantity != "density"
                        else None,
                        "seconds": times[name].summary(),
                        "shown": times[name],
                    }
                )
    return rows


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def judge(report: Report) -> None:
    """Print whether the default of each quantity is ahead of curvlinops' best at equal products."""
    defaults = {"trace": "hesscurv xtrace", "diagonal": "hesscurv xdiag", "density": "hesscurv"}
    cases = {(r["problem"], r["quantity"], r["products"]): None for r in report.rows}
    for problem, quantity, n in cases:
        rows = {
            r["estimator"]: r
            for r in report.rows
            if (r["problem"], r["quantity"], r["products"]) == (problem, quantity, n)
        }
        ours = rows[defaults[quantity]]
        peers = [r for name, r in rows.items() if name.startswith("curvlinops")]
        target = f"{quantity} of {problem} from {n} products"
        if not peers:
            report.judge(f"{target}: ahead of curvlinops", None, "curvlinops is not installed")
            continue
        best = min(peers, key=lambda r: r["error"])
        # 5 %: exact ties are decided by the seeds.
        report.judge(
            f"{target}: as accurate as curvlinops' best",
            ours["error"] <= 1.05 * best["error"],
            f"{ours['error']:.2g} against {best['error']:.2g} ({best['estimator']})",
        )
        mine, other = ours["seconds"]["median"], best["seconds"]["median"]
        report.judge(f"{target}: faster", mine < other, f"{mine:.3g} s against {other:.3g} s")


def main() -> None:
    options = parse()
    os.environ["HESSCURV_CACHE"] = "off"
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report("spectra", options)
    for name in options.problems or (QUICK_PROBLEMS if options.quick else PROBLEMS):
        problem = build(name, options.data, steps=5 if options.quick else None)
        report.rows += measure(problem, options)
        print(f"measured {name} on {problem.data}", flush=True)
    print()
    columns = ("problem", "quantity", "estimator", "products", "error", "stated", "shown")
    print_table([*columns[:-1], "seconds"], [tuple(row[c] for c in columns) for row in report.rows])
    print()
    judge(report)
    for row in report.rows:
        del row["shown"]
    report.write()


def parse() -> Any:
    options = parser(__doc__)
    options.add_argument("--problems", nargs="+", metavar="NAME", help=f"default {PROBLEMS}")
    options.add_argument("--data", type=Path, help="folder with MNIST/raw, cifar-10-batches-py")
    options.add_argument("--rounds", type=int, help="default 5, or 2 with --quick")
    options.add_argument("--seeds", type=int, help="default 20, or 5 with --quick")
    options.add_argument(
        "--products", type=int, nargs="+", help="multiples of 12; default 60 240, or 24 with quick"
    )
    out = options.parse_args()
    out.rounds = out.rounds or (2 if out.quick else 5)
    out.seeds = out.seeds or (5 if out.quick else 20)
    out.products = out.products or ([24] if out.quick else [60, 240])
    if any(n < 12 or n % 12 for n in out.products):
        options.error(
            f"--products takes multiples of 12, for curvlinops' estimators: {out.products}"
        )
    return out


if __name__ == "__main__":
    main()
