"""Styled axes without pyplot, so that global state of matplotlib is never changed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

# Okabe and Ito's colours, distinguishable with all common colour blindnesses; different kinds of
# data on the same axes also differ in marker or dash.
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
SKY, ORANGE, PURPLE, GREY = "#56B4E9", "#E69F00", "#CC79A7", "#888888"
SEQUENTIAL = "viridis"  # perceptually uniform
MISSING = "#BBBBBB"
WIDTH = 1.8
SMALL = 9  # points: legends and notes


def matplotlib_parts() -> Any:
    """Import and return the used parts of matplotlib.

    Raises:
        ImportError: If it is missing.
    """
    try:
        import matplotlib
        import matplotlib.axes
        import matplotlib.figure
        import matplotlib.font_manager
        import matplotlib.mathtext
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hesscurv[plots]'") from error
    return matplotlib


def axes_or_new(ax: Any, size: tuple[float, float] = (6.0, 4.0)) -> Any:
    """Return styled axes: the given ones, or those of a new figure.

    A new figure is not registered with pyplot: ``ax.figure.savefig(path)`` writes it.

    Args:
        ax: Axes of matplotlib, or None.
        size: Width and height of a new figure, in inches.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If `ax` is something else.
    """
    matplotlib = matplotlib_parts()
    if ax is None:
        ax = matplotlib.figure.Figure(figsize=size, layout="constrained").subplots()
    elif not isinstance(ax, matplotlib.axes.Axes):
        raise TypeError(f"expected ax to be one matplotlib Axes or None, got {type(ax).__name__}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    return ax


def grid(ax: Any) -> None:
    """Draw faint horizontal lines."""
    ax.grid(axis="y", which="major", color=GREY, alpha=0.25, linewidth=0.8)


def title(ax: Any, text: str) -> None:
    """Set the title, to the left."""
    ax.set_title(text, loc="left", fontsize=11)


# Names are drawn literally: no formulas between dollars, no TeX.
AS_IT_IS = {"parse_math": False, "usetex": False}


def name(text: object) -> str:
    r"""Return a name as drawable text on one line, for use with `AS_IT_IS`.

    Control characters, and those missing in all fonts of the figure, are replaced by their codes:
    a line break by ``\n``, an ideograph by ``\u4e2d``.

    Args:
        text: The name of a module or parameter, any text.
    """
    known = _characters(tuple(_font_files()))
    return "".join(
        char if ord(char) in known and char.isprintable() else _code(char) for char in str(text)
    )


def plain(text: object) -> str:
    """Return a name escaped for titles and legends, where formulas and hidden labels are parsed."""
    return _shown(name(text).replace("$", r"\$"))


def label(text: str) -> str:
    """Return the caller's label, which may have formulas; otherwise treat it as a name."""
    parts = matplotlib_parts()
    if "$" in text:
        try:
            parts.mathtext.MathTextParser("path").parse(text)
        except ValueError:
            return plain(text)
        return _shown(text)
    return _shown(name(text))


def _shown(text: str) -> str:
    # Matplotlib omits labels that begin with an underscore from legends.
    return f" {text}" if text.startswith("_") else text


def _code(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _font_files() -> list[str]:
    fonts = matplotlib_parts().font_manager
    families = fonts.FontProperties().get_family()
    files = []
    for family in families:
        try:
            files.append(fonts.findfont(family, fallback_to_default=len(families) == 1))
        except ValueError:  # a font family that is not installed
            continue
    return files or [fonts.findfont(fonts.FontProperties())]


@functools.lru_cache(maxsize=8)
def _characters(files: tuple[str, ...]) -> frozenset[int]:
    """Return the codes of all characters that at least one font has."""
    fonts = matplotlib_parts().font_manager
    return frozenset(code for file in files for code in fonts.get_font(file).get_charmap())


def legend(ax: Any, **options: Any) -> None:
    """Draw the legend, if there are labels, at the best free place."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=SMALL, handlelength=1.6, framealpha=0.75, edgecolor="none", **options)


def legend_above(ax: Any) -> None:
    """Draw the legend at the top left, raising the upper limit so that it covers no data."""
    rows = len(ax.get_legend_handles_labels()[1])
    height = ax.get_window_extent().height / ax.figure.dpi
    share = min(0.5, (0.19 * rows + 0.1) / height)  # 9 points and their spacing are 0.19 inches
    low, high = ax.get_ylim()
    to, back = (math.log, math.exp) if ax.get_yscale() == "log" else (float, float)
    ax.set_ylim(low, back(to(low) + (to(high) - to(low)) / (1 - share)))
    legend(ax, loc="upper left")


def step_axis(ax: Any, steps: list[int]) -> None:
    """Name the x axis for training steps, with whole numbers that stay short.

    Where the measurements get sparse as a logarithmic schedule's do, so that half of them would
    stand in the first tenth, the scale is logarithmic, down to the first step after 0.
    """
    matplotlib = matplotlib_parts()
    ax.set_xlabel("training step")
    steps = sorted(steps)
    if len(steps) >= 6 and steps[0] >= 0 and steps[len(steps) // 2] < 0.1 * steps[-1]:
        first = next(step for step in steps if step > 0)
        ax.set_xscale("symlog", linthresh=first)
        ax.set_xlim(first / 1.3 if steps[0] else -0.3 * first, 1.3 * steps[-1])
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(
            matplotlib.ticker.MaxNLocator(
                nbins="auto", integer=True, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1
            )
        )
    ax.xaxis.set_major_formatter(lambda step, _: short(step))


def short(step: float, digits: int = 10) -> str:
    """Format a step as 900, 12.5k or 3M, to a number of digits."""
    for least, unit, name in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(step) >= least:
            return f"{step / unit:.{digits}g}{name}"
    return f"{step:.10g}"


def short_steps(steps: list[int]) -> list[str]:
    """Format steps with as few digits, at least three, as distinguish them."""
    for digits in range(3, 10):
        texts = [short(step, digits) for step in steps]
        if len(set(texts)) == len(set(steps)):
            return texts
    return [str(step) for step in steps]


def mark_events(ax: Any, records: Iterable[Mapping[str, Any]]) -> None:
    """Mark failures by crosses on the x axis, and events."""
    records = list(records)
    events: dict[str, list[int]] = {}
    for record in records:
        if record.get("event"):
            events.setdefault(str(record["event"]), []).append(record["step"])
    for (event, steps), dash in zip(events.items(), itertools.cycle([":", "-.", "--"])):
        for i, step in enumerate(steps):
            look = {"linestyle": dash, "color": GREY, "linewidth": 1.2, "zorder": 1}
            ax.axvline(step, **look, **({} if i else {"label": plain(event)}))
    steps = [record["step"] for record in records if record.get("status", "ok") != "ok"]
    if steps:
        ax.plot(
            steps,
            [0.0] * len(steps),
            linestyle="none",
            marker="x",
            markersize=6,
            markeredgewidth=1.8,
            color=RED,
            clip_on=False,
            zorder=5,
            transform=ax.get_xaxis_transform(),
            label="measurement failed",
        )


def band(ax: Any, x: Any, mean: Any, std: Any, label: str) -> None:
    """Draw a mean as a dashed line, and three standard deviations around it."""
    ax.fill_between(
        x,
        [max(m - 3 * s, 0.0) for m, s in zip(mean, std, strict=True)],
        [m + 3 * s for m, s in zip(mean, std, strict=True)],
        color=GREY,
        alpha=0.3,
        linewidth=0,
    )
    ax.plot(x, mean, "--", color=GREY, linewidth=1.4, label=label, zorder=1.5)
