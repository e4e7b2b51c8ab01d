"""The list of a monitor's records, shown as a table in notebooks."""

from __future__ import annotations

from typing import Any

from hesscurv.interface.notebook_html import Points, draw_points, notebook_html
from hesscurv.plots.records import failed

# Columns of the table, where any record has a value.
_COLUMNS = (
    *("step", "loss", "sharpness", "sharpness_ratio", "overlap", "overlap_chance"),
    *(
        "space_overlap",
        "mask_iou",
        "trace",
        "sparsity",
        "num_matvecs",
        "seconds",
        "event",
        "status",
    ),
)


class Records(list[dict[str, Any]]):
    """A list of records, oldest first; in a notebook, a table of the newest ones."""

    def _repr_html_(self) -> str:
        return records_html("Records of a CurvatureMonitor", self)


def records_html(title: str, records: list[dict[str, Any]]) -> str:
    """Return HTML with the newest records, and the loss by step.

    Args:
        title: The heading.
        records: The records, oldest first.
    """
    num_failed = sum(map(failed, records))
    columns = [
        name
        for name in _COLUMNS
        if any(_is_shown(record.get(name)) for record in records)
        and (name != "status" or num_failed)
    ]
    facts: dict[str, Any] = {"measurements": len(records), "failed": num_failed}
    if records:
        facts["products"] = sum(int(record.get("num_matvecs") or 0) for record in records)
        facts["seconds"] = float(sum(float(record.get("seconds") or 0) for record in records))
    drawn = "sharpness" if "sharpness" in columns else "loss"
    known = [r for r in records if _is_number(r.get("step")) and _is_number(r.get(drawn))]
    points = Points(drawn, [r["step"] for r in known], [r[drawn] for r in known], joined=True)
    return notebook_html(
        title,
        facts,
        drawing=draw_points([points], x="step", y=drawn),
        columns=[name.replace("_", " ") for name in columns],
        rows=[[_cell(record.get(name)) for name in columns] for record in reversed(records)],
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_shown(value: Any) -> bool:
    return _is_number(value) or isinstance(value, str)


def _cell(value: Any) -> Any:
    return value if _is_shown(value) else None
