"""The figures of a GPU: products, 1000 eigenpairs, and the overhead in training.

    python examples/benchmarks/gpu.py                        # on an H100 or H200; each part < 8 min
    python examples/benchmarks/gpu.py --part resnet18 --folder WORK   # stops, and goes on in WORK
    python examples/benchmarks/gpu.py --small --device cpu   # at a tenth of the size, minutes

Parts (`--part`, all by default), each reported and appended to the file of results by itself:

    products  gradients per product, b = 1 and 32 vectors: hesscurv by the plain call, curvlinops,
              the same compiled, hessian-eigenthings, plain double backward; on a dense net, 3c3d,
              ResNet-18 at 224 px and GPT-2 small (see gpu_problems.py). In full float32, TF32 off,
              for all of them; the gradients too.
    eigsh     1000 eigenpairs of 3c3d on 500 images, beside skerch, hessian-eigenthings' Lanczos and
              SciPy with products on the GPU, each within its share of --minutes; the residuals
              are measured in float64
    resnet18  milliseconds a sample and product at 224 px, and 1000 eigenpairs of 11.2 million
              parameters on 500 images, tol 1e-2, within --minutes. With --folder, the same
              command goes on where it has stopped; the folder takes up to 100 GB.
    storage   300 eigenpairs of 3c3d with the basis on the device, and in the host's memory with
              copies beside the work (pinned) and in turns (pageable)
    overhead  of PreconditionedOptimizer and CurvatureMonitor at default settings, on ResNet-18 and
              GPT-2 small, in percent of a training without: between measurements, in all, and
              steady, when measurements come as rarely as in a long training. Trainings take turns,
              with torch's own settings of TF32. Curvature is measured on four unseen batches by the
              optimizer, which takes up to a fifth of the time for it, and on one by the monitor.

Libraries that are not installed, or fail, are left out with the reason. Targets are judged on a
real GPU at full size alone. What was measured on something else is printed with that device's name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_eigenpairs import measure_eigsh, measure_resnet18
from gpu_overhead import measure_overhead
from gpu_problems import NAMES
from gpu_products import free_memory, measure_products
from gpu_storage import measure_storage
from results import Report, parser

from hesscurv.linalg.precision import full_precision

PARTS: dict[str, Callable[[Report, argparse.Namespace, str], None]] = {
    "products": measure_products,
    "eigsh": measure_eigsh,
    "resnet18": measure_resnet18,
    "storage": measure_storage,
    "overhead": measure_overhead,
}
FULL_PRECISION = ("products", "eigsh", "resnet18", "storage")


def main() -> None:
    options = parse()
    os.environ["HESSCURV_CACHE"] = "off"  # a cold start knows nothing of earlier runs
    if options.threads:
        torch.set_num_threads(options.threads)
    failed = []
    for part in options.part:
        print(f"\n{part}", flush=True)
        report = Report(f"gpu {part}", options)
        where = device_name(options.device, report)
        size = "at a tenth of the size: no figures" if options.quick else "at full size"
        print(f"measured on {where}, {size}", flush=True)
        start = time.perf_counter()
        try:
            device = torch.device(options.device)
            # TF32 off, which cuDNN's convolutions run in by default: the same digits for all.
            with full_precision(device) if part in FULL_PRECISION else contextlib.nullcontext():
                PARTS[part](report, options, where)
        except Exception:
            traceback.print_exc()
            failed.append(part)
        else:
            report.write()
        free_memory(options.device)
        print(f"{part}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def device_name(device: str, report: Report) -> str:
    """Return what a figure was measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{report.environment['processor']} ({report.environment['threads']} threads)"


def parse() -> argparse.Namespace:
    out = parser(__doc__)
    out.add_argument(
        "--small", dest="quick", action="store_true", help="the same as --quick: a tenth of all"
    )
    out.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    out.add_argument("--device", help="default cuda; with --small the CPU where there is none")
    out.add_argument("--data", type=Path, metavar="DIR", help="has MNIST/raw, cifar-10-batches-py")
    out.add_argument("--problems", nargs="+", choices=NAMES, help="of the products; default all")
    out.add_argument("--k", type=int, help="eigenpairs; default 1000, or 40 and 10 with --small")
    out.add_argument("--minutes", type=float, default=8.0, help="a part's limit; default 8")
    out.add_argument("--folder", type=Path, metavar="DIR", help="where resnet18 goes on")
    options = out.parse_args()
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() or not options.quick else "cpu"
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            f"--device {options.device}: expected a CUDA device, torch {torch.__version__} sees "
            "none; install a CUDA build of torch, or measure --small --device cpu"
        )
    if options.minutes <= 0:
        out.error(f"--minutes: expected a positive number, got {options.minutes:g}")
    # A device of another build's, played by the CPU say, has no figures of a GPU.
    has_backend = torch.version.cuda is not None or torch.version.hip is not None
    options.on_gpu = options.device.startswith("cuda") and has_backend and not options.quick
    sys.stdout.reconfigure(line_buffering=True)
    return options


if __name__ == "__main__":
    main()
