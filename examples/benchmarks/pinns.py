"""NewtonCG on physics-informed networks, beside Adam, SOAP, L-BFGS, Adam + L-BFGS and NysNewton-CG.

    python examples/benchmarks/pinns.py                  # about half an hour of one core
    python examples/benchmarks/pinns.py --quick          # a smoke test
    python examples/benchmarks/pinns.py --full           # the paper's size, for a GPU; hours

Three equations (see pinn_problems.py); the net, points, loss and seconds are the same for all
contenders. Each has four settings, tried for `--tune` seconds on another seed; the one with the
lowest loss runs for `--seconds` on every seed of `--seeds`. Seconds are the processor's, of one
thread, so that other processes hardly count; on a GPU they are the clock's. Looking at loss and
error costs none. What is reported is the lowest loss on the way, and the error there: relative L2,
on a grid of 129 x 101.

    Adam            betas (.9, .999); the rate falls linearly to zero, as for SOAP
    SOAP            pytorch_optimizer's
    L-BFGS          torch's, strong Wolfe
    Adam + L-BFGS   the same, begun by Adam
    NysNewton-CG    DeepXDE's NNCG after Adam + L-BFGS, by one of its authors
    NewtonCG        hesscurv's with exact Hessians, from the same loss, after Adam + L-BFGS
    NewtonCG, GN    hesscurv's with curvature="gauss_newton", from residuals, after Adam or SOAP

The scaled problems are smaller (width 20, 400 residual points, one in eight of the others), and, as
seconds have to do, convection and wave have smaller coefficients than in the paper; `--coefficients
published` takes those. `--full` has the paper's: width 200, 10,000 residual points and all others,
float32; NysNewton-CG takes 11,000 steps of Adam, 30,000 of L-BFGS and 2000 of its own, for each of
four mu, and the others have the seconds that it took. It has not been run yet.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from contenders import is_installed
from pinn_problems import PUBLISHED, Pinn
from results import Report, parser, print_table
from torch.optim import LBFGS, Adam, Optimizer

from hesscurv.optim import NewtonCG

SCALED = {"convection": 10.0, "reaction": 5.0, "wave": 2.0}
MARKS = 20
TUNING_SEED = 100


@dataclass
class Phase:
    """One optimizer's part of a run.

    Args:
        make: It, for the net's parameters.
        until: The share of the seconds after which it ends.
        steps: The most steps; None for as many as there are.
        decay: Whether its rate falls to zero over the run.
        closure: What it asks for: "backward", as torch's optimizers do, "loss" or "residuals".
    """

    make: Callable[[Iterable[torch.nn.Parameter]], Optimizer]
    until: float = 1.0
    steps: int | None = None
    decay: bool = False
    closure: str = "backward"


@dataclass
class Curve:
    """What a run came to: at each mark seconds, loss and error; and what ended it early."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    wall: float = 0.0
    failed: str = ""

    @property
    def best(self) -> int:
        """The mark with the lowest loss."""
        finite = [loss if math.isfinite(loss) else math.inf for loss in self.losses]
        return min(range(len(finite)), key=finite.__getitem__)

    @property
    def loss(self) -> float:
        return self.losses[self.best]

    @property
    def error(self) -> float:
        return self.errors[self.best]

    def time_to(self, loss: float) -> float | None:
        """Seconds at the first mark with no more than this loss."""
        found = (s for s, own in zip(self.seconds, self.losses, strict=True) if own <= loss)
        return next(found, None)


def run(problem: Pinn, phases: list[Phase], seconds: float) -> Curve:
    """Train a net for some seconds and look at it now and then."""
    clock = _clock(problem.device)
    curve, spent, started = Curve(), 0.0, time.perf_counter()
    for phase in phases:
        optimizer = phase.make(problem.model.parameters())
        closure = _closure(problem, optimizer, phase.closure)
        rates = [group["lr"] for group in optimizer.param_groups]
        steps, end = 0, phase.until * seconds
        while spent < end and (phase.steps is None or steps < phase.steps):
            before = clock()
            if phase.decay and math.isfinite(seconds):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 - spent / seconds)
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # NNCG warns in every step
                    optimizer.step(closure)
            except torch.linalg.LinAlgError as error:  # NNCG's, where the Hessian is indefinite
                curve.failed = str(error)
                break
            spent += clock() - before
            steps += 1
            if spent >= _next_mark(curve, seconds):
                _look(problem, curve, spent)
        curve.steps.append(steps)
    if not curve.seconds or curve.seconds[-1] < spent:
        _look(problem, curve, spent)
    curve.wall = time.perf_counter() - started
    return curve


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _closure(problem: Pinn, optimizer: Optimizer, kind: str) -> Callable[[], Any]:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    return {"backward": closure, "loss": problem.loss, "residuals": problem.residuals}[kind]


def _next_mark(curve: Curve, seconds: float) -> float:
    if math.isfinite(seconds):
        return (len(curve.seconds) + 1) * seconds / MARKS
    return 60.0 * (len(curve.seconds) + 1)


def _look(problem: Pinn, curve: Curve, spent: float) -> None:
    curve.seconds.append(spent)
    curve.losses.append(float(problem.loss().detach()))
    curve.errors.append(problem.error())


# -- the contenders ---------------------------------------------------------------------------


def adam(rate: float, **how: Any) -> Phase:
    return Phase(lambda params: Adam(params, rate), **how)


def soap(rate: float, beta: float, every: int, decay: bool = True, **how: Any) -> Phase:
    def make(params: Iterable[torch.nn.Parameter]) -> Optimizer:
        from pytorch_optimizer import SOAP

        own = {"betas": (beta, beta), "precondition_frequency": every, "weight_decay": 0.0}
        return SOAP(params, rate, **own)

    return Phase(make, decay=decay, **how)


def lbfgs(history: int = 100, **how: Any) -> Phase:
    def make(params: Iterable[torch.nn.Parameter]) -> Optimizer:
        search = {"line_search_fn": "strong_wolfe", "tolerance_grad": 0, "tolerance_change": 0}
        return LBFGS(params, history_size=history, **search)

    return Phase(make, **how)


def nncg(mu: float, iterations: int, **how: Any) -> Phase:
    def make(params: Iterable[torch.nn.Parameter]) -> Optimizer:
        os.environ.setdefault("DDE_BACKEND", "pytorch")
        with contextlib.redirect_stderr(io.StringIO()):
            from deepxde.optimizers.pytorch.nncg import NNCG
        settings = {"rank": 60, "update_freq": 20, "cg_max_iters": iterations, "chunk_size": 8}
        return NNCG(params, mu=mu, line_search_fn="armijo", **settings)

    return Phase(make, closure="loss", **how)


def newton(**options: Any) -> Phase:
    kind = "residuals" if options.get("curvature") == "gauss_newton" else "backward"
    return Phase(lambda params: NewtonCG(params, **options), closure=kind)


def contenders(full: bool) -> dict[str, dict[str, list[Phase]]]:
    """Return each contender's settings, four of each, by what they are called."""
    begins = {
        (rate, share): [adam(rate, until=share), lbfgs(until=0.5)]
        for rate, share in ((1e-3, 0.05), (1e-2, 0.2))
    }
    firsts: dict[str, Callable[[float], Phase]] = {"Adam 0.01": lambda s: adam(1e-2, until=s)}
    if is_installed("pytorch_optimizer"):
        firsts["SOAP 0.01"] = lambda s: soap(1e-2, 0.95, 10, until=s, decay=False)
    out = {
        "Adam": {f"rate {r}": [adam(r, decay=True)] for r in (1e-3, 3e-3, 1e-2, 3e-2)},
        "SOAP": {
            f"rate {r}, beta {b}, every {e}": [soap(r, b, e)]
            for r, b, e in ((1e-3, 0.95, 10), (3e-3, 0.95, 10), (1e-2, 0.95, 10), (3e-3, 0.99, 2))
        },
        "L-BFGS": {f"history {h}": [lbfgs(h)] for h in (10, 30, 100, 300)},
        "Adam + L-BFGS": {
            f"Adam {r} for {s}": [adam(r, until=s), lbfgs()]
            for r in (1e-3, 1e-2)
            for s in (0.05, 0.2)
        },
        "NysNewton-CG": {
            f"Adam {r} for {s}, L-BFGS to 0.5, mu {mu}": [*begin, nncg(mu, 100)]
            for (r, s), begin in begins.items()
            for mu in (1e-1, 1e-3)
        },
        "NewtonCG": {
            f"Adam {r} for {s}, L-BFGS to 0.5, cg_tol {t}": [*begin, newton(cg_tol=t)]
            for (r, s), begin in begins.items()
            for t in (0.1, 0.01)
        },
        "NewtonCG, GN": {
            f"{label} for {s}": [begin(s), newton(curvature="gauss_newton")]
            for label, begin in firsts.items()
            for s in (0.1, 0.3)
        },
    }
    if full:
        begin = [adam(1e-3, steps=11_000), lbfgs(steps=30_000)]
        out["NysNewton-CG"] = {
            f"mu {mu}": [*begin, nncg(mu, 1000, steps=2000)] for mu in (1e-1, 1e-2, 1e-3, 1e-4)
        }
    if not is_installed("pytorch_optimizer"):
        del out["SOAP"]
    if not is_installed("deepxde"):
        del out["NysNewton-CG"]
    return out


# -- the comparison ---------------------------------------------------------------------------


def compare(name: str, report: Report, options: argparse.Namespace) -> None:
    """Tune and run all contenders on one equation."""
    full = options.full
    published = full or options.coefficients == "published"
    coefficient = (PUBLISHED if published else SCALED)[name]
    # Random numbers and vectors of some contenders come in the default dtype.
    dtype = torch.float32 if full else torch.float64
    torch.set_default_dtype(dtype)
    size = (200, 10_000, 1) if full else (options.width, options.points, 8)
    device = "cuda" if full and torch.cuda.is_available() else "cpu"

    def problem(seed: int) -> Pinn:
        torch.manual_seed(seed)
        return Pinn(name, coefficient, *size, seed, dtype, device)

    seconds, curves = options.seconds, {}
    found = contenders(full)
    order = sorted(found, key=lambda key: not (full and key == "NysNewton-CG"))
    for key in order:
        settings = found[key]
        unlimited = full and key == "NysNewton-CG"
        best = next(iter(settings))
        if len(settings) > 1 and options.tune > 0:
            limit = math.inf if unlimited else options.tune
            tried = {s: run(problem(TUNING_SEED), p, limit) for s, p in settings.items()}
            best = min(tried, key=lambda s: tried[s].loss)
        phases = settings[best]
        runs = [run(problem(s), phases, math.inf if unlimited else seconds) for s in options.seeds]
        if unlimited:
            seconds = statistics.mean(curve.seconds[-1] for curve in runs)
        curves[key] = runs
        row = {
            "problem": name,
            "coefficient": coefficient,
            "optimizer": key,
            "setting": best,
            "loss": _middle([curve.loss for curve in runs]),
            "error": _middle([curve.error for curve in runs]),
            "seconds": statistics.mean(curve.seconds[-1] for curve in runs),
            "wall": statistics.mean(curve.wall for curve in runs),
            "failed": sum(bool(curve.failed) for curve in runs),
        }
        print(*(f"{k} {v:.3g}" if isinstance(v, float) else v for k, v in row.items()), flush=True)
        report.rows.append({**row, "curves": [vars(curve) for curve in runs]})
    judge(name, report, curves, options.quick)


def _middle(values: list[float]) -> float:
    return statistics.median(values)


def judge(name: str, report: Report, curves: dict[str, list[Curve]], quick: bool) -> None:
    """Compare our two with each peer, by the medians over seeds."""
    for own in ("NewtonCG", "NewtonCG, GN"):
        loss, error = (_middle([getattr(c, k) for c in curves[own]]) for k in ("loss", "error"))
        for peer in curves:
            if peer.startswith("NewtonCG"):
                continue
            theirs, off = (
                _middle([getattr(c, k) for c in curves[peer]]) for k in ("loss", "error")
            )
            times = [c.time_to(theirs) for c in curves[own]]
            shown = "-" if None in times else f"{statistics.median(times):.3g} s"  # type: ignore[type-var]
            report.judge(
                f"{name}: {own} below {peer} in loss and error, in the same seconds",
                None if quick and peer != "Adam" else loss <= theirs and error <= off,
                f"loss {loss:.2g} / {theirs:.2g}, error {error:.2g} / {off:.2g}; its loss "
                f"after {shown}",
            )


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--problems", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED), metavar="NAME"
    )
    options.add_argument("--seconds", type=float, default=20.0, help="of a run; default 20")
    options.add_argument("--tune", type=float, default=4.0, help="seconds a setting; default 4")
    options.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    options.add_argument("--width", type=int, default=20, help="of the net; default 20")
    options.add_argument("--points", type=int, default=400, help="residual points; default 400")
    options.add_argument("--coefficients", choices=("scaled", "published"), default="scaled")
    options.add_argument("--full", action="store_true", help="the paper's size and protocol")
    options = options.parse_args()
    torch.set_num_threads(options.threads or 1)
    if options.quick:
        options.problems = options.problems[:1]
        options.seconds, options.tune, options.width, options.points = 1.0, 0.1, 8, 60
    report = Report("pinns", options)
    for name in options.problems:
        compare(name, report, options)
    columns = ("problem", "optimizer", "loss", "error", "seconds", "wall", "failed", "setting")
    print_table(columns, [[row[key] for key in columns] for row in report.rows])
    report.write()


if __name__ == "__main__":
    main()
