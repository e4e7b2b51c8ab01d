"""Pictures of the documentation's pages: the hidden blocks below the visible code import `show`."""

from __future__ import annotations

import base64
import html
import io
import re
import sys
from typing import Any

# Beyond this an inline SVG (dense scatter plots, mostly) is slower to draw than a picture.
LARGEST_SVG = 300_000


def show(fig: Any, alt: str, caption: str | None = None) -> None:
    """Print a matplotlib figure as an inline `<figure>`, for a block with ``html="on"``.

    Black becomes the text colour of the page and white its background, so that one picture serves
    both colour schemes; the width follows the page.

    Args:
        fig: The figure, or axes of it.
        alt: What the picture shows, in a sentence, for who cannot see it.
        caption: A line below the picture, as plain text. None: no line.
    """
    fig = getattr(fig, "figure", fig)
    picture = as_svg(fig, alt)
    if len(picture) > LARGEST_SVG:
        picture = as_png(fig, alt)
    line = "" if caption is None else f"<figcaption>{html.escape(caption)}</figcaption>"
    # markdown-exec collects what the `print` of the block's own globals is given, and no other.
    write = sys._getframe(1).f_globals.get("print", print)
    write(f'<figure class="guide-figure">{picture}{line}</figure>')


def as_svg(fig: Any, alt: str) -> str:
    """Return the figure as an SVG element in the colours of the page."""
    import matplotlib

    file = io.StringIO()
    # A fixed salt: the same figure has the same bytes in every build.
    with matplotlib.rc_context({"svg.hashsalt": "guide"}):
        fig.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib's style sheet would hold for the whole page.
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # Names such as axes_1, which no element refers to, recur in each figure of a page.
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referred else "", svg)
    svg = svg.replace("#ffffff", "var(--md-default-bg-color, #fff)")
    svg = svg.replace("#000000", "currentColor")
    attributes = (
        f'role="img" aria-label="{html.escape(alt)}" fill="currentColor" '
        'style="stroke-linejoin: round; stroke-linecap: butt; max-width: 100%; height: auto" '
    )
    return svg.replace("<svg ", f"<svg {attributes}", 1).replace("\n", " ")


def as_png(fig: Any, alt: str) -> str:
    """Return the figure as an image on white."""
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=144, bbox_inches="tight", metadata={"Software": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
