"""The page of a pruning: what it says, shows and refuses."""

import math
from dataclasses import replace

import pytest
import torch
from prunable import TASK
from support.html_pages import read
from torch import nn

from hesscurv.plots.pruning_findings import pruning_findings
from hesscurv.plots.pruning_report import write_pruning_report
from hesscurv.pruning import LayerReport, PruningReport, StageReport, prune_model


def report_of(**changes):
    stages = [
        StageReport(0.4, 1.1, 0.05, 0.1, 1.0, 10, 1.0),
        StageReport(0.75, 1.5, 0.3, 0.4, None, 20, 2.0),
    ]
    layers = [
        LayerReport("<a>&.weight", 100, 20, 0.8, 0.2, 0.3),
        LayerReport("b.weight", 60, 20, 1 - 20 / 60, 0.1, 0.1),
    ]
    report = PruningReport("obs", 0.75, 40, 160, 1.0, 1.5, 2.0, None, 20, 100, 2.0, stages, layers)
    return replace(report, **changes)


def test_sentences_say_what_was_cut_and_what_it_cost():
    first, accuracy, magnitude, model = pruning_findings(report_of(), [0.9, 0.88, 0.8])
    assert first == "75 % of 160 weights are pruned; the calibration loss rises from 1 to 1.5."
    assert accuracy == "Accuracy goes from 90 % to 80 %."
    assert magnitude.endswith("ends at a loss of 2, 2 times the increase.")
    assert "predicted a change of the loss of +0.35 over all 2 stages; it was +0.5" in model
    assert "largest difference at stage 2" in model
    assert pruning_findings(report_of())[-1] == (
        "<a>&.weight is cut most, by 80 %, b.weight least, by 66.7 %."
    )


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"magnitude_loss": math.nan}, "Magnitude pruning"),
        ({"method": "magnitude"}, "Magnitude pruning"),
        ({"loss": math.inf}, "rises"),
        ({"dense_loss": math.nan}, "rises"),
        ({"stages": []}, "predicted"),
        ({"stages": [StageReport(0.75, 1.5, math.nan, 0.5, None, 0, 1.0)]}, "predicted"),
        ({"layers": []}, "cut most"),
        ({"layers": report_of().layers[:1]}, "cut most"),
        ({"loss": 0.5, "magnitude_loss": 0.8}, "times the increase"),  # of two decreases
    ],
)
def test_a_sentence_without_support_is_left_out(changes, absent):
    assert absent in " ".join(pruning_findings(report_of()))
    assert absent not in " ".join(pruning_findings(report_of(**changes)))


def test_a_result_of_magnitude_that_was_taken_instead_is_not_that_of_the_stages(tmp_path):
    report = report_of(method="magnitude", loss=1.2, magnitude_loss=1.2)
    path = write_pruning_report(report, tmp_path / "pruning.html", accuracy=[0.9, 0.8, 0.7])
    page, _ = read(path)
    said = " ".join(page.findings)
    assert "rises from 1 to 1.2" in said
    assert "The stages ended at a loss of 1.5: plain magnitude pruning" in said
    assert "Accuracy" not in said
    assert "accuracy" not in page.cards
    assert report_of().html(path, accuracy=[0.9, 0.8, 0.7]) == path
    assert read(path)[0].cards["accuracy"] == ["70 %", "dense 90 %"]


def test_a_page_of_a_real_pruning_is_whole(tmp_path):
    pytest.importorskip("matplotlib")
    model = nn.Sequential()
    for name in ("<b>&", "a$_b^$", "line\nbreak"):
        model.add_module(name, nn.Linear(4, 4))
    batches = [(torch.randn(12, 4), torch.randint(4, (12,)))]
    report = prune_model(model, TASK, batches, 0.5, stages=2, gradients_per_stage=8)
    path = report.html(tmp_path / "pruning.html", title="<i>", accuracy=[1.0, 0.75, 0.5])
    assert path == tmp_path / "pruning.html"
    page, text = read(path)
    assert "<script" not in text
    assert "<b>" not in text
    assert all(link.startswith("data:") for link in page.links)
    assert page.titles == [
        "Kept and cut by weight",
        "Loss by sparsity",
        "Accuracy by sparsity",
        "Predicted and true change by stage",
        "Predicted and true change by weight",
    ]
    assert page.findings == pruning_findings(report, [1.0, 0.75, 0.5])
    assert page.cards["accuracy"] == ["50 %", "dense 100 %"]
    first = report.layers[0]
    shown = f"<b>&.weight: {first.kept} of 16 kept, {100 * first.sparsity:.3g} % cut"
    assert shown in page.values
    lines = page.downloads["stages.csv"].splitlines()
    assert len(lines) == 3
    assert float(lines[2].split(",")[2]) == report.stages[1].loss


@pytest.mark.parametrize(
    "report",
    [
        report_of(stages=[], layers=[]),
        report_of(dense_loss=math.nan, loss=math.nan, magnitude_loss=math.inf),
        report_of(stages=[StageReport(0.75, math.nan, math.nan, math.nan, None, 0, 1.0)]),
        report_of(layers=[LayerReport("a", 0, 0, math.nan, math.nan, math.nan)]),
        report_of(layers=[LayerReport("n" * 200, 10, 5, 0.5, math.inf, 0.1)]),
    ],
    ids=["empty", "not finite", "no stage finite", "an empty weight", "a long name"],
)
def test_a_page_is_written_of_any_report(tmp_path, report):
    pytest.importorskip("matplotlib")
    read(write_pruning_report(report, tmp_path / "pruning.html"))


@pytest.mark.parametrize(
    ("report", "accuracy", "error", "message"),
    [
        ("report", None, TypeError, "report of hesscurv.pruning.prune_model, got str"),
        (report_of(), [0.9, 0.8], ValueError, "expected 3 numbers of accuracy"),
        (report_of(), [0.9, 0.8, 70], ValueError, "divide percents by 100"),
        (report_of(), [0.9, "x", 0.7], TypeError, "expected accuracy to be numbers"),
    ],
)
def test_bad_arguments_are_refused_and_an_old_page_stays(
    tmp_path, report, accuracy, error, message
):
    path = tmp_path / "pruning.html"
    path.write_text("old")
    with pytest.raises(error, match=message):
        write_pruning_report(report, path, accuracy=accuracy)
    assert path.read_text() == "old"
