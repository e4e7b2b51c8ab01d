"""The learning rate as a share of the largest stable one, by a factor on the groups' own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hesscurv.optim.group_settings import INITIAL
from hesscurv.optim.stable_rate import stable_rate


@dataclass(frozen=True)
class AutomaticRate:
    """What the groups' rates are multiplied by, for a rate that is a share of the stable one.

    Args:
        fraction: The share.
        most: The largest factor.
    """

    fraction: float
    most: float

    def factor(self, curvature: float, groups: Sequence[dict[str, Any]]) -> float:
        """Return the factor at which the first group to get there has the share.

        A scheduler changes a group's rate, by which the factor is not measured: it is by the rate
        that the group had first.

        Args:
            curvature: The largest one that is left.
            groups: Parameter groups.
        """
        if not curvature > 0:
            return self.most
        rates = [(stable_rate(curvature, g), g[INITIAL]) for g in groups if INITIAL in g]
        return min([self.most, *(self.fraction * s / own for s, own in rates if own > 0)])


@contextmanager
def multiplied_rates(groups: Sequence[dict[str, Any]], factor: float) -> Iterator[None]:
    """Multiply the groups' learning rates, for a while."""
    found = [(group, group["lr"]) for group in groups if "lr" in group and factor != 1.0]
    try:
        for group, rate in found:
            group["lr"] = rate * factor
        yield
    finally:
        for group, rate in found:
            group["lr"] = rate
