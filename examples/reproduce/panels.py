"""Common parts of the figures of this folder; imported, not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
SKY, ORANGE, PURPLE, GREY = "#56B4E9", "#E69F00", "#CC79A7", "#888888"
DPI = 95


def panels(columns: int, rows: int = 1, *, width: float = 4.6, height: float = 3.8) -> Any:
    """Return the axes of a new figure: an array, or one if it has one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04, hspace=0.06)
    axes = figure.subplots(rows, columns)
    for ax in axes.flat if rows * columns > 1 else [axes]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    return axes


def dress(ax: Any, title: str, *, legend: dict[str, Any] | None = None, **settings: Any) -> None:
    """Set title, grid, legend (None: no legend) and the axes' own properties."""
    ax.set_title(title, loc="left", fontsize=11)
    ax.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    ax.set(**settings)
    if legend is not None:
        ax.legend(fontsize=9, frameon=False, handlelength=1.8, **legend)


def save(ax: Any, path: Path) -> None:
    """Write the figure that the axes are in."""
    ax.figure.savefig(path, dpi=DPI)
    print(f"Figure in {path}.")
