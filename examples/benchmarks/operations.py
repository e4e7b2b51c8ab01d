"""Operations of torch under the Hessian, the GGN and the Fisher: working, refused, wrong.

    python examples/benchmarks/operations.py [--ways] [NAME ...]

Every module of torch.nn and every function of torch.nn.functional is found by name and put into a
small network. Products in float64 are compared with oracles that know no second derivative: for the
Hessian, differences of the gradient; for the GGN and the Fisher, the Jacobian by a backward pass an
output, itself compared with differences of the outputs. A row of the table has, for each operator,

    works      the products agree
    refused    a ValueError or NotImplementedError says what is missing, and what to do
    WRONG      the products differ from the oracle
    RAW        another error

``--ways`` adds a column for each way of computing that an operator has.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HESSCURV_CACHE", "off")

import torch
from operation_cases import (
    FUNCTIONS,
    MODULES,
    SAMPLES,
    WITHOUT_RECIPE,
    LossNet,
    LossRecipe,
    Net,
    Plain,
    Recipe,
)
from operation_losses import LOSSES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscurv

KINDS: dict[str, Any] = {
    "Hessian": hesscurv.HessianOperator,
    "GGN": hesscurv.GGNOperator,
    "Fisher": hesscurv.EmpiricalFisherOperator,
}
_STEP = 1e-5
# Truncation of central differences is near 1e-10; near a kink of a piecewise function it is more.
_AGREEMENT = 1e-5


@dataclass(frozen=True)
class Verdict:
    """What came of an operation under an operator: a word of the table, and the error's text."""

    word: str
    text: str = ""


@dataclass
class Problem:
    """A network around an operation, a batch, and the loss on its outputs."""

    model: nn.Module
    batch: tuple[Tensor, Any]
    loss: Callable[[Tensor, Any], Tensor]
    training: bool = False

    def copied(self) -> nn.Module:
        return copy.deepcopy(self.model).train(self.training)


def module_names() -> list[str]:
    """Return the names of all modules of torch.nn."""
    found = [(n, getattr(nn, n)) for n in dir(nn)]
    return [n for n, c in found if inspect.isclass(c) and issubclass(c, nn.Module)]


def function_names() -> list[str]:
    """Return the names of all functions of torch.nn.functional."""
    found = [(n, getattr(F, n)) for n in dir(F) if not n.startswith("_")]
    return [n for n, f in found if callable(f) and not inspect.isclass(f)]


def recipe_of(name: str) -> Recipe | LossRecipe | None:
    """Return how to use an operation; None where it is listed as one that has no recipe."""
    if name in WITHOUT_RECIPE:
        return None
    for known in (MODULES, FUNCTIONS, LOSSES):
        if name in known:
            return known[name]
    if hasattr(nn, name):
        return Recipe((6,), getattr(nn, name))
    return Recipe((6,), lambda: Plain(getattr(F, name)))


def problem_of(recipe: Recipe | LossRecipe) -> Problem:
    """Build the network of a recipe, the same every time, in float64."""
    torch.manual_seed(0)
    if isinstance(recipe, LossRecipe):
        targets = recipe.targets()
        if targets.is_floating_point():
            targets = targets.double()
        batch = torch.randn(SAMPLES, 3).double(), targets
        return Problem(LossNet(recipe).double(), batch, recipe.loss)
    net = Net(recipe).eval()
    x = net.example(SAMPLES)
    x = x if recipe.tokens else x.double()
    batch = x, torch.arange(SAMPLES) % 2
    return Problem(net.double(), batch, F.cross_entropy, recipe.training)


def examine(name: str, kind: str, way: str = "auto") -> Verdict:
    """Return what comes of an operation under an operator, by one way of computing."""
    recipe = recipe_of(name)
    assert recipe is not None
    try:
        problem = problem_of(recipe)
    except Exception as error:
        return Verdict("NO RECIPE", f"{type(error).__name__}: {error}")
    try:
        operator = KINDS[kind](
            problem.model,
            hesscurv.supervised(problem.loss),
            [problem.batch],
            way=way,
            training=problem.training,
        )
        vectors = torch.randn(operator.shape[0], 2, dtype=torch.float64)
        products = operator @ vectors
    except (ValueError, NotImplementedError) as error:
        return Verdict("refused" if is_told(error) else "RAW", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Verdict("RAW", f"{type(error).__name__}: {error}")
    expected = ORACLES[kind](problem, vectors)
    gap = float((products - expected).norm() / expected.norm().clamp(min=1e-9))
    return Verdict("works") if gap < _AGREEMENT else Verdict("WRONG", f"off by {gap:.1e}")


def is_told(error: Exception) -> bool:
    """Whether an error is one of hesscurv's own, with a remedy."""
    remedies = ("params=", "Operator", "compute_dtype=", "way='auto'", "deterministic", "replace")
    return any(remedy in str(error) for remedy in remedies)


# -- oracles ----------------------------------------------------------------------------------


def _hessian(problem: Problem, vectors: Tensor) -> Tensor:
    model = problem.copied()
    params = list(model.parameters())
    x, t = problem.batch

    def gradient() -> Tensor:
        loss = problem.loss(model(x), t)
        found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in found])

    return _differences(gradient, params, vectors)


def _ggn(problem: Problem, vectors: Tensor) -> Tensor:
    model = problem.copied()
    x, t = problem.batch
    J = _jacobian(lambda: model(x), list(model.parameters()), vectors)
    with torch.no_grad():
        z = model(x)
    C = torch.autograd.functional.hessian(
        lambda flat: problem.loss(flat.view_as(z), t), z.flatten()
    )
    return J.T @ C @ (J @ vectors)


def _fisher(problem: Problem, vectors: Tensor) -> Tensor:
    model = problem.copied()
    x, t = problem.batch

    def losses() -> Tensor:
        z = model(x)
        return torch.stack([problem.loss(z[i : i + 1], t[i : i + 1]) for i in range(len(z))])

    J = _jacobian(losses, list(model.parameters()), vectors)
    return J.T @ (J @ vectors) / len(x)


ORACLES = {"Hessian": _hessian, "GGN": _ggn, "Fisher": _fisher}


def _jacobian(outputs: Callable[[], Tensor], params: list[Tensor], vectors: Tensor) -> Tensor:
    z = outputs().flatten()
    rows = []
    for entry in z:
        found = torch.autograd.grad(
            entry, params, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    J = torch.stack(rows)
    with torch.no_grad():
        change = _differences(lambda: outputs().flatten(), params, vectors)
    gap = float((J @ vectors - change).norm())
    assert gap <= 1e-6 * max(1.0, float(change.norm())), f"the backward pass is off by {gap:.1e}"
    return J


def _differences(fn: Callable[[], Tensor], params: list[Tensor], vectors: Tensor) -> Tensor:
    """Return central differences of a function of the parameters along each column."""
    columns = []
    for v in vectors.T:
        pieces = v.split([p.numel() for p in params])
        found = []
        for step in (_STEP, -2 * _STEP, _STEP):
            with torch.no_grad():
                for p, piece in zip(params, pieces, strict=True):
                    p += step * piece.view_as(p)
            found.append(fn().detach())
        columns.append((found[0] - found[1]) / (2 * _STEP))
    return torch.stack(columns, 1)


# -- the table --------------------------------------------------------------------------------


def columns_of(ways: bool) -> list[tuple[str, str]]:
    """Return the columns, (operator, way)."""
    found = []
    for kind, operator in KINDS.items():
        found += [(kind, way) for way in (("auto", *operator.ways) if ways else ("auto",))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="operations; default all")
    parser.add_argument("--ways", action="store_true", help="a column for each way of computing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    columns = columns_of(arguments.ways)
    counts: Counter[tuple[tuple[str, str], str]] = Counter()
    texts: dict[str, str] = {}
    print(
        f"{'operation':34s}"
        + " ".join(f"{k + (':' + w if w != 'auto' else ''):>11s}" for k, w in columns)
    )
    names = arguments.names or [*module_names(), *function_names()]
    for name in names:
        if recipe_of(name) is None:
            print(f"{name:34s}-- {WITHOUT_RECIPE[name]}")
            continue
        row = []
        # Attention of the oracle in the form that has derivatives.
        with sdpa_kernel(SDPBackend.MATH):
            for column in columns:
                verdict = examine(name, *column)
                counts[column, verdict.word] += 1
                row.append(f"{verdict.word:>11s}")
                if verdict.text:
                    texts[f"{name}, {column[0]}, {column[1]}"] = verdict.text
        print(f"{name:34s}" + " ".join(row), flush=True)
    print()
    for where, text in texts.items():
        print(f"{where}: {' '.join(text.split())[:400]}")
    print()
    for (kind, way), word in sorted(counts):
        print(f"{kind:8s} {way:20s} {word:8s} {counts[(kind, way), word]}")
    bad = sum(n for (_, word), n in counts.items() if word in ("WRONG", "RAW"))
    assert not bad, f"{bad} of them are wrong, or end in an error that does not help"


if __name__ == "__main__":
    main()
