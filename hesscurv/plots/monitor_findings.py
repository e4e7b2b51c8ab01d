"""Sentences on what the records of a monitor show; each only where the records support it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

from hesscurv.plots.hover import brief
from hesscurv.plots.records import Record, failed, number
from hesscurv.plots.report_tables import format_percent

_MOST_SENTENCES = 3
# A space has settled if it keeps more than this overlap with that of the measurement before.
_SETTLED = 0.9
_CHANGING = 0.8  # below, it clearly has not
_DEVIATIONS = 2  # within which an overlap is not told from chance


def monitor_findings(records: list[Record]) -> list[str]:
    """Return the findings, the most important ones first.

    Args:
        records: Sorted by step. Failed measurements and values that are not finite support nothing.
    """
    good = [record for record in records if not failed(record)]
    if not good:
        return [f"No measurement has succeeded, of {len(records):,}."] if records else []
    rules = (_diverged, _sharpness, _overlap, _settled, _negative, _loss)
    found = [sentence for rule in rules if (sentence := rule(good)) is not None]
    return found[:_MOST_SENTENCES]


def stability_share(record: Record) -> float | None:
    """Return the sharpness over its limit at the record's learning rate; None if unknown.

    The limit is that of gradient descent, with the optimizer's momentum if the record holds a
    `stable_rate`, otherwise 2 / learning rate.
    """
    rate, value = number(record.get("learning_rate")), number(record.get("sharpness"))
    if not (0 < rate < math.inf and 0 < value < math.inf):
        return None
    stable = number(record.get("stable_rate"))
    return rate / stable if 0 < stable < math.inf else rate * value / 2


def chance_level(record: Record) -> tuple[float, float] | None:
    """Return mean and standard deviation of the overlap by chance; None if unknown."""
    mean, std = (number(record.get(f"overlap_chance{end}")) for end in ("", "_std"))
    return (mean, std) if math.isfinite(mean) and 0 < std < math.inf else None


def value_of(record: Record, quantity: str) -> float:
    """Return a quantity of a record; NaN if it is missing or not a finite number."""
    value = number(record.get(quantity))
    return value if math.isfinite(value) else math.nan


def last_run(classes: list[Any]) -> int:
    """Return the index from which on all entries equal the last one."""
    start = len(classes) - 1
    while start > 0 and classes[start - 1] == classes[-1]:
        start -= 1
    return start


def _diverged(good: list[Record]) -> str | None:
    """Say that the loss is no longer finite."""
    held = [record for record in good if "loss" in record]
    finite = [math.isfinite(number(record["loss"])) for record in held]
    if not finite or finite[-1]:
        return None
    return f"The loss on the probe set is not finite from step {_step(held[last_run(finite)])} on."


def _sharpness(good: list[Record]) -> str | None:
    held = [record for record in good if "sharpness" in record]
    shares = [stability_share(record) for record in held]
    if not shares or shares[-1] is None:
        return None
    share, last = shares[-1], held[-1]
    more = " or more" if last.get("sharpness_converged") is False else ""
    text = (
        f"Sharpness is at {format_percent(share, 2 if share < 1 else 3)}{more} of the stability "
        f"limit of gradient descent with this learning rate (step {_step(last)})"
    )
    beyond = [value is not None and value > 1 for value in shares]
    if beyond[-1] and len(held) > 1:
        since = held[last_run(beyond)]
        text += f", above it since step {_step(since)}" if since is not last else ", newly above it"
    elif any(beyond):
        times = sum(beyond)
        text += f"; it was above it in {times:,} of {len(held):,} measurements"
    return f"{text}."


def _overlap(good: list[Record]) -> str | None:
    found = []
    for record in good:
        value, chance = value_of(record, "overlap"), chance_level(record)
        if chance is not None and math.isfinite(value):
            mean, std = chance
            far = (value - mean) / std
            side = 0 if abs(far) <= _DEVIATIONS else int(math.copysign(1, far))
            found.append((record, side, value, mean))
    if not found or found[-1][0] is not _last_with(good, "overlap"):
        return None
    what = "the overlap of the largest weights with the top eigenspace is"
    last, side, value, mean = found[-1]
    where = {
        0: f"within chance (mean ± {_DEVIATIONS} sd)",
        1: "above chance" + (f", {value / mean:.3g} times its mean" if mean > 0 else ""),
        -1: f"below chance (mean − {_DEVIATIONS} sd)",
    }[side]
    at_last = "" if side == 0 or len(found) == 1 else f" at step {_step(last)}"
    start = last_run([entry[1] for entry in found])
    if len(found) == 1:
        return f"At step {_step(last)} {what} {where}."
    if start == len(found) - 1:
        same = sum(entry[1] == side for entry in found[:-1])
        return (
            f"At step {_step(last)} {what} {where}, as at {same:,} of the {len(found) - 1:,} "
            "measurements before."
        )
    if start == 0:
        return f"From the first measurement on {what} {where}{at_last}."
    return f"From step {_step(found[start][0])} on {what} {where}{at_last}."


def _settled(good: list[Record]) -> str | None:
    """Say since when the eigenspace hardly changes, or that it does."""
    with_last = _with_last(good)
    # A slow drift keeps the overlap with the last space high, but not that of distant ones: those
    # compared with the present space must be near it too.
    present = dict(_history(good[-1]))
    start = len(with_last)
    while start > 0:
        record, value = with_last[start - 1]
        if not (value > _SETTLED and present.get(record["step"], 1.0) > _SETTLED):
            break
        start -= 1
    if start <= len(with_last) - 2:  # one alone does not stay
        return (
            f"The eigenspace settled at step {_step(with_last[start][0])}: overlap with the last "
            f"one stays above {_SETTLED}."
        )
    if start == len(with_last) >= 2 and (value := with_last[-1][1]) < _CHANGING:
        return (
            "The eigenspace is still changing: its overlap with the last one is "
            f"{value:.2f} at step {_step(with_last[-1][0])}."
        )
    return None


def _with_last(good: list[Record]) -> list[tuple[Record, float]]:
    """Return each record's overlap with the space measured before; NaN where it is unknown.

    The first record has no space before it and is left out.
    """
    out = []
    for before, record in itertools.pairwise(good):
        value = value_of(record, "space_overlap")
        if math.isnan(value):
            value = dict(_history(record)).get(before["step"], math.nan)
        out.append((record, value))
    return out


def _history(record: Record) -> Iterable[tuple[int, float]]:
    """Return the overlaps of a record's space with earlier ones, by step."""
    return [(int(step), number(value)) for step, value in record.get("space_overlaps") or ()]


def _negative(good: list[Record]) -> str | None:
    record = _last_with(good, "eigenvalues")
    if record is None:
        return None
    values = [number(value) for value in record["eigenvalues"]]
    residuals = [number(value) for value in record.get("residuals") or ()]
    if len(residuals) != len(values):
        residuals = [0.0] * len(values)
    # One within its residual of zero may have either sign.
    negative = [
        value
        for value, residual in zip(values, residuals, strict=True)
        if math.isfinite(value) and value < -residual
    ]
    if not negative:
        return None
    whole = f"{len(negative):,} of the {len(values):,} eigenvalues"
    verb = "is" if len(negative) == 1 else "are"
    return (
        f"{whole} of largest magnitude {verb} negative at step {_step(record)}, the lowest "
        f"{brief(min(negative))}."
    )


def _loss(good: list[Record]) -> str | None:
    found = [(r, value_of(r, "loss")) for r in good]
    found = [(record, value) for record, value in found if math.isfinite(value)]
    if len(found) < 2 or found[-1][0] is not _last_with(good, "loss"):
        return None
    (first, before), (last, after) = found[0], found[-1]
    if math.isclose(before, after, rel_tol=0.01):
        return None
    verb = "fell" if after < before else "rose"
    return (
        f"The loss on the probe set {verb} from {brief(before)} at step {_step(first)} to "
        f"{brief(after)} at step {_step(last)}."
    )


def _last_with(good: list[Record], quantity: str) -> Record | None:
    return next((record for record in reversed(good) if record.get(quantity) is not None), None)


def _step(record: Record) -> str:
    return f"{record['step']:,}"
