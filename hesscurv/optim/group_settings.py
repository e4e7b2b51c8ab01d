"""What a preconditioned optimizer keeps in its base's parameter groups: settings and counters.

A state dict has a place for tensors by parameter and for plain values by group, and none for more;
so what a run needs to go on is in every group, and the same in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# Steps so far; the step of the last refresh, or None; the step chosen for the next one, or None.
STEP, LAST, DUE = "curvature_step", "curvature_refreshed", "curvature_due"
# What multiplies the group's learning rate, and the rate that it was measured against.
FACTOR, INITIAL = "curvature_rate_factor", "curvature_initial_lr"

_BEGUN: dict[str, Any] = {STEP: 0, LAST: None, DUE: None, FACTOR: 1.0}


def begin_groups(groups: Iterable[dict[str, Any]], hyperparameters: dict[str, Any]) -> None:
    """Write hyperparameters, and counters that begin, into all groups.

    Raises:
        ValueError: If a group has one of these for a purpose of its own.
    """
    for group in groups:
        taken = [] if STEP in group else [key for key in hyperparameters if key in group]
        if taken:
            raise ValueError(
                f"expected a base without hyperparameters called {taken}, which stand for the "
                "preconditioner's own; pass those to PreconditionedOptimizer, or rename the base's"
            )
        group.update(hyperparameters | _BEGUN)
        group.pop(INITIAL, None)
    complete_groups(groups, hyperparameters)


def complete_groups(groups: Iterable[dict[str, Any]], hyperparameters: dict[str, Any]) -> None:
    """Give every group what it lacks: what the first one has, else the values given."""
    first: dict[str, Any] | None = None
    for group in groups:
        first = group if first is None else first
        for key, value in (hyperparameters | _BEGUN).items():
            if key not in group:
                group[key] = first.get(key, value)
        if "lr" in group and INITIAL not in group:
            # A number: a rate that is a tensor is written to by schedulers.
            group[INITIAL] = float(group.get("initial_lr", group["lr"]))


def write_to_groups(groups: Sequence[dict[str, Any]], values: dict[str, Any]) -> None:
    """Write values into all groups."""
    for group in groups:
        group.update(values)
