"""Peak memory of `prune_model` against its plan.

    python examples/benchmarks/pruning_memory.py [--quick]

One stage of a ResNet-20 of random weights, on random images, with 500 and 1000 gradients. Each peak
is taken in a process of its own: once by magnitude, which is the model's own with its data, and
once by "obs". Plan: the rows and the factors, as in the report. Ratio: (peak - own) / plan, to be
at most 1.25.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# torch is imported by the processes that measure alone: see `memory.peak_bytes`.
from memory import MOST_RATIO, peak_bytes
from results import Report, parser, print_table


def work(method: str, gradients: int, blocks: int) -> None:
    import torch
    from models import CIFARResNet

    import hesscurv

    torch.manual_seed(0)
    model = CIFARResNet(blocks).eval()
    count = max(gradients, 500)
    x, y = torch.randn(count, 3, 32, 32), torch.randint(10, (count,))
    report = hesscurv.pruning.prune_model(
        model,
        hesscurv.supervised(torch.nn.CrossEntropyLoss()),
        list(zip(x.split(100), y.split(100), strict=True)),
        0.3,
        method=method,
        stages=1,
        gradients_per_stage=gradients,
        options=hesscurv.pruning.PruningOptions(max_calibration=500, layer_losses=False),
    )
    print(json.dumps({"peak": peak_bytes(), "plan": report.planned_bytes, "D": report.numel}))


def in_own_process(method: str, gradients: int, blocks: int) -> dict[str, Any]:
    job = json.dumps([method, gradients, blocks])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--worker", job],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.worker:
        work(*json.loads(options.worker))
        return
    report = Report("pruning_memory", options)
    for gradients in (100, 200) if options.quick else (500, 1000):
        blocks = 1 if options.quick else 3
        own = in_own_process("magnitude", gradients, blocks)["peak"]
        full = in_own_process("obs", gradients, blocks)
        ratio = (full["peak"] - own) / full["plan"]
        report.rows.append({"gradients": gradients, **full, "own": own, "ratio": ratio})
        report.judge(
            f"{gradients} gradients: peak at most {MOST_RATIO} x plan + the model's own",
            None if options.quick else ratio <= MOST_RATIO,
            f"{ratio:.3f} x plan",
        )
    print_table(
        ["gradients", "D", "plan GB", "own GB", "peak GB", "ratio"],
        [
            (r["gradients"], r["D"], *(r[k] / 1e9 for k in ("plan", "own", "peak")), r["ratio"])
            for r in report.rows
        ],
    )
    report.write()


if __name__ == "__main__":
    main()
