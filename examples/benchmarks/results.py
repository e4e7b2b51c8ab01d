"""Common reporting of the benchmarks: options, tables, verdicts, and the file of results.

Import it; it is not run. Every run appends one line of JSON to `results.jsonl` beside this file:

    benchmark     the script's name
    environment   date, processor, accelerator, cores, threads, versions, commit
    settings      the options of the run
    rows          one object per printed row, numbers unrounded
    verdicts      one object per target: what was to be reached, what was, and whether
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEFAULT_RESULTS = HERE / "results.jsonl"
PACKAGES = ("torch", "numpy", "hesscurv", "curvlinops-for-pytorch", "skerch", "scipy")
PACKAGES += ("hessian-eigenthings",)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    out = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument(
        "--quick", action="store_true", help="tiny problems, under a minute: a smoke test"
    )
    out.add_argument(
        "--results",
        metavar="PATH",
        help="the file to append to, or none; default results.jsonl beside the script, or none "
        "with --quick",
    )
    out.add_argument("--threads", type=int, help="threads of torch; default torch's own choice")
    return out


def environment() -> dict[str, Any]:
    """Return date, processor, threads, versions and commit; nothing that names the machine."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
    }


@dataclass
class Report:
    """One run of a benchmark: its rows and verdicts, printed as they come, written at the end."""

    benchmark: str
    options: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.environment = environment()
        e = self.environment
        print(
            f"{self.benchmark}: {e['processor']}, {e['cores']} cores, {e['threads']} threads, "
            f"torch {e['torch']}" + ("; a smoke test, no figures" if self.options.quick else "")
        )

    def judge(self, target: str, reached: bool | None, detail: str) -> None:
        """Print whether a target was reached: PASS, MISS, or not measured (None)."""
        word = {True: "PASS", False: "MISS", None: "n/a "}[reached]
        print(f"{word}  {target}: {detail}")
        self.verdicts.append({"target": target, "reached": reached, "detail": detail})

    def write(self) -> None:
        """Append the run to the file of results."""
        where = self.options.results or ("none" if self.options.quick else str(DEFAULT_RESULTS))
        if where.lower() == "none":
            return
        # Folders of the machine say nothing about the figures.
        settings = {
            key: True if isinstance(value, Path) else value
            for key, value in vars(self.options).items()
            if key not in ("results", "worker")
        }
        line = {
            "benchmark": self.benchmark,
            "environment": self.environment,
            "settings": settings,
            "rows": self.rows,
            "verdicts": self.verdicts,
        }
        with open(where, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=False) + "\n")
        print(f"appended to {Path(where).name}")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under headers: text to the left, numbers to the right with three digits."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = [
        all(isinstance(r[i], (int, float)) or r[i] is None for r in rows)
        for i in range(len(headers))
    ]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    for line in [list(headers), ["-" * w for w in widths], *cells]:
        parts = zip(line, widths, right, strict=True)
        print("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in parts).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if value == 0 or 0.01 <= abs(value) < 1e4:
            return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{value:.1e}"
    return str(value)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of this repository, with a plus where files differ from it."""
    try:
        git = ["git", "-C", str(HERE)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True)
    except OSError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.decode().strip() + ("+" if changes.stdout.strip() else "")
