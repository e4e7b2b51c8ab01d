"""What notebooks show: well-formed, self-contained HTML, in which every text is escaped."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from prunable import TASK, data, network, run
from torch import nn

import hesscurv
from hesscurv.hooks import CurvatureMonitor, JSONLinesWriter, read_records
from hesscurv.interface.notebook_html import Points, draw_points, notebook_html
from hesscurv.optim import PreconditionerReport

HOSTILE = "<script>alert('\"x&')</script>"
VOID = {"br", "circle", "polyline"}


class Page(HTMLParser):
    """The elements, attributes and text of a fragment; fails where it is not well formed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], "", {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= dict(attrs)
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def shown(thing):
    html = thing._repr_html_()
    assert "http" not in html
    assert len(html) < 60_000
    page = Page(html)
    assert not {"script", "style", "link", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name in page.attributes)
    return page


def pairs(k=30):
    values = torch.linspace(3, -2, 60, dtype=torch.float64)
    return hesscurv.eigsh(torch.diag(values), k)


def test_pairs_show_the_first_ten_and_the_rest_by_number():
    page = shown(pairs())
    assert page.tags.count("tr") == 11
    for part in ("30 eigenpairs", "and 20 more", "30 of 30", "positive", "negative", "3 "):
        assert part in page.text
    assert page.tags.count("circle") == 30


@pytest.mark.parametrize(
    "of",
    [
        lambda: pairs()[30:],
        lambda: pairs()[0],
        lambda: pairs().to("meta"),
        lambda: replace(pairs(3), eigenvalues=torch.tensor([float("nan"), 0.0, float("inf")])),
        lambda: replace(pairs(3), method=HOSTILE),
    ],
)
def test_unusual_pairs_are_shown(of):
    assert "eigenpairs" in shown(of()).text


def test_a_density_is_drawn():
    page = shown(hesscurv.spectral_density(torch.eye(20, dtype=torch.float64), 5, 2))
    assert "Spectral density" in page.text
    assert "polyline" in page.tags


def test_a_pruning_report_shows_loss_and_weights():
    report = run(network())
    page = shown(report)
    assert page.tags.count("tr") == 1 + len(report.layers)
    for part in (report.layers[0].name, "calibration loss", "Pruned by obs"):
        assert part in page.text


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module(HOSTILE.replace(".", ""), nn.Linear(4, 3).double())

    def forward(self, x):
        return next(iter(self.children()))(x)


def test_names_of_modules_are_escaped():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator).double()
    report = hesscurv.pruning.prune_model(
        *(Named(), TASK, [(x, torch.arange(12) % 3)], 0.5), stages=1, gradients_per_stage=4
    )
    page = shown(report)
    assert HOSTILE in page.text
    assert "script" not in page.tags


def test_a_monitor_and_its_records_show_the_newest_first(tmp_path):
    path = tmp_path / "curvature.jsonl"
    monitor = CurvatureMonitor(network(), TASK, data(), k=2, loggers=[JSONLinesWriter(path)])
    assert "measurements" in shown(monitor).text
    for step in range(12):
        monitor.measure(step)
    monitor.records.append({"step": 12, "status": "failed", "error": HOSTILE, "event": HOSTILE})
    page = shown(monitor)
    assert page.tags.count("tr") == 11
    assert "Curvature of Sequential" in page.text
    assert "polyline" in page.tags
    for part in ("sharpness", "failed", HOSTILE):
        assert part in shown(monitor.records).text
    again = read_records(path)
    assert isinstance(again, list)
    assert "and 2 more" in shown(again).text


def test_an_optimizers_report_is_shown():
    report = PreconditionerReport(
        *(10, 2, 0, 40, 1.0, 0.1, 0.1, [3.0, -2.0, 1.0], [0.5, 0.6], 1.0, 0.5, 1.0, 1.0),
        last_failure=HOSTILE,
    )
    assert HOSTILE in shown(report).text


def test_a_drawing_of_one_point_is_left_out():
    assert draw_points([Points("a", [1], [2])], x="x", y="y") == ""
    assert draw_points([Points("a", [1, 2], [-1, 0])], x="x", y="y", logarithmic=True) == ""
    assert "<svg" in draw_points([Points(HOSTILE, [1, 2], [3, 3])], x=HOSTILE, y=HOSTILE)


def test_values_are_formatted_for_reading():
    facts = {"a": 12345, "b": -1.23456e-7, "c": float("nan"), "d": True, HOSTILE: None}
    text = Page(notebook_html(HOSTILE, facts)).text.replace("\xa0", " ")
    assert text == f"{HOSTILE}a 12,345 · b −1.235e−07 · c – · d yes · {HOSTILE} –"
