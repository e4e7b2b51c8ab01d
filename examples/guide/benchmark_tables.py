"""Tables of the benchmark pages, from `examples/benchmarks/results.jsonl`.

A cell shows the latest run that measured it. Below each table stand the runs that it is from: date,
machine, versions, commit, and the command that repeats them. Blocks of the pages call `show_table`.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
RESULTS = EXAMPLES / "benchmarks" / "results.jsonl"
# Benchmarks whose script has another name than they.
SCRIPTS = {
    "reproduce 3c3d": "reproduce/cifar10_3c3d.py",
    "reproduce 3c3d monitor": "reproduce/cifar10_monitor.py",
    "reproduce beyond": "reproduce/beyond.py",
    "reproduce gpt2": "reproduce/gpt2.py",
    "reproduce mlp overlap": "reproduce/mlp_overlap.py",
    "reproduce resnet18": "reproduce/resnet18.py",
}
# Settings that are folders or files of the machine, which results.jsonl keeps as true.
FOLDERS = {"data", "checkpoints", "folder", "work", "figure", "rows"}


@dataclass(frozen=True)
class Run:
    """One line of the results without its rows."""

    benchmark: str
    environment: dict[str, Any]
    settings: dict[str, Any]

    def command(self) -> str:
        """Return the command that repeats the run."""
        parts = ["python", f"examples/{SCRIPTS.get(self.benchmark) or self._script()}"]
        for name, value in self.settings.items():
            flag = f"--{name.replace('_', '-')}"
            if value is True:
                parts += [flag, name.upper()] if name in FOLDERS else [flag]
            elif isinstance(value, list):
                parts += [flag, *map(str, value)]
            elif value not in (None, False):
                parts += [flag, str(value)]
        return shlex.join(parts)

    def origin(self) -> str:
        """Return date, machine and versions in a line."""
        e = self.environment
        device = e.get("accelerator") or f"{e['processor']} with {e['instructions']}"
        threads = f"{e['threads']} thread{'s' if e['threads'] > 1 else ''}"
        return f"{e['date'][:10]}, {device}, {threads}, torch {e['torch']}, commit {e['commit']}"

    def _script(self) -> str:
        return f"benchmarks/{self.benchmark.replace(' ', '_')}.py"


@dataclass(frozen=True)
class Cell:
    """A row of the results, and the run that it is from."""

    row: dict[str, Any]
    run: Run


def read(path: Path = RESULTS) -> list[tuple[Run, list[dict[str, Any]]]]:
    """Return all runs with their rows, in the file's order, which is that of time."""
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        run = Run(data["benchmark"], data["environment"], data["settings"])
        runs.append((run, data["rows"]))
    return runs


def latest(
    benchmark: str,
    key: Callable[[dict[str, Any]], Hashable],
    keep: Callable[[dict[str, Any]], bool] = lambda row: True,
    path: Path = RESULTS,
) -> dict[Hashable, Cell]:
    """Return the latest row of each key, in the order in which the keys first occur."""
    cells: dict[Hashable, Cell] = {}
    for run, rows in read(path):
        if run.benchmark == benchmark:
            cells.update({key(row): Cell(row, run) for row in rows if keep(row)})
    return cells


def show_table(
    headers: Sequence[str], rows: Iterable[Sequence[Any]], cells: Iterable[Cell]
) -> None:
    """Print a table of Markdown, and below it the runs that its cells are from."""
    rows = [[str(value) for value in row] for row in rows]
    lines = ["", "| " + " | ".join(headers) + " |"]
    columns = zip(*rows, strict=True)
    marks = [" ---: " if any(map(is_figure, column)) else " --- " for column in columns]
    lines.append("|" + "|".join(marks) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    runs = {cell.run.origin(): cell.run for cell in cells}
    lines += ["", '??? note "Measured ' + measured_on(runs.values()) + '"', ""]
    for origin, run in runs.items():
        lines += [f"    {origin}:", "", "    ```", f"    {run.command()}", "    ```", ""]
    write = sys._getframe(1).f_globals.get("print", print)  # as in guide_support
    write("\n".join(lines))


def is_figure(cell: str) -> bool:
    """Whether a cell of a table is a number, with its unit perhaps."""
    return re.fullmatch(r"[\d.,]+(e[+-]?\d+)?( %)?", cell) is not None


def measured_on(runs: Iterable[Run]) -> str:
    """Return the days of some runs, and their processors."""
    runs = list(runs)
    days = sorted({run.environment["date"][:10] for run in runs})
    machines = sorted({run.environment["processor"] for run in runs})
    return f"{' and '.join(days)} on {', '.join(machines)}: how to repeat"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with a few significant digits, as a reader expects it."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{max(digits - 2, 0)}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def percent(value: float, digits: int = 2) -> str:
    """Return a share as a percentage."""
    return f"{number(100 * value, digits)} %"


def median(value: Any, digits: int = 3) -> str:
    """Return the median of a measurement of several rounds."""
    return number(value["median"] if isinstance(value, dict) else value, digits)


def published(net: str) -> dict[str, Sequence[float]]:
    """Return the figures of CHITA's paper that `benchmarks/pruning.py` quotes, by method."""
    source = (EXAMPLES / "benchmarks" / "pruning.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PUBLISHED":
            return ast.literal_eval(node.value)[net]
    raise ValueError("expected PUBLISHED in benchmarks/pruning.py, found none")
