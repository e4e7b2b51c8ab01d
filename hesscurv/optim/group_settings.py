"""Settings and counters of a preconditioned optimizer in its base's parameter groups.

A state dict has a place for tensors by parameter and for plain values by group, and none for more;
so what a run needs to go on is in every group, and the same in all. Names carry a prefix: a base
may read any other key (GaLore projects every group that has a `rank`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PREFIX = "curvature_"
# Hyperparameters of PreconditionedOptimizer, which may be changed in the first group.
RANK, DAMPING, EVERY = "curvature_rank", "curvature_damping", "curvature_refresh_every"
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
    groups = list(groups)
    for group in groups:
        # What an earlier wrapper of the same base has left is replaced.
        taken = [] if STEP in group else [key for key in hyperparameters if key in group]
        if taken:
            raise ValueError(
                f"expected a base without hyperparameters called {taken}, which stand for the "
                "preconditioner's own; rename the base's"
            )
    for group in groups:
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


def own_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's settings and counters of ours."""
    return {key: value for key, value in group.items() if key.startswith(PREFIX)}


def with_prefix(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved group with the names of today.

    Hyperparameters had no prefix once; no base had keys of these names then.
    """
    if STEP not in group or RANK in group:
        return dict(group)
    old = {name.removeprefix(PREFIX): name for name in (RANK, DAMPING, EVERY)}
    return {old.get(key, key): value for key, value in group.items()}
