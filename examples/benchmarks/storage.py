"""Cost of keeping the basis elsewhere or in half precision: accuracy, seconds, memory.

    python examples/benchmarks/storage.py [--quick] [--data DIR] [--folder DIR]

One problem, 3c3d (895,210 parameters, 64 images, trained for 200 steps), k = 64 pairs to tol 1e-2
with a basis of at most 140 vectors, so that it is full and is restarted. Each storage runs in a
process of its own, all of them in turns, `--rounds` times. Columns:

    storage, dtype  of the basis; disk is a folder in DIR or the system's temporary one
    conv            pairs whose stated residual is within tol
    residual        the largest ||H v - lambda v|| / |lambda| of all pairs, measured by products
    stated          the largest of the stated ones
    1 - overlap     distance of the space from that of a float32 basis in memory, tol 1e-4
    products        of the solve
    seconds         median of the rounds, and over those of float32 in memory
    plan GB         bytes of the planned basis
    peak GB         anonymous memory at the solve's peak, beyond the model's own (after products)
    ratio           peak / (plan, if in memory, + work space), the work space being four blocks of
                    vectors and, for files, two stretches of 2^25 entries that a rotation reads
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from memory import anonymous_bytes
from results import Report, parser, print_table

TOL = 1e-2
STORAGES = [
    ("device", "float32"),
    ("device", "float16"),
    ("device", "bfloat16"),
    ("disk", "float32"),
    ("disk", "float16"),
]
SIZES = {False: ("3c3d", 64, 140, 16), True: ("small convnet", 20, 60, 8)}


# -- in a process of its own --------------------------------------------------------------------


class AnonymousPeak:
    """The most anonymous memory of this process while it is entered, sampled every 10 ms."""

    def __enter__(self) -> AnonymousPeak:
        self.peak, self._over = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())


def work(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from models import build

    import hesscurv

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    name, k, max_basis, block = SIZES[job["quick"]]
    problem = build(name, None if job["data"] is None else Path(job["data"]))
    task = hesscurv.supervised(problem.loss_fn)
    H = hesscurv.HessianOperator(problem.model, task, problem.batches, way="retained")
    reference = Path(job["folder"]) / "reference.pt"
    options: dict[str, Any] = {"block_size": block}
    if job["storage"] == "reference":
        hesscurv.eigsh(H, k, tol=1e-4, **options).save(reference)
        return {}
    for _ in range(3):
        H @ torch.randn(block, H.shape[0]).mT
    own = anonymous_bytes()
    options["storage"] = job["folder"] if job["storage"] == "disk" else "device"
    options["storage_dtype"] = getattr(torch, job["dtype"])
    start = time.perf_counter()
    with AnonymousPeak() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        pairs = hesscurv.eigsh(H, k, tol=TOL, max_basis=max_basis, **options)
    seconds = time.perf_counter() - start
    gaps = []
    for part in torch.arange(k).split(block):
        V, values = pairs.eigenvectors[:, part].float(), pairs.eigenvalues[part]
        gaps.append((H @ V - V * values).norm(dim=0) / values.abs())
    return {
        "converged": int(pairs.converged.sum()),
        "residual": float(torch.cat(gaps).max()),
        "stated": float((pairs.residuals / pairs.eigenvalues.abs()).max()),
        "distance": 1 - float(hesscurv.overlap(pairs, hesscurv.Eigenpairs.load(reference))),
        "products": pairs.num_matvecs,
        "restarts": pairs.info["restarts"],
        "seconds": seconds,
        "planned_bytes": pairs.info["planned_bytes"],
        "peak_bytes": memory.peak - own,
        "block_bytes": 4 * block * H.shape[0],
    }


def in_own_process(storage: str, dtype: str, folder: str, options: Any) -> dict[str, Any]:
    job = {
        "storage": storage,
        "dtype": dtype,
        "folder": folder,
        "quick": options.quick,
        "data": None if options.data is None else str(options.data),
        "threads": options.threads,
    }
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(job)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{storage}, {dtype} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# -- the run ------------------------------------------------------------------------------------


def measure(folder: str, options: Any) -> list[dict[str, Any]]:
    in_own_process("reference", "float32", folder, options)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in STORAGES}
    for round_number in range(1 if options.quick else options.rounds):
        for key in STORAGES if round_number % 2 == 0 else reversed(STORAGES):
            runs[key].append(in_own_process(*key, folder, options))
            print(f"{key[0]}, {key[1]}: {runs[key][-1]['seconds']:.3g} s", flush=True)
    rows = []
    for (storage, dtype), found in runs.items():
        ratios = [
            own["seconds"] / base["seconds"]
            for own, base in zip(found, runs["device", "float32"], strict=True)
        ]
        row = {"storage": storage, "dtype": dtype, **found[0]}
        row["seconds"] = statistics.median(run["seconds"] for run in found)
        row["relative_seconds"] = statistics.median(ratios)
        row["peak_bytes"] = max(run["peak_bytes"] for run in found)
        row["rounds"] = len(found)
        row["ratio"] = row["peak_bytes"] / expected_bytes(row)
        rows.append(row)
    return rows


def expected_bytes(row: dict[str, Any]) -> int:
    """Return the memory that a solve should take beside the model's own."""
    work = 4 * row["block_bytes"]
    return work + (2 * 2**25 * 4 if row["storage"] == "disk" else row["planned_bytes"])


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(work(json.loads(options.worker))))
        return
    report = Report("storage", options)
    k = SIZES[options.quick][1]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report.rows += measure(folder, options)
    headers = ["storage", "dtype", "conv", "residual", "stated", "1 - overlap", "products"]
    headers += ["seconds", "relative", "plan GB", "peak GB", "ratio"]
    keys = ["storage", "dtype", "converged", "residual", "stated", "distance", "products"]
    print()
    keys += ["seconds", "relative_seconds"]
    print_table(
        headers,
        [
            [
                *(row[key] for key in keys),
                row["planned_bytes"] / 1e9,
                row["peak_bytes"] / 1e9,
                row["ratio"],
            ]
            for row in report.rows
        ],
    )
    print()
    judge(report, k)
    report.write()


def judge(report: Report, k: int) -> None:
    for row in report.rows:
        where = f"{row['dtype']}, {row['storage']}"
        if row["dtype"] != "bfloat16":
            report.judge(
                f"{where}: all pairs within tol {TOL:g}, stated and measured",
                row["converged"] == k and row["residual"] <= TOL,
                f"{row['converged']} of {k}, largest measured residual {row['residual']:.1e}",
            )
        if not report.options.quick:
            report.judge(
                f"{where}: peak at most 1.25 x plan and work space, beside the model's own",
                row["ratio"] <= 1.25,
                f"{row['ratio']:.3f} x",
            )


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder with cifar-10-batches-py")
    options.add_argument("--folder", type=Path, help="where the disk's files go")
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)
    return options.parse_args()


if __name__ == "__main__":
    main()
