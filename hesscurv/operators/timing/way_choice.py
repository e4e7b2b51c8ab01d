"""Choice of the way by its calibration and by the number of products to come."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from hesscurv.operators.checks.agreement import Agreement
from hesscurv.operators.local_product import LocalProduct
from hesscurv.operators.timing.calibration import Calibration, bucket_of, calibrate

# Below this many products in all, measuring which way is fastest costs more than it saves.
_CALIBRATE_FROM = 24
EXPECTED = 500  # products to come, unless announced


class WayChoice:
    """The choice of the way for one operator.

    It rests on the number of products to come: what a solver says (`expect`), at least what a
    caller of `calibrate` said, or else what was computed so far.

    Args:
        local: What multiplies.
        agreement: Notes which ways have been compared.
        way: "auto" measures and chooses; "reference", or the name of the way for all products.
    """

    def __init__(self, local: LocalProduct, agreement: Agreement, way: str) -> None:
        self._local, self._agreement, self._way = local, agreement, way
        self._calibrations: dict[int, Calibration] = {}
        self._expected, self._asked_for = EXPECTED, 0
        self._told = False
        self._left_out: set[str] = set()

    def prepare(self, width: int, done: int) -> None:
        """Measure, if that pays off, before a block of `width` vectors, `done` products before."""
        if not self._told:
            self._expected = max(EXPECTED, done, self._asked_for)
        if self._way == "auto" and (self._told or done + width > _CALIBRATE_FROM):
            self._measured()

    def choose(self, width: int) -> tuple[str, int]:
        """Return the way and the number of vectors at once for a block of `width` vectors."""
        limit = max(1, min(width, self._local.plan.max_vectors))
        if self._way == "reference":
            return self._local.reference, limit
        if self._way != "auto":
            return self._way, limit
        calibration = self._calibrations.get(bucket_of(self._expected))
        if self._expected < _CALIBRATE_FROM or calibration is None or not calibration.seconds:
            return self._local.reference, limit
        return calibration.choose(limit, self._expected)

    def calibrate(self, expected: int) -> Calibration:
        """Measure for at least so many products, now and from here on."""
        self._asked_for = max(self._asked_for, expected)
        self._expected = max(self._expected, expected)
        return self._measured() or Calibration({}, {}, kept=True)

    def expect(self, products: int) -> None:
        """Choose for so many products from here on, whatever was computed before."""
        self._told = True
        self._expected = max(products, self._asked_for)

    def seconds_per_vector(self, block: int) -> float:
        """Return the predicted seconds per vector on one micro-batch; 0 if nothing is measured."""
        measured = self._measured()
        return 0.0 if measured is None else measured.seconds_per_vector(block, self._expected)

    def state(self) -> dict[str, Any]:
        """Return what choices rest on, in plain values."""
        return {
            "expected": [self._expected, self._asked_for],
            "told": self._told,
            "calibrations": {str(b): asdict(c) for b, c in self._calibrations.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Choose from here on as the choice did whose `state` this is."""
        self._expected, self._asked_for = state["expected"]
        self._told = state["told"]
        self._calibrations = {
            int(bucket): Calibration(
                {w: {int(n): s for n, s in by.items()} for w, by in found["seconds"].items()},
                found["setup"],
                found["kept"],
            )
            for bucket, found in state["calibrations"].items()
        }

    @property
    def expected(self) -> int:
        """The number of products that choices are made for."""
        return self._expected

    def leave_out(self, way: str) -> None:
        """Choose among the other ways from here on."""
        self._left_out.add(way)
        self._calibrations = {b: c.without(way) for b, c in self._calibrations.items()}

    def forget(self) -> None:
        """Measure again when needed: what it costs to set a way up has changed."""
        self._calibrations.clear()

    def _measured(self) -> Calibration | None:
        bucket, local = bucket_of(self._expected), self._local
        if local.own_weight == 0:  # other ranks have all the data
            return None
        if bucket not in self._calibrations and self._expected >= _CALIBRATE_FROM:
            with torch.inference_mode(False):
                found = local.within_memory(
                    lambda: calibrate(
                        local, self._agreement, next(local.shares())[1], self._expected
                    )
                )
            for way in self._left_out:
                found = found.without(way)
            self._calibrations[bucket] = found
        return self._calibrations.get(bucket)
