"""One decomposition in a process of its own: resumed after a kill, measured, checked.

Import it; it is not run. What the scripts of this folder share:

    shared_options   the options that all of them have
    in_own_process   the parent's side: runs the script again as a worker, or finds its result done
    decompose        the worker's side: eigenpairs, overlap with the largest weights, seconds, peak
    judge_pairs      what is printed about every decomposition's pairs

Seconds and peaks are summed up, or the largest taken, over all processes that worked on it, killed
ones too. They are of the operator and `eigsh`; what comes after, such as the independent check of
the pairs by plain double backward, is not in them.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from meter import Meter
from results import Report, environment, parser, print_table
from torch import nn
from training import write_json

import hesscurv

CHECKED = 20  # pairs whose residuals are measured


# -- options ------------------------------------------------------------------------------------


def shared_options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with what all scripts of this folder understand."""
    out = parser(description)
    out.add_argument("--data", type=Path, metavar="DIR", help="folder of the data; see above")
    out.add_argument(
        "--folder", type=Path, metavar="DIR", help="work folder: the same command goes on in it"
    )
    out.add_argument("--k", type=positive, help="eigenpairs")
    out.add_argument("--samples", type=positive, help="samples of the Hessian")
    out.add_argument("--batch", type=positive, help="samples in one batch of the Hessian")
    out.add_argument("--tol", type=float, default=1e-2, help="of the residuals; default 1e-2")
    out.add_argument("--storage", choices=["device", "cpu", "disk"], help="eigsh's; disk: --folder")
    out.add_argument("--storage-dtype", choices=["float32", "float16", "bfloat16"], help="eigsh's")
    out.add_argument("--block-size", type=positive, help="eigsh's")
    out.add_argument("--max-basis", type=positive, help="eigsh's")
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    out.add_argument("--seed", type=int, default=0, help="of weights, order and starting block")
    out.add_argument("--keep", action="store_true", help="keep checkpoint and pairs when done")
    out.add_argument("--worker", metavar="STEP", type=int, help=argparse.SUPPRESS)
    return out


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def start(options: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Fill in what was not given, set the threads, and let every line reach a log at once."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.threads:
        torch.set_num_threads(options.threads)
    sys.stdout.reconfigure(line_buffering=True)


def work_folder(options: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """Return the work folder, made if need be, that holds a run of these settings."""
    if options.folder is None:
        if not options.quick:
            raise SystemExit("give --folder DIR: weights and checkpoints go there, to go on from")
        options.folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, options.folder, ignore_errors=True)
    options.folder = options.folder.resolve()
    claim(options.folder, settings)
    return options.folder


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder for these settings; refuse one that was made for others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, settings)
        return
    before = json.loads(path.read_text())
    changed = [
        f"{key} {before.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted({*settings, *before})
        if before.get(key) != settings.get(key)
    ]
    if changed:
        raise SystemExit(
            f"{folder} was made with {'; '.join(changed)}. Give the same options to go on with it, "
            "or remove it, or another --folder"
        )


# -- the parent's side --------------------------------------------------------------------------


def decomposition_folder(options: argparse.Namespace, step: int) -> Path:
    name = f"step-{step}-k{options.k}-n{options.samples}-tol{options.tol:g}"
    return options.folder.resolve() / name


def in_own_process(options: argparse.Namespace, step: int) -> dict[str, Any]:
    """Return one decomposition's row: computed by a process of its own, or found done."""
    folder = decomposition_folder(options, step)
    settings = ("batch", "storage_dtype", "block_size", "max_basis", "device", "seed")
    claim(folder, {name: getattr(options, name) for name in settings})
    result = folder / "result.json"
    if result.is_file():
        print(f"step {step}: done before")
    else:
        gc.collect()
        torch.cuda.empty_cache()  # what training held is the worker's now
        own = ["--folder", str(options.folder), "--worker", str(step)]
        done = subprocess.run([sys.executable, sys.argv[0], *sys.argv[1:], *own])
        if done.returncode != 0:
            raise SystemExit(
                f"the process of step {step} ended with {done.returncode}; the same command goes on"
            )
    row = json.loads(result.read_text())["row"]
    print(
        f"step {step}: overlap {row['overlap']:.3g}, {row['ratio']:.3g} times chance; "
        f"{row['converged']}/{row['k']} pairs in {row['products']} products, "
        f"{row['seconds'] / 60:.3g} min, peak {row['peak_bytes'] / 1e9:.3g} GB"
    )
    return row


def print_plan(options: argparse.Namespace, model: nn.Module, source: str) -> None:
    """Print sizes before the work: D, k, what is stored where."""
    size = sum(p.numel() for p in model.parameters())
    entry = 4 if options.storage_dtype in (None, "float32") else 2
    block = options.block_size or max(4, min(16, options.k // 4))
    basis = min(size, options.max_basis or 2 * options.k + 10 * block + 30)
    where = {None: "where eigsh chooses", "device": f"on {options.device}", "cpu": "in memory"}
    print(
        f"{size:,} parameters; Hessian of {options.samples} samples of {source} in batches of "
        f"{options.batch}, on {options.device}.\nk = {options.k}, tol {options.tol:g}: a basis of "
        f"at most about {basis} vectors of {size * entry / 1e9:.3g} GB, "
        f"{basis * size * entry / 1e9:.3g} GB in all if there is room, "
        f"{where.get(options.storage, 'on disk')}."
    )


def show(rows: list[dict[str, Any]], paper: dict[int, float] | None = None) -> None:
    """Print the table: one row a step."""
    columns = ["step", "test loss", "accuracy", "overlap", "chance", "ratio", "z"]
    columns += ["paper"] if paper else []
    columns += ["converged", "res/|l_k|", "res/|l_1|", "negative", "products", "min", "peak GB"]
    table = []
    for row in rows:
        cells = [row[name] for name in ("step", "test_loss", "accuracy", "overlap", "chance")]
        cells += [row["ratio"], row["z_score"], *([paper.get(row["step"])] if paper else [])]
        cells += [f"{row['converged']}/{row['k']}", row["residual_over_last"]]
        cells += [row["residual_over_first"], row["negative"], row["products"]]
        table.append((*cells, row["seconds"] / 60, row["peak_bytes"] / 1e9))
    print()
    print_table(columns, table)
    print("res: the largest residual; |l_1|, |l_k|: the largest and the smallest |eigenvalue|\n")


def judge_pairs(report: Report, row: dict[str, Any]) -> None:
    """Say whether all pairs have converged, by the solver's residuals and by measured ones."""
    name = f"step {row['step']}"
    report.judge(
        f"{name}: every pair converged to tol {row['tol']:g}",
        row["converged"] == row["k"],
        f"{row['converged']} of {row['k']}, largest residual / |its eigenvalue| "
        f"{row['relative_residual']:.2e}",
    )
    report.judge(
        f"{name}: measured residuals of {row['checked']} pairs within tol",
        row["checked_within_tol"] == row["checked"],
        f"largest / |its eigenvalue| {row['measured_residual']:.2e}, at most "
        f"{row['measured_over_reported']:.2f} times the solver's",
    )


# -- the worker's side --------------------------------------------------------------------------


def decompose(
    options: argparse.Namespace,
    model: nn.Module,
    loss_fn: nn.Module,
    batches: list[Any],
    facts: dict[str, Any],
) -> None:
    """Compute one step's eigenpairs, check them, and leave its row in `result.json`.

    Args:
        options: Those of the script; `worker` is the step.
        model: The network, with that step's weights, in eval mode.
        loss_fn: Its mean loss.
        batches: The Hessian's data.
        facts: What else belongs into the row.
    """
    folder, k = decomposition_folder(options, options.worker), options.k
    task, scratch = hesscurv.supervised(loss_fn), folder / "vectors"
    if not sys.stderr.isatty():  # where the basis lies, from where it goes on
        logging.basicConfig(format="  %(message)s", stream=sys.stdout)
        logging.getLogger("hesscurv").setLevel(logging.INFO)
    dtype = None if options.storage_dtype is None else getattr(torch, options.storage_dtype)
    with Meter(folder / "meter.json", options) as meter:
        H = meter.operator = hesscurv.HessianOperator(model, task, batches)
        pairs = hesscurv.eigsh(
            H,
            k,
            tol=options.tol,
            generator=torch.Generator().manual_seed(options.seed),
            block_size=options.block_size,
            max_basis=options.max_basis,
            storage=str(scratch) if options.storage == "disk" else options.storage,
            storage_dtype=dtype,
            checkpoint=str(folder / "checkpoint"),
            progress=sys.stderr.isatty(),
        )
    print(f"step {options.worker}: {pairs}; now measuring residuals of some")
    values, residuals = (t.double().cpu() for t in (pairs.eigenvalues, pairs.residuals))
    mask = hesscurv.magnitude_mask(model, k)
    overlap, chance = hesscurv.overlap(mask, pairs), hesscurv.chance_overlap(k, H.shape[0]).mean
    info = {key: pairs.info.get(key) for key in ("block_size", "max_basis", "restarts")}
    del H, meter.operator  # the check needs its memory
    row = {
        "step": options.worker,
        **facts,
        "D": len(mask),
        "k": k,
        "samples": options.samples,
        "tol": options.tol,
        "overlap": overlap,
        "chance": chance,
        "ratio": overlap / chance,
        "z_score": hesscurv.overlap_z_score(mask, pairs),
        "converged": int(pairs.converged.sum()),
        "relative_residual": float((residuals / values.abs()).max()),
        "residual_over_last": float(residuals.max() / values[-1].abs()),
        "residual_over_first": float(residuals.max() / values[0].abs()),
        "eigenvalues": [float(values[0]), float(values[-1])],
        "negative": int((values < 0).sum()),
        "products": pairs.num_matvecs,
        **info,
        "stored": f"{pairs.eigenvectors.dtype} on {options.storage or pairs.eigenvectors.device}",
        "solver_seconds": pairs.info["seconds"],
        **meter.totals(),
        **check(model, task, batches, pairs, options.tol),
        "environment": environment(),
    }
    if options.keep:
        pairs.save(folder / "pairs.pt")
    spectrum = {"eigenvalues": values.tolist(), "residuals": residuals.tolist()}
    write_json(folder / "result.json", {"row": row, **spectrum})
    if not options.keep:
        for path in (folder / "checkpoint", scratch):
            shutil.rmtree(path, ignore_errors=True)


def check(
    model: nn.Module, task: Any, batches: list[Any], pairs: hesscurv.Eigenpairs, tol: float
) -> dict[str, Any]:
    """Measure residuals of pairs from all over the spectrum, by plain double backward."""
    H = hesscurv.HessianOperator(model, task, batches, way="retained", check=False)
    chosen = torch.linspace(0, len(pairs) - 1, min(CHECKED, len(pairs))).round().long().unique()
    floor = 10 * torch.finfo(torch.float32).eps * float(pairs.eigenvalues[0].abs())
    relative, over, within = [], [], 0
    for i in chosen.tolist():
        v, value = pairs.eigenvectors[:, i].to(H.device, H.dtype), float(pairs.eigenvalues[i])
        residual = float((H @ v - value * v).norm() / v.norm())
        relative.append(residual / abs(value))
        over.append(residual / max(float(pairs.residuals[i]), 1e-300))
        within += residual <= max(tol * abs(value), floor)
    return {
        "checked": len(chosen),
        "checked_within_tol": within,
        "measured_residual": max(relative),
        "measured_over_reported": max(over),
    }
