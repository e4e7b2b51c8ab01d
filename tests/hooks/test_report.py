import re
import sys

import pytest
import torch
from hooks import watched
from plots import recorded
from support.html_pages import read
from torch import nn

import hesscurv
from hesscurv.plots import monitor_figures as report_figures
from hesscurv.plots.monitor_report import write_report


def record(step, **values):
    return {"step": step, "status": "ok", "seconds": 0.25, "num_matvecs": 7, **values}


RECORDS = [
    record(0, loss=2.5, sharpness=3.0, learning_rate=0.1),
    {
        "step": 10,
        "status": "failed",
        "error": "ValueError: <b>batch & co</b>",
        "seconds": 0.5,
        "num_matvecs": 2,
    },
    record(20, loss=1.25, sharpness=4.0, learning_rate=0.1, event="<pruned>"),
]


def test_a_page_stands_alone_and_has_no_script(tmp_path):
    pytest.importorskip("matplotlib")
    path = write_report(RECORDS, tmp_path / "run.html")
    assert path == tmp_path / "run.html"
    page, text = read(path)
    assert all(link.startswith("data:") for link in page.links)
    assert "<script" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "width=device-width" in text
    assert len(page.figures) == 2  # loss and sharpness
    for caption, svg in page.figures:
        assert len(caption) > 10
        assert svg.startswith("<svg")
        assert svg.rstrip().endswith("</svg>")
        assert "prefers-color-scheme:dark" in svg
        assert "var(--ink)" in svg
        assert not re.search(r'(href|src)="(?!#)', svg)


@pytest.fixture
def without_figures(monkeypatch):
    """Leave the figures out, which take most of the time."""
    monkeypatch.setattr("hesscurv.plots.monitor_report.draw_all", lambda *_: [])


def test_the_table_has_what_was_measured_and_the_head_what_it_cost(tmp_path, without_figures):
    page, _ = read(write_report(RECORDS, tmp_path / "run.html", title="Digits"))
    for words in ("2.5", "1.25", "sharpness", "learning rate", "Digits", "0.25"):
        assert words in page.words
    assert "16" in page.words  # products, those of the failed one too
    assert page.words[page.words.index("16") - 1] == "products with the curvature"
    assert page.words[page.words.index("seconds of measuring") + 1] == "1"
    assert page.words[page.words.index("failed") + 1] == "1"


def test_failures_are_listed_with_their_errors_and_all_text_is_escaped(tmp_path, without_figures):
    page, text = read(write_report(RECORDS, tmp_path / "run.html", title="A <i>title</i> & more"))
    assert "A <i>title</i> & more" in page.words
    assert ": ValueError: <b>batch & co</b>" in page.words
    assert "<pruned>" in page.words
    assert "<b>" not in text
    assert "<i>" not in text
    assert "10 ✕" in page.words


def test_a_page_of_failures_alone_is_written(tmp_path):
    page, _ = read(write_report([RECORDS[1]], tmp_path / "run.html"))
    assert page.figures == []
    assert "Failed measurements" in page.words


def test_without_matplotlib_the_page_has_its_table_and_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page, _ = read(write_report(RECORDS, tmp_path / "run.html"))
    assert page.figures == []
    assert "pip install 'hesscurv[plots]'" in page.text
    assert "1.25" in page.words


@pytest.mark.parametrize(
    ("records", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one record"),
        ("run.json", {}, TypeError, "records of a CurvatureMonitor"),
        (RECORDS, {"pairs": 3}, TypeError, "expected pairs to be Eigenpairs"),
    ],
)
def test_bad_arguments_are_refused_and_an_old_page_stays(
    tmp_path, records, options, error, message
):
    path = tmp_path / "run.html"
    path.write_text("old")
    with pytest.raises(error, match=message):
        write_report(records, path, **options)
    assert path.read_text() == "old"


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    def draw(*_):
        raise AssertionError("drawn")

    monkeypatch.setattr("hesscurv.plots.monitor_report.draw_all", draw)
    with pytest.raises(FileNotFoundError, match="existing folder"):
        write_report(RECORDS, tmp_path / "missing" / "run.html")
    with pytest.raises(IsADirectoryError, match="got the folder"):
        write_report(RECORDS, tmp_path)


def test_a_page_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "run.html"
    path.write_text("old")

    def draw(*_):
        raise RuntimeError("half way")

    monkeypatch.setattr("hesscurv.plots.monitor_report.draw_all", draw)
    with pytest.raises(RuntimeError, match="half way"):
        write_report(RECORDS, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["run.html"]


def test_there_is_a_figure_of_everything_that_records_hold(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report_figures, "encode_figure", lambda figure, caption: caption)
    drawn = list(report_figures.draw_all(recorded.run(), recorded.pairs(), recorded.D))
    captions = "\n".join(drawn)
    for words in (
        *("Loss", "largest eigenvalue, beside", "spectrum of step 40", "All measured eigenvalues"),
        *("gradient's squared norm", "Overlap of the mask", "by k", "eigenspace of each step"),
        *("mask of the largest weights of each step", "Which parameters", "contributes"),
        *("among the largest", "The trace, estimated", "trace over", "that is zero"),
    ):
        assert words in captions
    assert len(drawn) == len(set(drawn)) == 15


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("since", [0, 40])
def test_the_page_of_a_run_that_diverged_is_written(tmp_path, value, since):
    """Nothing can be drawn of what has no finite value, all else is."""
    pytest.importorskip("matplotlib")
    lost = ("loss", "sharpness", "eigenvalues", "space_overlaps", "leverage_by_parameter")
    records = [
        {k: v for k, v in r.items() if k in (*lost, "step", "trace")} for r in recorded.run()
    ]
    for r in records:
        for key in lost if r["step"] >= since and r["step"] != recorded.FAILED else ():
            old = r.get(key)
            if isinstance(old, dict):
                r[key] = dict.fromkeys(old, value)
            elif isinstance(old, list):
                r[key] = [[x[0], value] if isinstance(x, list) else value for x in old]
            else:
                r[key] = value
    page, _ = read(write_report(records, tmp_path / "run.html"))
    assert len(page.figures) == (1 if since == 0 else 7)
    assert page.findings[0].startswith("The loss on the probe set is not finite")


def test_a_monitor_reports_what_it_measured_and_changes_no_setting(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    model = watched.net()
    monitor = hesscurv.hooks.CurvatureMonitor(
        model, watched.TASK, watched.data(), k=3, schedule=hesscurv.hooks.every(2)
    )
    watched.train(model, 5, monitor.step)
    settings = dict(matplotlib.rcParams)
    before = [dict(record) for record in monitor.records]
    monitor.report(tmp_path / "run.html", title="Watched")
    page, _ = read(tmp_path / "run.html")
    assert len(before) == 3
    assert len(page.figures) == 5
    assert "Watched" in page.words
    assert dict(matplotlib.rcParams) == settings
    assert monitor.records == before


def test_a_report_shows_modules_of_any_name(tmp_path):
    pytest.importorskip("matplotlib")
    model = nn.Sequential()
    names = ["a$_b^$", "<b>&", "_x", "层", "new\nline", "\ud800", "y" * 300]
    for name in names:
        model.add_module(name, nn.Linear(3, 3))
    batches = [(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)]
    monitor = hesscurv.hooks.CurvatureMonitor(model, watched.TASK, batches, 2, quantities="full")
    monitor.notify("_pruned <$a_^$>")
    monitor.measure(0)
    monitor.measure(1)
    assert [r["status"] for r in monitor.records] == ["ok", "ok"]
    page, _ = read(monitor.report(tmp_path / "run.html", title="_a$ <i> \ud800"))
    assert "_a$ <i> &#55296;" in "".join(page.words).replace("\ufffd", "&#55296;")
    assert "_pruned <$a_^$>" in page.words
    assert len(page.figures) > 8


def test_a_report_goes_through_a_link_and_keeps_the_mode(tmp_path, without_figures):
    target, link = tmp_path / "run.html", tmp_path / "latest.html"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("run.html")
    write_report(RECORDS, link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    read(target)
