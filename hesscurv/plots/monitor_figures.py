"""Figures of a monitor report, as SVG that follows the reader's colour scheme."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from hesscurv import plots
from hesscurv.eigensolvers import Eigenpairs
from hesscurv.interface.descriptions import Described
from hesscurv.plots import canvas
from hesscurv.plots.records import Record, failed, number, series

# Placeholder colours that nothing else uses, replaced by those of the page.
_INK, _PAPER = "#010203", "#fdfcfb"
_STYLE = (
    "<style>:root{--ink:#1f2328;--paper:#fff}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--paper:#1b1e22}}</style>"
)
_SIZE = (4.6, 3.3)  # inches, legible on a phone
_SQUARE = (4.6, 3.9)
_WIDE = 6.5
_PIXELS = 96  # CSS pixels per inch


@dataclass(frozen=True, repr=False)
class Drawing(Described):
    """A figure for a page.

    Args:
        source: A data URI of SVG.
        width: In CSS pixels.
        height: Likewise.
        caption: Caption, plain text.
        wide: Whether it needs the full width of the page.
    """

    source: str
    width: int
    height: int
    caption: str
    wide: bool


def draw_all(
    records: list[Record], pairs: Eigenpairs | None, num_parameters: int | None
) -> Iterator[Drawing]:
    """Draw all quantities in the records, one figure at a time.

    Raises:
        ImportError: If matplotlib is missing.
    """
    for draw, caption in _choose(records, pairs, num_parameters):
        yield _encode(draw().figure, caption)


def _choose(  # noqa: C901, one condition a figure
    records: list[Record], pairs: Eigenpairs | None, num_parameters: int | None
) -> Iterator[tuple[Callable[[], Any], str]]:
    """Yield the drawing function and caption of each figure."""

    def small(
        draw: Callable[..., Any], *args: Any, size: tuple[float, float] = _SIZE, **options: Any
    ) -> Callable[[], Any]:
        return lambda: draw(*args, ax=canvas.axes_or_new(None, size), **options)

    def held(quantity: str) -> list[Record]:
        return [r for r in records if not failed(r) and r.get(quantity)]

    if is_number(records, "loss"):
        yield small(plots.by_step, records, "loss"), "Loss on the probe set, in the monitor's mode."
    if is_number(records, "sharpness"):
        yield (
            small(plots.sharpness, records),
            "The largest eigenvalue, beside the one at which gradient descent of this learning "
            "rate becomes unstable on a quadratic.",
        )
    spectra = [r for r in held("eigenvalues") if any(map(number, r["eigenvalues"]))]
    last = pairs if pairs is not None and bool(pairs.eigenvalues.any()) else None
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
                "lower right begins where it has settled. Grey: not compared.",
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


def spectra_of(records: list[Record]) -> list[Record]:
    """Return the records without residuals, which do not fit into a small figure."""
    return [{k: v for k, v in r.items() if k != "residuals"} for r in records]


def _encode(figure: Any, caption: str) -> Drawing:
    """Return a figure as SVG whose text and lines have the page's colours."""
    from matplotlib.text import Text

    figure.patch.set_alpha(0.0)
    for text in figure.findobj(Text):
        if text.get_gid() != "cell":  # labels of cells stand on a coloured ground
            text.set_color(_INK)
    for ax in figure.axes:
        ax.patch.set_alpha(0.0)
        ax.spines[:].set_edgecolor(_INK)
        ax.tick_params(which="both", color=_INK, labelcolor=_INK)
        if ax.get_legend() is not None:
            ax.get_legend().get_frame().set_facecolor(_PAPER)
    # Text as paths looks the same whatever fonts are installed.
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue().replace(_INK, "var(--ink)").replace(_PAPER, "var(--paper)")
    svg = svg[svg.index("<svg") :].replace(">", f">{_STYLE}", 1)
    width, height = (float(inches) for inches in figure.get_size_inches())
    return Drawing(
        source="data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
        width=round(width * _PIXELS),
        height=round(height * _PIXELS),
        caption=caption,
        wide=width > _WIDE,
    )
