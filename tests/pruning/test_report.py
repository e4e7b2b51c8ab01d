"""What a pruning prints, and modules of any name in reports, scores and files."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from prunable import TASK
from torch import nn

import hesscurv
from hesscurv.pruning import (
    compensate_,
    dense_state_dict,
    load_pruned_,
    load_sparse,
    masks_of,
    prune_model,
    saliency,
    save_sparse,
)
from hesscurv.pruning.run.pruning_report import LayerReport, PruningReport, StageReport

NAMES = [
    "a$_b^$",
    "größe τ",
    "two words",
    "weight",
    "x_orig",
    "x_mask",
    "line\nbreak",
    "0",
    "%d{}\\",
]


def named():
    """Layers whose names torch allows: all that is not empty and has no dot."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for name in NAMES:
        net.add_module(name, nn.Linear(4, 4))
        net.add_module(f"{name} act", nn.Tanh())
    return net.double(), [(torch.randn(12, 4).double(), torch.randint(4, (12,)))]


def report_of(layers):
    layer = LayerReport("name", 10, 5, 0.5, 0.1, 0.2)
    step = StageReport(0.5, 1.0, 0.1, 0.1, 1.0, 10, 1.0)
    many = [replace(layer, name=f"layer{i}.weight", numel=10 + i) for i in range(layers)]
    return PruningReport("obs", 0.5, 5, 10, 1.0, 1.1, 1.2, None, 10, 100, 1.0, 30 * [step], many)


@pytest.mark.parametrize("layers", [1, 6, 7, 8, 200])
def test_a_report_is_printed_in_at_most_ten_lines(layers):
    report = report_of(layers)
    lines = str(report).splitlines()
    assert len(lines) == 3 + min(layers, 7)
    # The largest weights, in the model's order.
    first = max(0, layers - 6) if layers > 7 else 0
    shown = [f"layer{i}.weight" for i in range(first, layers)]
    assert [line.split()[0] for line in lines[3 : 3 + len(shown)]] == shown
    assert ("smaller ones" in lines[-1]) == (layers > 7)
    if layers > 7:
        assert f"and {layers - 6} smaller ones" in lines[-1]
    assert len(repr(report)) < 200
    assert repr(report).splitlines() == [repr(report)]
    assert len(json.loads(json.dumps(report.to_dict()))["layers"]) == layers


def test_columns_stay_in_line_for_long_names():
    report = report_of(2)
    report.layers[0] = replace(report.layers[0], name="a" * 60)
    lines = str(report).splitlines()[2:]
    assert len({len(line) for line in lines}) == 1


def test_a_quadratic_model_says_what_it_is():
    net, batches = named()
    pairs = hesscurv.eigsh(hesscurv.HessianOperator(net, TASK, batches), k=3)
    text = repr(hesscurv.pruning.quadratic_model_of(net, pairs))
    assert "3 rows" in text
    assert "144 entries of 9 weights" in text
    assert "without a first-order term" in text


def test_modules_of_any_name_are_pruned_printed_drawn_and_stored(tmp_path):
    net, batches = named()
    dense = copy.deepcopy(net)
    report = prune_model(net, TASK, batches, 0.5, stages=1, gradients_per_stage=8)
    masks = masks_of(net)
    assert list(masks) == [f"{name}.weight" for name in NAMES]
    assert [layer.name for layer in report.layers] == list(masks)
    assert len(str(report).splitlines()) == 10
    assert json.loads(json.dumps(report.to_dict()))["layers"][6]["name"] == "line\nbreak.weight"
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = report.plot()
    figure.canvas.draw()
    plt.close(figure)
    save_sparse(net, tmp_path / "sparse.pt")
    for keep in (False, True):
        state = load_sparse(tmp_path / "sparse.pt", masks=keep)
        again = copy.deepcopy(dense)
        load_pruned_(again, state)
        assert (list(masks_of(again)) == list(masks)) == keep
        for name, value in dense_state_dict(net).items():
            assert torch.equal(dense_state_dict(again)[name], value)


def test_modules_of_any_name_are_scored_and_compensated():
    net, batches = named()
    pairs = hesscurv.eigsh(hesscurv.HessianOperator(net, TASK, batches), k=3)
    scores = saliency(net, pairs)
    assert [w.module for w in scores] == [m for m in net if isinstance(m, nn.Linear)]
    before = dense_state_dict(net)
    masks = {f"{n}.weight": s > s.median() for n, s in zip(NAMES, scores.values(), strict=True)}
    compensate_(net, masks, pairs)
    assert all(torch.equal(m, masks[n]) for n, m in masks_of(net).items())
    assert set(dense_state_dict(net)) == set(before)


def test_a_line_break_in_a_name_breaks_no_line():
    text = str(run_with_break())
    assert "line\\nbreak.weight" in text
    assert len(text.splitlines()) == 4


def run_with_break():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("line\nbreak", nn.Linear(4, 4))
    batches = [(torch.randn(12, 4), torch.randint(4, (12,)))]
    return prune_model(net, TASK, batches, 0.5, method="magnitude")
