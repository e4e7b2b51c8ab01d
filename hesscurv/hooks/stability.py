"""Stability criterion for mask, eigenspace and their overlap during training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hesscurv.interface.ranges import check_count


@dataclass(frozen=True)
class Stability:
    """Bounds on the change from one measurement to the next.

    Each bound compares with the previous measurement and so depends on the interval between them:
    over more steps, or at a larger learning rate, more changes. None disables a bound.

    Args:
        mask_iou: Least intersection over union with the previous magnitude mask, in (0, 1]; default
            0.95.
        space_overlap: Least overlap with the previous eigenspace, in (0, 1]; default 0.7.
        overlap_change: Largest relative change of the share of the eigenspace that lies in the
            mask; default 0.2.
        patience: Number of consecutive measurements within the bounds; default 3.

    Raises:
        TypeError: If a bound is not a number, or `patience` not an int.
        ValueError: If one is out of range, or all are None.

    Example:
        >>> hesscurv.hooks.Stability(mask_iou=0.9, patience=2)
        Stability(mask_iou=0.9, space_overlap=0.7, overlap_change=0.2, patience=2)
    """

    mask_iou: float | None = 0.95
    space_overlap: float | None = 0.7
    overlap_change: float | None = 0.2
    patience: int = 3

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name, most in (("mask_iou", 1.0), ("space_overlap", 1.0), ("overlap_change", math.inf)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"expected {name} to be a number or None, got {value!r}")
            if not 0 < value <= most:
                raise ValueError(f"expected {name} in (0, {most:g}], got {value}")
        check_count("patience", self.patience)
        if self.mask_iou is self.space_overlap is self.overlap_change is None:
            raise ValueError(
                "expected a bound on mask_iou, space_overlap or overlap_change, got None for all"
            )

    @property
    def needs(self) -> list[str]:
        """The quantities required in records."""
        return [] if self.space_overlap is None else ["space_overlap"]

    def holds(self, signals: dict[str, Any]) -> bool:
        """Return whether a measurement is within the bounds; False without a previous one.

        Args:
            signals: ``mask_iou``, ``space_overlap`` and ``overlap_change``, each a number or None.
        """
        bounds = [
            (self.mask_iou, signals["mask_iou"], 1),
            (self.space_overlap, signals["space_overlap"], 1),
            (self.overlap_change, signals["overlap_change"], -1),
        ]
        return all(
            value is not None and sign * value >= sign * bound
            for bound, value, sign in bounds
            if bound is not None
        )


def relative_change(before: float | None, after: float | None) -> float | None:
    """Return ``|after - before| / max(|before|, |after|)``; None if one is missing."""
    if before is None or after is None:
        return None
    largest = max(abs(before), abs(after))
    return abs(after - before) / largest if largest else 0.0
