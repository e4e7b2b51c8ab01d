"""Values that lie over a picture: at the place of their mark, and no more than a page can hold."""

import math
import re

import pytest

from hesscurv.plots import canvas
from hesscurv.plots.hover import Value, draw_marks, show_cells, show_values

pytest.importorskip("matplotlib")


def marks_of(ax):
    """Texts by the center of their marks, in a picture of 100 by 100 pixels."""
    svg = draw_marks(ax.figure, 100, 100)
    points = re.findall(r'<circle cx="(.*?)" cy="(.*?)" r="7"><title>(.*?)</title>', svg)
    return {text: (float(x), float(y)) for x, y, text in points}


def plain_axes(**limits):
    """Axes that fill the left lower quarter of their figure."""
    ax = canvas.axes_or_new(None)
    ax.figure.set_layout_engine("none")
    ax.set_position([0, 0, 0.5, 0.5])
    ax.set(**{"xlim": (0, 10), "ylim": (0, 10), "xlabel": "step", "ylabel": "loss"} | limits)
    return ax


def test_the_values_of_lines_lie_where_they_are_drawn():
    ax = plain_axes()
    ax.plot([0, 5, 10, 5], [0, 2.5, 10, math.nan])
    ax.plot([5], [10], label="<chance>")
    ax.axhline(5)  # spans the axes: no value of a step
    assert marks_of(ax) == {
        "loss: 0, step 0": (0, 100),
        "loss: 2.5, step 5": (25, 87.5),
        "loss: 10, step 10": (50, 50),
        "&lt;chance&gt;: 10, step 5": (25, 50),
    }


def test_a_logarithmic_scale_and_limits_count():
    ax = plain_axes(yscale="log", ylim=(1, 100))
    ax.plot([5, 5, 5, 12], [10, 0.01, -1, 10])
    assert marks_of(ax) == {"loss: 10, step 5": (25, 75)}  # others lie outside of the axes


def test_texts_of_its_own_replace_those_of_the_lines():
    ax = plain_axes()
    ax.plot([5], [5])
    show_values(ax, [Value(5, 5, "-3 ± 0.1")])
    assert marks_of(ax) == {"-3 ± 0.1": (25, 75)}


@pytest.mark.parametrize(("columns", "shown"), [(3, 5), (1500, 2)])
def test_many_cells_are_summed_up_by_row(columns, shown):
    ax = plain_axes(xlim=(-0.5, columns - 0.5), ylim=(1.5, -0.5))
    rows = [[float(j) for j in range(columns)], [math.nan] + [1.5] * (columns - 1)]
    show_cells(ax, rows, lambda i: f"row {i}", lambda i, j: f"{i}, {j}")
    svg = draw_marks(ax.figure, 100, 100)
    texts = re.findall("<title>(.*?)</title>", svg)
    assert len(texts) == shown
    assert texts[0] == ("0, 0: 0" if columns == 3 else "row 0: 0 to 1,499")
    assert texts[-1] == ("1, 2: 1.5" if columns == 3 else "row 1: 1.5 to 1.5")
    width = float(re.search('width="(.*?)" height', svg).group(1))
    assert width == pytest.approx(50 / 3 if columns == 3 else 50, abs=0.1)


def test_a_page_gets_no_more_marks_than_it_can_hold():
    ax = plain_axes()
    ax.plot([5 + i / 1e4 for i in range(5000)], [5] * 5000)
    assert 1000 <= draw_marks(ax.figure, 100, 100).count("<title>") <= 2000
