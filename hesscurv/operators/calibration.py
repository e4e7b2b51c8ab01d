"""Which way of computing products is fastest for how many vectors: measured, and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hesscurv.operators.tasks import tensors_of

if TYPE_CHECKING:
    from hesscurv.operators.curvature_operator import CurvatureOperator

logger = logging.getLogger(__name__)

WIDTHS = (1, 4, 16, 32, 64)
_REMEMBERED: dict[str, Calibration] = {}


@dataclass(frozen=True)
class Calibration:
    """Measured seconds per vector of each way, by the number of vectors at once.

    Args:
        seconds: ``{way: {width: seconds per vector on one micro-batch}}``.
        setup: Seconds to set a way up on one micro-batch, paid in every pass where graphs are not
            kept.
        kept: Whether graphs are kept between products.
    """

    seconds: dict[str, dict[int, float]]
    setup: dict[str, float]
    kept: bool

    def cost(self, way: str, width: int, block: int) -> float:
        """Return the seconds per vector of a way that takes `width` of `block` vectors at once."""
        extra = 0.0 if self.kept else self.setup[way] / block
        return self.seconds[way][width] + extra

    def choose(self, block: int) -> tuple[str, int]:
        """Return the fastest way, and how many vectors at once, for blocks of `block` vectors."""
        options = [
            (self.cost(way, width, block), way, width)
            for way, by_width in self.seconds.items()
            for width in by_width
            if width <= block
        ]
        _, way, width = min(options)
        # A loop's width says nothing: it takes vectors one by one anyway.
        return way, block if width == 1 else width

    def seconds_per_vector(self, block: int) -> float:
        """Return the predicted seconds per vector on one micro-batch in blocks of `block`."""
        return min(
            self.cost(way, width, block)
            for way, by_width in self.seconds.items()
            for width in by_width
            if width <= block
        )

    def without(self, way: str) -> Calibration:
        """Return the calibration without one way."""
        return Calibration(
            {w: s for w, s in self.seconds.items() if w != way}, self.setup, self.kept
        )


def calibrate(operator: CurvatureOperator, batch: Any) -> Calibration:
    """Measure every way of an operator on one micro-batch, or recall what was measured before.

    A way that fails or disagrees with the first one, the reference, is left out. Results are kept
    for the process and, so that the same run takes the same steps and gives the same bits next
    time, in a file of the user's cache folder (`HESSCURV_CACHE`, "off" for none).

    Args:
        operator: The operator.
        batch: A micro-batch.

    Returns:
        The calibration; about 30 products of one micro-batch were spent on it.
    """
    key = _key(operator, batch)
    known = _REMEMBERED.get(key) or _read(key)
    if known is None:
        known = _measure(operator, batch)
        _write(key, known)
    _REMEMBERED[key] = known
    return known


def matches_reference(operator: CurvatureOperator, batch: Any, way: str, width: int) -> bool:
    """Whether a way gives the reference's products on a micro-batch, to rounding."""
    probes = _probes(operator, min(width, 2))
    expected = operator.product_on(batch, probes)
    try:
        got = operator.product_on(batch, probes, way)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.info("way %r is not available here: %s", way, error)
        return False
    return _agree(expected, got)


def _measure(operator: CurvatureOperator, batch: Any) -> Calibration:
    plan = operator.memory_plan
    widths = [w for w in WIDTHS if w <= plan.max_vectors]
    seconds: dict[str, dict[int, float]] = {}
    setup: dict[str, float] = {}
    expected = None
    for way in operator.ways:
        try:
            with warnings.catch_warnings():
                # Missing batching rules and the like make a way slow, which is measured.
                warnings.simplefilter("ignore")
                setup[way], apply = _timed(operator, lambda w=way: operator.prepare(batch, w))
                few = _probes(operator, 2)
                got = operator.run(apply, few, way)
                expected = got if expected is None else expected
                if not _agree(expected, got):
                    logger.warning("way %r disagrees with double backward; left out", way)
                    continue
                best = min((min(s.values()) for s in seconds.values()), default=float("inf"))
                seconds[way] = {}
                for width in [1] if way in operator.loops else widths:
                    per_vector = _per_vector(operator, apply, way, width)
                    seconds[way][width] = per_vector
                    if width > 1 and per_vector > 1.5 * min(best, *seconds[way].values()):
                        break
        except torch.OutOfMemoryError:
            seconds.pop(way, None)
        except Exception as error:
            if way == operator.ways[0]:
                raise
            seconds.pop(way, None)
            logger.info("way %r is not available here: %s", way, error)
    if not seconds:
        raise torch.OutOfMemoryError("out of memory for a single vector")
    return Calibration(seconds, setup, plan.keep_graphs)


def _per_vector(operator: CurvatureOperator, apply: Any, way: str, width: int) -> float:
    probes = _probes(operator, width)
    first, _ = _timed(operator, lambda: operator.run(apply, probes, way))
    times = [first]
    while len(times) < 3 or (sum(times) < 0.02 and len(times) < 10):
        times.append(_timed(operator, lambda: operator.run(apply, probes, way))[0])
        if times[-1] > 1.0:  # long ones are told apart without repeats
            break
    return min(times) / width


def _timed(operator: CurvatureOperator, fn: Any) -> tuple[float, Any]:
    _synchronize(operator.device)
    start = time.perf_counter()
    out = fn()
    _synchronize(operator.device)
    return time.perf_counter() - start, out


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _probes(operator: CurvatureOperator, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    probes = torch.randn(width, operator.shape[0], generator=generator, dtype=torch.float32)
    return probes.to(operator.device, operator.dtype)


def _agree(expected: torch.Tensor, got: torch.Tensor) -> bool:
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    gap = (expected - got).double().norm()
    return bool(gap <= tolerance * expected.double().norm() + torch.finfo(expected.dtype).tiny)


# -- memory across processes ------------------------------------------------------------------


def _key(operator: CurvatureOperator, batch: Any) -> str:
    device = operator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    parts = [
        type(operator).__name__,
        *operator.ways,
        type(operator.objective.model).__qualname__,
        str(operator.layout.to_dict()),
        str([(tuple(t.shape), str(t.dtype)) for t in tensors_of(batch)]),
        str(operator.dtype),
        str(operator.objective.training),
        str(operator.memory_plan.max_vectors >= WIDTHS[-1] or operator.memory_plan.max_vectors),
        str(operator.memory_plan.keep_graphs),
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


def _read(key: str) -> Calibration | None:
    folder = _folder()
    if folder is None:
        return None
    try:
        data = json.loads((folder / f"calibration-{key}.json").read_text())
        seconds = {w: {int(n): float(s) for n, s in by.items()} for w, by in data["seconds"].items()}
        return Calibration(seconds, dict(data["setup"]), bool(data["kept"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(key: str, calibration: Calibration) -> None:
    folder = _folder()
    if folder is None:
        return
    data = {
        "seconds": calibration.seconds,
        "setup": calibration.setup,
        "kept": calibration.kept,
    }
    with contextlib.suppress(OSError):  # a read-only home is no reason to fail
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(data, file)
            os.replace(temporary, folder / f"calibration-{key}.json")
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
