"""What hidden blocks of the documentation's pages print: pictures, tables, error texts, cards."""

import json

import benchmark_tables
import error_texts
import guide_support
import pytest
import section_cards


@pytest.fixture
def figure():
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    fig = matplotlib_figure.Figure()
    fig.subplots().plot([1, 2], color="black")
    return fig


def test_a_picture_takes_the_colours_of_the_page(figure, capsys):
    guide_support.show(figure, alt="A <line>", caption="Steps & loss")
    out = capsys.readouterr().out
    assert 'aria-label="A &lt;line&gt;"' in out
    assert "<figcaption>Steps &amp; loss</figcaption>" in out
    assert "currentColor" in out
    assert "#000000" not in out
    assert "<style" not in out  # it would hold for the whole page


def test_a_picture_is_the_same_in_every_build(figure, capsys):
    guide_support.show(figure, alt="x")
    first = capsys.readouterr().out
    guide_support.show(figure.axes[0], alt="x")
    assert capsys.readouterr().out == first


def run(date, **rows):
    environment = {"date": date, "processor": "P", "instructions": "I", "threads": 1}
    environment |= {"torch": "2", "commit": date}
    settings = {"data": True, "parts": ["a b"], "rate_steps": 3, "quick": False, "device": None}
    values = [{"name": name, "seconds": value} for name, value in rows.items()]
    line = {"benchmark": "timing", "environment": environment, "settings": settings, "rows": values}
    return json.dumps(line)


def test_a_cell_is_of_the_latest_run_that_measured_it(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join([run("2026-01-01", a=1.0, b=2.0), run("2026-01-02", b=3.0)]))
    cells = benchmark_tables.latest("timing", lambda row: row["name"], path=path)
    assert {name: cell.row["seconds"] for name, cell in cells.items()} == {"a": 1.0, "b": 3.0}
    assert [cell.run.environment["commit"] for cell in cells.values()] == [
        "2026-01-01",
        "2026-01-02",
    ]


def test_a_table_names_its_runs_and_how_to_repeat_them(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text(run("2026-01-01", a=1.0))
    cells = benchmark_tables.latest("timing", lambda row: row["name"], path=path)
    benchmark_tables.show_table(["name", "s"], [["a", "1.0"]], cells.values())
    out = capsys.readouterr().out
    assert "| --- | ---: |" in out
    assert "2026-01-01, P with I, 1 thread, torch 2, commit 2026-01-01" in out
    assert "python examples/benchmarks/timing.py --data DATA --parts 'a b' --rate-steps 3" in out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(7030, "7,030"), (0.446, "0.446"), (4.0, "4.00"), (12.72, "12.7"), (1234.5, "1,234")],
        *[(1e-5, "1.0e-05"), (None, ""), (0.0, "0.00")],
    ],
)
def test_numbers_have_the_digits_that_were_measured(value, text):
    assert benchmark_tables.number(value) == text


SOURCE = '''
"""Sizes of things.

More.
"""
_REMEDY = "take another"

def check(size):
    if size < 0:
        raise ValueError(f"expected size >= 0, got {size}; {_REMEDY}")
    warnings.warn("size is large " + "indeed", UserWarning, stacklevel=2)
    raise make_known(TypeError(f"expected an int, got {size!r:.80}"))
    raise made_elsewhere(size)
'''


def test_error_texts_are_those_of_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(error_texts, "REPOSITORY", tmp_path)
    (tmp_path / "sizes.py").write_text(SOURCE)
    found = [(text.kind, text.text) for text in error_texts.find(".")]
    assert found == [
        ("ValueError", "expected size >= 0, got …; take another"),
        ("UserWarning", "size is large indeed"),
        ("TypeError", "expected an int, got …"),
    ]
    assert error_texts.find(".")[0].subject == "Sizes of things"


def test_every_folder_of_the_library_is_in_troubleshooting():
    pages = (error_texts.REPOSITORY / "examples/guide/pages/troubleshooting").glob("*.md")
    shown = "".join(page.read_text() for page in pages)
    folders = {
        path.parent.relative_to(error_texts.REPOSITORY).as_posix()
        for root in ("hesscurv", "integrations")
        for path in (error_texts.REPOSITORY / root).rglob("*.py")
    }
    assert [f for f in sorted(folders) if error_texts.find(f) and f'"{f}"' not in shown] == []


def test_cards_lead_to_the_pages_that_there_are(tmp_path, capsys):
    (tmp_path / "guides").mkdir()
    (tmp_path / "guides" / "b.md").write_text("# Second\n")
    (tmp_path / "guides" / "index.md").write_text("# All\n")
    sections = {"guides": ("Guides", "How to."), "missing": ("Missing", "Not there.")}
    section_cards.show_cards(sections, tmp_path)
    out = capsys.readouterr().out
    assert "**[Guides](guides/index.html)**" in out
    assert "[Second](guides/b.html)" in out
    assert "Missing" not in out
