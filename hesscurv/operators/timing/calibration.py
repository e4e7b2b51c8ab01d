"""Calibration: seconds per vector of each way, measured once and cached."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hesscurv.interface.descriptions import Described
from hesscurv.objective.tasks import tensors_of
from hesscurv.operators.checks.agreement import Agreement
from hesscurv.operators.local_product import LocalProduct
from hesscurv.operators.timing.way_timing import WIDTHS, WayTiming
from hesscurv.storage.json_files import read_json, write_json

_REMEMBERED: dict[str, Calibration] = {}


@dataclass(frozen=True, repr=False)
class Calibration(Described):
    """Measured seconds per vector of each way, by the number of vectors at once.

    Args:
        seconds: ``{way: {width: seconds per vector on one micro-batch}}``; width 1 is a loop.
        setup: Seconds to set each way up on one micro-batch.
        kept: Whether what is set up is kept between products; if not, every pass pays for it.
    """

    seconds: dict[str, dict[int, float]]
    setup: dict[str, float]
    kept: bool

    def choose(self, block: int, expected: int) -> tuple[str, int]:
        """Return the fastest way, and how many vectors at once, for blocks of `block` vectors.

        Args:
            block: The number of vectors in a block.
            expected: The number of products over which a set-up that is kept pays off.
        """
        _, way, width = self._best(block, expected)
        return way, width

    def seconds_per_vector(self, block: int, expected: int) -> float:
        """Return the predicted seconds per vector on one micro-batch; arguments as in `choose`."""
        return self._best(block, expected)[0]

    def without(self, way: str) -> Calibration:
        """Return the calibration without one way."""
        return replace(self, seconds={w: s for w, s in self.seconds.items() if w != way})

    def _best(self, block: int, expected: int) -> tuple[float, str, int]:
        products = max(expected if self.kept else block, 1)
        options = (
            (seconds + self.setup[way] / products, way, width)
            for way, by_width in self.seconds.items()
            for width, seconds in by_width.items()
            if width <= block
        )
        return min(options, default=(float("inf"), "", 1))


def calibrate(local: LocalProduct, agreement: Agreement, batch: Any, expected: int) -> Calibration:
    """Measure the ways on one micro-batch, or recall what was measured before.

    A way that fails or disagrees with the first one, the reference, is left out. Results are kept
    for the process and, so that the same run takes the same steps and gives the same bits next
    time, in a file of the user's cache folder (`HESSCURV_CACHE`, "off" for none).

    Args:
        local: What multiplies.
        agreement: Notes the ways that agree on this micro-batch.
        batch: A micro-batch.
        expected: The number of products to come, to a factor of two: the more, the more is tried.

    Returns:
        The calibration; it takes about a quarter of the time of the products to come, at most.
    """
    bucket = bucket_of(expected)
    key = _key(local, batch, bucket)
    known = _REMEMBERED.get(key) or _read(key, local.ways)
    if known is None:
        found = WayTiming(local, batch, 3 * 2**bucket // 2)
        known = Calibration(found.seconds, found.setup, local.plan.keep_graphs)
        for way in known.seconds:  # compared while they were measured
            agreement.passed(0, way)
        if found.traced is not None:
            local.keep(*found.traced)
        _write(key, known)
    _REMEMBERED[key] = known
    return known


def bucket_of(expected: int) -> int:
    """Return the power of two below a number of products: nearby numbers share a calibration."""
    return max(expected, 1).bit_length() - 1


def forget() -> None:
    """Forget what this process has measured; files in the cache folder stay."""
    _REMEMBERED.clear()


# -- memory across processes ------------------------------------------------------------------


def _key(local: LocalProduct, batch: Any, bucket: int) -> str:
    device = local.objective.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    parts = [
        local.curvature.name,
        *local.ways,
        type(local.objective.model).__qualname__,
        str(local.layout.to_dict()),
        str([(tuple(t.shape), str(t.dtype)) for t in tensors_of(batch)]),
        str(local.objective.dtype),
        str(local.objective.training),
        str(local.plan.max_vectors >= WIDTHS[-1] or local.plan.max_vectors),
        str(local.plan.keep_graphs),
        str(local.objective.batches.count),
        str(bucket),
        name,
        str(torch.get_num_threads()),
        torch.__version__,
    ]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]


def _cpu_name() -> str:
    return torch.backends.cpu.get_cpu_capability() + f"-{os.cpu_count()}"


def _folder() -> Path | None:
    where = os.environ.get("HESSCURV_CACHE", "")
    if where.lower() in ("off", "0", "none"):
        return None
    if where:
        return Path(where)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "hesscurv"


def _read(key: str, ways: tuple[str, ...]) -> Calibration | None:
    folder = _folder()
    if folder is None:
        return None
    try:
        data = read_json(folder / f"calibration-{key}.json")
        seconds = {
            way: {int(width): float(s) for width, s in by_width.items()}
            for way, by_width in data["seconds"].items()
        }
        setup = {way: float(data["setup"][way]) for way in seconds}
        kept = bool(data["kept"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # A file that was cut short, changed or written by hand must not decide anything.
    if not any(seconds.values()) or not set(seconds) <= set(ways):
        return None
    return Calibration(seconds, setup, kept)


def _write(key: str, calibration: Calibration) -> None:
    folder = _folder()
    if folder is None:
        return
    data = asdict(calibration)
    with contextlib.suppress(OSError):  # a read-only home is no reason to fail
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"calibration-{key}.json", data)
