"""Figures of a monitor report, and their captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from hesscurv import plots
from hesscurv.eigensolvers import Eigenpairs
from hesscurv.plots import canvas
from hesscurv.plots.records import Record, failed, number, series
from hesscurv.plots.report_figures import Drawing, encode_figure

_SIZE = (4.6, 3.3)  # inches, legible on a phone
_SQUARE = (4.6, 3.9)


def draw_all(
    records: list[Record], pairs: Eigenpairs | None, num_parameters: int | None
) -> Iterator[Drawing]:
    """Draw all quantities in the records, one figure at a time.

    Raises:
        ImportError: If matplotlib is missing.
    """
    for draw, caption in _choose(records, pairs, num_parameters):
        yield encode_figure(draw().figure, caption)


def _choose(  # noqa: C901, one condition a figure
    records: list[Record], pairs: Eigenpairs | None, num_parameters: int | None
) -> Iterator[tuple[Callable[[], Any], str]]:
    """Yield the drawing function and caption of each figure."""

    def small(
        draw: Callable[..., Any], *args: Any, size: tuple[float, float] = _SIZE, **options: Any
    ) -> Callable[[], Any]:
        return lambda: draw(*args, ax=canvas.axes_or_new(None, size), **options)

    def held(quantity: str) -> list[Record]:
        return [
            r for r in records if not failed(r) and any(map(math.isfinite, _numbers(r, quantity)))
        ]

    if is_number(records, "loss"):
        yield small(plots.by_step, records, "loss"), "Loss on the probe set, in the monitor's mode."
    if is_number(records, "sharpness"):
        yield (
            small(plots.sharpness, records),
            "The largest eigenvalue, beside the one at which gradient descent of this learning "
            "rate becomes unstable on a quadratic.",
        )
    spectra = [r for r in held("eigenvalues") if _can_be_drawn(_numbers(r, "eigenvalues"))]
    last = pairs if pairs is not None and _can_be_drawn(pairs.eigenvalues.tolist()) else None
    if last is None and spectra:
        last = spectra[-1]  # type: ignore[assignment]
    if last is not None:
        where = "" if not spectra else f" of step {spectra[-1]['step']:,}"
        yield (
            small(plots.spectrum, last),
            f"The spectrum{where} by sign; grey is the largest residual from that rank on, below "
            "which an eigenvalue is not told from zero.",
        )
    if len(spectra) > 1:
        yield small(plots.eigenvalues, spectra_of(records)), "All measured eigenvalues, by sign."
    if is_number(records, "gradient_share"):
        yield (
            small(plots.by_step, records, "gradient_share"),
            "How much of the gradient's squared norm lies in the top eigenspace.",
        )
    if is_number(records, "overlap"):
        yield (
            small(plots.overlap_by_step, records),
            "Overlap of the mask of the largest weights with the top eigenspace: 1 if they are the "
            "same, the dashed level by chance.",
        )
    if held("overlap_by_k"):
        yield (
            small(plots.overlap_by_k, records, num_parameters=num_parameters),
            "The same for the k largest weights and the top k eigenvectors, by k.",
        )
    for quantity, draw, what in (
        ("space_overlap", plots.space_overlaps, "eigenspace"),
        ("mask_iou", plots.mask_ious, "mask of the largest weights"),
    ):
        if held(quantity) or held(f"{quantity}s"):
            yield (
                small(draw, records, size=_SQUARE),
                f"The {what} of each step against that of each other step: a bright block at the "
                "lower right is one that hardly changes any more. Grey: not compared.",
            )
    if held("leverage_by_parameter"):
        yield (
            partial(plots.leverage, records),
            "Which parameters the top eigenspace lies in; the shares of a step sum to 1.",
        )
    for quantity, label, caption in (
        (
            "mask_by_parameter",
            "fraction kept",
            "The fraction of each parameter that is among the largest weights.",
        ),
        (
            "overlap_by_parameter",
            "part of the overlap",
            "What each parameter contributes to the overlap of mask and eigenspace.",
        ),
    ):
        if held(quantity):
            yield partial(plots.by_parameter, records, quantity, label=label), caption
    if is_number(records, "trace"):
        yield small(plots.by_step, records, "trace"), "The trace, estimated by random probes."
    if is_number(records, "effective_rank"):
        yield (
            small(plots.by_step, records, "effective_rank"),
            "The trace over the largest eigenvalue: how many directions of that curvature would "
            "make up the trace.",
        )
    pruned = [v for r in held("sparsity_by_parameter") for v in r["sparsity_by_parameter"].values()]
    if any(number(value) > 0 for value in pruned):
        yield partial(plots.sparsity, records), "The fraction of each parameter that is zero."


def is_number(records: list[Record], quantity: str) -> bool:
    """Return whether any record holds a finite value of the quantity."""
    try:
        return bool(series(records, quantity))
    except ValueError:
        return False


def _numbers(record: Record, quantity: str) -> list[float]:
    """Return the numbers of a quantity, by name, listed, or paired with a step; NaN for others."""
    values = record.get(quantity)
    if isinstance(values, Mapping):
        values = list(values.values())
    if not isinstance(values, (list, tuple)):
        values = [values]
    return [number(value[-1] if isinstance(value, (list, tuple)) else value) for value in values]


def _can_be_drawn(eigenvalues: list[float]) -> bool:
    """Return whether a logarithmic scale can show any of them."""
    return any(math.isfinite(value) and value != 0 for value in eigenvalues)


def spectra_of(records: list[Record]) -> list[Record]:
    """Return the records without residuals, which do not fit into a small figure."""
    return [{k: v for k, v in r.items() if k != "residuals"} for r in records]
