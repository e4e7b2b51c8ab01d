"""A preconditioned optimizer in words: what it is, and what it has done."""

from __future__ import annotations

from typing import Any

from hesscurv.optim.base_optimizer import describe, is_like_sgd
from hesscurv.optim.group_settings import DAMPING, EVERY, FACTOR, RANK, STEP
from hesscurv.optim.preconditioner.eigenspace_refresh import EigenspaceRefresh
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner
from hesscurv.optim.preconditioner.preconditioner_report import PreconditionerReport
from hesscurv.optim.preconditioner.tracked_preconditioner import TrackedPreconditioner
from hesscurv.optim.stable_rate import stable_rate


def make_report(
    group: dict[str, Any],
    P: LowRankPreconditioner | None,
    refresh: EigenspaceRefresh,
    step_seconds: float,
    base: Any,
) -> PreconditionerReport:
    """Return the report of a preconditioned optimizer.

    Args:
        group: The first parameter group.
        P: The preconditioner, if there is one.
        refresh: What has refreshed it.
        step_seconds: What preconditioning the steps took.
        base: The optimizer within.
    """
    known = P is not None and not P.is_identity
    values = P.eigenvalues if P is not None and known else []
    # Other optimizers may have a `momentum` that is something else.
    momentum = group if is_like_sgd(base) else None
    return PreconditionerReport(
        steps=group[STEP],
        refreshes=refresh.num_refreshes,
        failures=refresh.num_failures,
        num_matvecs=refresh.tracker.num_matvecs,
        seconds=refresh.schedule.elapsed(),
        refresh_seconds=refresh.schedule.refresh_seconds,
        step_seconds=step_seconds,
        eigenvalues=list(values),
        gains=list(P.gains) if P is not None and known else [],
        damping=P.damping if P is not None and known else 0.0,
        stable_rate=stable_rate(abs(values[0]), momentum) if values else float("nan"),
        stable_rate_after=stable_rate(P.largest_after, momentum)
        if P is not None and values
        else float("nan"),
        rate_factor=group[FACTOR],
        last_failure=refresh.last_failure,
    )


def describe_wrapper(
    name: str, base: Any, mode: str, refresh: EigenspaceRefresh, tracked: TrackedPreconditioner
) -> str:
    """Return what a preconditioned optimizer is, in four lines.

    Args:
        name: Of its class.
        base: The optimizer within.
        mode: What is preconditioned.
        refresh: What refreshes the eigenspace.
        tracked: The eigenspace.
    """
    group, tracker = base.param_groups[0], refresh.tracker
    share = refresh.schedule.max_fraction
    often = f"within {share:.0%} of the time" if group[EVERY] is None else f"every {group[EVERY]}"
    damping = "default" if group[DAMPING] is None else f"{group[DAMPING]:g}"
    what = "closure" if tracker.batches is None else f"{tracker.samples or 'all'} samples"
    numel = sum(p.numel() for p in tracked.flat.parameters)
    done = f"{group[STEP]} steps, {refresh.num_refreshes} refreshes"
    if refresh.num_failures:
        done += f", {refresh.num_failures} failures"
    return (
        f"{name}(\n"
        f"  base: {describe(base)}; the {mode} is preconditioned\n"
        f"  rank={group[RANK]}, damping={damping}, refreshed {often}\n"
        f"  {tracker.curvature} of {numel} numbers in {len(tracker.names)} parameters, {what}\n"
        f"  {done}\n"
        ")"
    )
