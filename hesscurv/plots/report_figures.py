"""Figures of an HTML report: SVG that follows the reader's colour scheme, with values on hover."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

from hesscurv.interface.descriptions import Described
from hesscurv.plots.hover import draw_marks

# Placeholder colours that nothing else uses, replaced by those of the page.
_INK, _PAPER = "#010203", "#fdfcfb"
_STYLE = (
    "<style>:root{--ink:#1f2328;--paper:#fff}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--paper:#1b1e22}}</style>"
)
# Inches; at 0.7 of its size, a narrower figure fits the narrowest column of two.
_WIDE = 5.4
_PIXELS = 96  # CSS pixels per inch
_POINTS = 72
_MOST_MARKERS = 1000  # of one kind; as pixels, more take less room and time than as shapes
_RASTER = 216  # dots per inch, for a sharp screen


@dataclass(frozen=True, repr=False)
class Drawing(Described):
    """A figure for a page.

    Args:
        title: Title, plain text.
        caption: Caption, plain text.
        source: A data URI of SVG.
        marks: A transparent SVG element that shows the values on hover.
        width: In CSS pixels.
        height: Likewise.
        wide: Whether it needs the full width of the page.
    """

    title: str
    caption: str
    source: str
    marks: str
    width: int
    height: int
    wide: bool


def encode_figure(figure: Any, caption: str) -> Drawing:
    """Return a figure as SVG whose text and lines have the page's colours.

    Its title is taken out of the picture: the page writes it above, as text.
    """
    from matplotlib.text import Text

    title = ""
    for ax in figure.axes:
        if not title:
            title = ax.get_title(loc="left").replace(r"\$", "$").strip()
        ax.set_title("", loc="left")
        ax.patch.set_alpha(0.0)
        ax.spines[:].set_edgecolor(_INK)
        ax.tick_params(which="both", color=_INK, labelcolor=_INK)
        if ax.get_legend() is not None:
            ax.get_legend().get_frame().set_facecolor(_PAPER)
    figure.patch.set_alpha(0.0)
    for text in figure.findobj(Text):
        if text.get_gid() != "cell":  # labels of cells stand on a coloured ground
            text.set_color(_INK)
    # Text as paths looks the same whatever fonts are installed. SVG is drawn at 72 dots per inch:
    # with the same here, the places of the values are those of the picture.
    figure.set_dpi(_POINTS)
    for line in (line for ax in figure.axes for line in ax.get_lines()):
        if len(line.get_xdata()) > _MOST_MARKERS and line.get_linestyle() == "None":
            line.set_rasterized(True)
    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=_RASTER, metadata={"Date": None, "Creator": None})
    svg = file.getvalue().replace(_INK, "var(--ink)").replace(_PAPER, "var(--paper)")
    svg = svg[svg.index("<svg") :].replace(">", f">{_STYLE}", 1)
    inches = [float(length) for length in figure.get_size_inches()]
    width, height = (round(length * _PIXELS) for length in inches)
    return Drawing(
        title=title,
        caption=caption,
        source="data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
        marks=draw_marks(figure, width, height),
        width=width,
        height=height,
        wide=inches[0] > _WIDE,
    )


def figures_html(drawings: Iterable[Drawing]) -> str:
    """Return figures as HTML, or a sentence that says what they need; empty without any."""
    try:
        parts = [_figure(drawing) for drawing in drawings]
    except ImportError as error:  # without matplotlib the page still has the numbers
        return f"<p>No figures: {escape(str(error))}</p>"
    return f'<div class="figures">\n{chr(10).join(parts)}\n</div>' if parts else ""


def _figure(drawing: Drawing) -> str:
    d = drawing
    # Below 0.7 of its size a figure is illegible: a narrow screen scrolls it instead.
    size = f"max-width:{1.2 * d.width:.0f}px;min-width:{0.7 * d.width:.0f}px"
    return (
        f"<figure{' class=wide' if d.wide else ''}><h3>{escape(d.title)}</h3>"
        f'<div class="scroll"><div class="plot" style="{size}">'
        f'<img src="{d.source}" width="{d.width}" height="{d.height}" '
        f'alt="{escape(d.title)}. {escape(d.caption)}">{d.marks}</div></div>'
        f"<figcaption>{escape(d.caption)}</figcaption></figure>"
    )
