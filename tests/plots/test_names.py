"""Any name that a module may have is drawn as it is: no formula, no hidden label, no warning."""

import io
from xml.etree import ElementTree

import pytest

from hesscurv import plots
from hesscurv.plots import canvas
from hesscurv.plots.by_parameter import shorten

matplotlib = pytest.importorskip("matplotlib")

# How a name is drawn, where it is not as it is.
NAMES = {
    "a$_b^$": None,
    "$": None,
    "$x$": None,
    "\\$\\frac{": None,
    "\\alpha$\\frac$": None,
    "^^__": None,
    "_hidden": None,
    "__": None,
    "two words": None,
    "%s %d {0}": None,
    "<b>&\"'</b>": None,
    "a/b\\c": None,
    "ñ é": None,
    "😀": None,
    "中文": "\\u4e2d\\u6587",
    "new\nline": "new\\nline",
    "tab\t": "tab\\t",
    "\x00": "\\x00",
    "\ud800": "\\ud800",
    " ": None,
    "a--b-->": None,
    "]]>&amp;": None,
}


def draw(ax):
    """Draw to a bitmap and to paths; warnings are errors."""
    ax.figure.savefig(io.BytesIO(), format="png")
    svg = io.BytesIO()
    ax.figure.savefig(svg, format="svg")
    ElementTree.fromstring(svg.getvalue())
    return ax


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_a_row_is_drawn_as_it_is(name):
    shown = name if NAMES[name] is None else NAMES[name]
    alone = [{f"m.{name}": 0.5}] if name in ("a$_b^$", "\x00") else []
    for source in ({f"m.{name}": 0.5, "n.other": 0.25}, *alone):
        ax = draw(plots.leverage(source))
        assert ax.get_yticklabels()[0].get_text().endswith(shown)
        assert not ax.get_yticklabels()[0].get_parse_math()


def test_all_names_at_once_in_a_heat_map():
    values = dict.fromkeys(NAMES, 0.5)
    records = [{"step": step, "sparsity_by_parameter": values} for step in (0, 1)]
    ax = draw(plots.sparsity(records))
    shown = [name if text is None else text for name, text in NAMES.items()]
    assert [label.get_text() for label in ax.get_yticklabels()] == shown


@pytest.mark.parametrize("name", NAMES)
def test_an_event_is_in_the_legend_under_any_name(name):
    records = [{"step": 0, "loss": 1.0, "event": name}, {"step": 1, "loss": 0.5}]
    (text,) = legend_of(draw(plots.by_step(records, "loss")))
    shown = name if NAMES[name] is None else NAMES[name]
    assert text.replace("\\$", "$").removeprefix(" ") in (shown, shown.removeprefix(" "))
    assert not text.startswith("_")


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("run 1", "run 1"),
        ("$\\lambda_1$", "$\\lambda_1$"),  # a formula stays one
        ("$\\frac$ a_b^", "\\$\\frac\\$ a_b^"),
        ("cost $", "cost \\$"),  # drawn without the backslash
        ("_net", " _net"),
        ("中", "\\u4e2d"),
    ],
)
def test_a_label_may_be_a_formula_or_a_name(label, shown):
    records = [{"step": 0, "loss": 1.0, "overlap": 0.5}, {"step": 1, "loss": 0.5, "overlap": 0.5}]
    assert legend_of(draw(plots.by_step(records, "loss", label=label))) == [shown]
    assert shown in legend_of(draw(plots.overlap_by_step(records, label=label)))


@pytest.mark.parametrize("quantity", ["loss$_a^$", "_x", "中", "a_b"])
def test_a_quantity_may_have_any_name(quantity):
    records = [{"step": 0, quantity: 1.0}, {"step": 1, quantity: 0.5}]
    draw(plots.by_step(records, quantity))
    by_name = [{"step": step, quantity: {"w": 0.5, "b": 0.25}} for step in (0, 1)]
    draw(plots.by_parameter(by_name, quantity))
    draw(plots.by_parameter(by_name[:1], quantity))
    draw(plots.by_parameter(by_name, quantity, label="$a_^$"))


def test_a_curve_that_is_called_chance_does_not_hide_the_level_of_chance():
    import torch

    scores, basis = torch.arange(9.0), torch.eye(9)[:, :3]
    ax = plots.overlap_by_k(scores, basis, label="chance")
    assert "chance ± 3 std, k / D" in legend_of(ax)
    plots.overlap_by_k(scores, basis, ax, label="again")
    assert legend_of(ax).count("chance ± 3 std, k / D") == 1


def test_very_long_names_that_look_alike_are_numbered():
    names = [f"{'x' * 200}{i}{'y' * 200}" for i in range(3)]
    cut = shorten(names, 20)
    assert len(set(cut)) == 3
    assert max(map(len, cut)) < 30
    draw(plots.leverage(dict.fromkeys(names, 0.3)))


def test_characters_that_a_font_has_stay():
    assert canvas.name("äöß → ≥ λ") == "äöß → ≥ λ"
