"""Which way of computing products is fastest for how many vectors: measured, and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hesscurv.operators.tasks import tensors_of

if TYPE_CHECKING:
    from hesscurv.operators.curvature_operator import CurvatureOperator

logger = logging.getLogger(__name__)

WIDTHS = (4, 8, 16, 32, 64)
# Above this per product, batching has no overhead left to save: two vectors tell enough.
_LONG_PRODUCT = 0.05
_SHORT = 0.02  # seconds
# Tracing a derivative takes from tenths of a second to seconds: it must have something to save.
_WORTH_TRACING = 2.0
_REMEMBERED: dict[str, Calibration] = {}


@dataclass(frozen=True)
class Calibration:
    """Measured seconds per vector of each way, by the number of vectors at once.

    Args:
        seconds: ``{way: {width: seconds per vector on one micro-batch}}``; width 1 is a loop.
        setup: Seconds to set each way up on one micro-batch.
        kept: Whether what is set up is kept between products; if not, every pass pays for it.
        passes: The number of micro-batches whose set-up is paid for.
        traced: The ways with a long set-up, tried for many products alone; None before that.
    """

    seconds: dict[str, dict[int, float]]
    setup: dict[str, float]
    kept: bool
    passes: int = 1
    traced: tuple[str, ...] | None = ()

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

    def covers(self, expected: int) -> bool:
        """Whether all ways are measured that come into question for so many products."""
        return self.traced is not None or not self.worth_tracing(expected)

    def worth_tracing(self, expected: int) -> bool:
        """Whether so many products take so long that a long set-up may pay off.

        Judged by the other ways alone, so that the answer does not depend on what has been tried.
        """
        best = min((min(s.values()) for s in self._untraced().values() if s), default=0.0)
        return expected * self.passes * best >= _WORTH_TRACING

    def without(self, way: str) -> Calibration:
        """Return the calibration without one way."""
        return replace(self, seconds={w: s for w, s in self.seconds.items() if w != way})

    def _untraced(self) -> dict[str, dict[int, float]]:
        return {w: s for w, s in self.seconds.items() if w not in (self.traced or ())}

    def _best(self, block: int, expected: int) -> tuple[float, str, int]:
        products = max(expected if self.kept else block, 1)
        ways = self.seconds if self.worth_tracing(expected) else self._untraced()
        options = (
            (seconds + self.setup[way] / products, way, width)
            for way, by_width in ways.items()
            for width, seconds in by_width.items()
            if width <= block
        )
        return min(options, default=(float("inf"), "", 1))


def calibrate(operator: CurvatureOperator, batch: Any, expected: int) -> Calibration:
    """Measure every way of an operator on one micro-batch, or recall what was measured before.

    A way that fails or disagrees with the first one, the reference, is left out. Results are kept
    for the process and, so that the same run takes the same steps and gives the same bits next
    time, in a file of the user's cache folder (`HESSCURV_CACHE`, "off" for none).

    Args:
        operator: The operator.
        batch: A micro-batch.
        expected: The number of products to come: ways with a long set-up are tried for many.

    Returns:
        The calibration; it costs some 50 to 200 products of one micro-batch.
    """
    key = _key(operator, batch)
    known = _REMEMBERED.get(key) or _read(key, operator.ways)
    if known is None or not known.covers(expected):
        if known is None:
            quick = [way for way in operator.ways if way not in operator.traced]
            known = _measure(operator, batch, quick)
        if not known.covers(expected):
            known = _measure(operator, batch, list(operator.traced), known)
        operator.verified.update(known.seconds)
        _write(key, known)
    _REMEMBERED[key] = known
    return known


def forget() -> None:
    """Forget what this process has measured; files in the cache folder stay."""
    _REMEMBERED.clear()


def matches_reference(operator: CurvatureOperator, batch: Any, way: str) -> bool:
    """Whether a way gives the reference's products on a micro-batch, to rounding."""
    probes = _probes(operator, 2)
    return _agree(operator.product_on(batch, probes), operator.product_on(batch, probes, way))


def _measure(
    operator: CurvatureOperator, batch: Any, ways: list[str], known: Calibration | None = None
) -> Calibration:
    """Measure some ways: at first those with a quick set-up, later, beside these, the others."""
    plan = operator.memory_plan
    widths = [w for w in WIDTHS if w <= plan.max_vectors]
    seconds = dict(known.seconds) if known else {}
    setup = dict(known.setup) if known else {}
    few = _probes(operator, 2)
    reference = operator.product_on(batch, few) if known else None
    best_batched: Any = None
    for way in (w for w in ways if w in operator.ways):
        best = _least(seconds)
        try:
            setup[way], apply = _timed(operator, lambda w=way: operator.prepare(batch, w))
            pair, got = _timed(operator, lambda w=way, a=apply: operator.run(a, few, w))
            reference = got if reference is None else reference
            if not _agree(reference, got):
                logger.warning("way %r disagrees with double backward; left out", way)
                continue
            hopeless = pair / 2 > 1.5 * best and best > _LONG_PRODUCT
            if way in operator.loops:
                seconds[way] = {1: _per_vector(operator, apply, way, 2, pair / 2)}
            elif widths and not hopeless:
                width = widths[min(2, len(widths) - 1)]
                if way in operator.traced:  # which may go on tracing in the first call
                    setup[way] += _timed(operator, partial(_run, operator, apply, way, width))[0]
                seconds[way] = {width: _per_vector(operator, apply, way, width, best)}
        except Exception as error:
            if way == operator.ways[0]:
                raise  # there is nothing to compare the others with
            logger.info("way %r is not available here: %s", way, error)
        # Graphs are large: only the best of the batched ways is looked at again.
        if way == _best_batched(operator, seconds):
            best_batched = apply
    best_way = _best_batched(operator, seconds)
    if best_way is not None and best_batched is not None:  # at the other widths too
        loop = min((s[1] for s in seconds.values() if 1 in s), default=float("inf"))
        if min(seconds[best_way].values()) < 1.5 * loop:
            with contextlib.suppress(torch.OutOfMemoryError):
                _look_around(operator, best_batched, best_way, widths, seconds[best_way], loop)
    passes = 1 if plan.keep_graphs else max(1, operator.objective.batches.count)
    return Calibration(seconds, setup, plan.keep_graphs, passes, operator.traced if known else None)


def _least(seconds: dict[str, dict[int, float]]) -> float:
    return min((min(s.values()) for s in seconds.values()), default=float("inf"))


def _best_batched(operator: CurvatureOperator, seconds: dict[str, dict[int, float]]) -> str | None:
    batched = [way for way in seconds if way not in operator.loops]
    return min(batched, key=lambda w: min(seconds[w].values()), default=None)


def _look_around(
    operator: CurvatureOperator,
    apply: Any,
    way: str,
    widths: list[int],
    found: dict[int, float],
    loop: float,
) -> None:
    """Measure a way at narrower and at wider blocks than the first, as long as it gains."""
    start = widths.index(next(iter(found)))
    for side in (widths[start + 1 :], widths[:start][::-1]):
        last = found[widths[start]]
        for width in side:
            found[width] = _per_vector(operator, apply, way, width, loop)
            if found[width] > 1.1 * last:
                break
            last = found[width]


def _per_vector(
    operator: CurvatureOperator, apply: Any, way: str, width: int, best: float
) -> float:
    times: list[float] = []
    spent = 0.0
    # The first calls may be slow, so short ones are looked at again; long ones only where that may
    # change the choice.
    while len(times) < 4 and (
        not times or spent < _SHORT or (min(times) < 1.5 * best and spent < 1.0)
    ):
        seconds, _ = _timed(operator, lambda: _run(operator, apply, way, width))
        times.append(seconds / width)
        spent += seconds
    return min(times)


def _run(operator: CurvatureOperator, apply: Any, way: str, width: int) -> torch.Tensor:
    return operator.run(apply, _probes(operator, width), way)


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
    probes = torch.randn(
        width, operator.shape[0], generator=generator, dtype=torch.float32, device="cpu"
    )
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
        str(operator.objective.batches.count),
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
        data = json.loads((folder / f"calibration-{key}.json").read_text())
        seconds = {
            way: {int(width): float(s) for width, s in by_width.items()}
            for way, by_width in data["seconds"].items()
        }
        setup = {way: float(data["setup"][way]) for way in seconds}
        kept, passes = bool(data["kept"]), int(data["passes"])
        traced = None if data["traced"] is None else tuple(map(str, data["traced"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # A file that was cut short or written by hand must not decide anything.
    if not any(seconds.values()) or not set(seconds) <= set(ways):
        return None
    return Calibration(seconds, setup, kept, passes, traced)


def _write(key: str, calibration: Calibration) -> None:
    folder = _folder()
    if folder is None:
        return
    data = asdict(calibration)
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
