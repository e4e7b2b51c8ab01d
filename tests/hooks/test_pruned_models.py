"""Watching goes on when weights are pruned, renamed, replaced or frozen during training."""

import pytest
import torch
from hooks.watched import TASK, data, dense_hessian, net, train
from torch.nn.utils import prune

from hesscurv.hooks import CurvatureMonitor, MonitorOptions
from hesscurv.hooks.monitoring.layouts import carry_over, dense_layout
from hesscurv.objective.parameters import ParameterLayout


def pruned(model, amount=0.4):
    for module in (model[0], model[2]):
        prune.l1_unstructured(module, "weight", amount=amount)
    return model


def test_pruning_is_seen_and_the_names_stay():
    model = net()
    monitor = CurvatureMonitor(
        model, TASK, data(2), 4, quantities="full", tol=1e-8, options=MonitorOptions(max_matvecs=80)
    )
    before = monitor.measure(0)
    pruned(model)
    after = monitor.measure(1)
    assert (before["status"], after["status"]) == ("ok", "ok")
    names = ("overlap_by_parameter", "leverage_by_parameter", "sparsity_by_parameter")
    for name in names:
        assert set(after[name]) == set(before[name])
    assert set(after["sparsity_by_parameter"]) == set(dict(net().named_parameters()))
    assert before["sparsity"] == 0
    assert after["sparsity_by_parameter"]["0.weight"] == 8 / 20
    assert after["sparsity"] == (8 + 6) / 59
    # In the stored weights, those that are masked have no curvature.
    hessian, _ = dense_hessian(model, data(2))
    values = torch.linalg.eigvalsh(hessian)
    top = values[values.abs().argsort(descending=True)][:4]
    assert after["eigenvalues"] == pytest.approx(top.tolist(), rel=1e-9)


def test_spaces_and_masks_are_compared_across_pruning_in_one_order():
    model = net()
    monitor = CurvatureMonitor(model, TASK, data(2), 4, quantities="full")
    monitor.measure(0)
    space, mask = monitor.pairs.eigenvectors, monitor.mask
    prune.identity(model[0], "weight")  # renames and moves the weight, and changes nothing else
    record = monitor.measure(1)
    assert monitor.pairs.layout.names[:2] == ("0.bias", "0.weight")
    assert record["space_overlap"] == pytest.approx(1, abs=1e-4)
    assert record["mask_iou"] == 1.0
    weight, bias = slice(0, 20), slice(20, 24)
    assert torch.equal(monitor.mask[4:24], mask[weight])
    assert torch.equal(monitor.mask[:4], mask[bias])
    assert not torch.equal(monitor.pairs.eigenvectors[:24], space[:24])


def test_the_eigenspace_is_started_from_across_pruning():
    model = net()
    monitor = CurvatureMonitor(model, TASK, data(2), 4)
    cold = monitor.measure(0)["num_matvecs"]
    prune.identity(model[0], "weight")
    assert monitor.measure(1)["num_matvecs"] <= 3 * 4 < cold


def test_masked_weights_do_not_count_as_large():
    model = net()
    monitor = CurvatureMonitor(
        model, TASK, data(2), 4, quantities="overlap", options=MonitorOptions(mask_size=30)
    )
    pruned(model, 0.5)
    with torch.no_grad():
        model[0].weight_orig[model[0].weight_mask == 0] = 100.0
    monitor.measure(0)
    masks = monitor.pairs.layout.split(monitor.mask)
    assert not masks["0.weight"][model[0].weight_mask == 0].any()


def test_masks_made_permanent_are_seen_too():
    model = net()
    monitor = CurvatureMonitor(model, TASK, data(2), 4, quantities="full")
    pruned(model)
    first = monitor.measure(0)
    for module in (model[0], model[2]):
        prune.remove(module, "weight")
    second = monitor.measure(1)
    assert second["sparsity_by_parameter"] == first["sparsity_by_parameter"]
    assert second["mask_iou"] == 1.0


def test_a_selection_by_name_keeps_what_is_pruned():
    model = net()
    monitor = CurvatureMonitor(model, TASK, data(2), 3, params=["0.weight", "4"], quantities="full")
    monitor.measure(0)
    pruned(model)
    record = monitor.measure(1)
    assert set(record["leverage_by_parameter"]) == {"0.weight", "4.weight", "4.bias"}
    assert "space_overlap" in record


def test_a_layer_of_another_width_keeps_what_fits():
    model = net()
    monitor = CurvatureMonitor(model, TASK, data(2), 3, quantities="full")
    monitor.measure(0)
    model[2], model[4] = torch.nn.Linear(4, 3).double(), torch.nn.Linear(3, 3).double()
    record = monitor.measure(1)
    assert record["status"] == "ok"
    assert "space_overlap" not in record  # no space of these parameters
    assert monitor.pairs.eigenvectors.shape == (24 + 15 + 12, 3)
    assert "space_overlap" in monitor.measure(2)


def test_a_frozen_layer_leaves_and_comes_back():
    model = net()
    monitor = CurvatureMonitor(model, TASK, data(2), 3, quantities="full")
    sizes = []
    for step, frozen in enumerate([False, True, False]):
        model[0].requires_grad_(not frozen)
        assert monitor.measure(step)["status"] == "ok"
        sizes.append(len(monitor.pairs.eigenvectors))
    assert sizes == [59, 35, 59]


def test_a_notice_is_in_the_next_record_alone():
    model = net()
    monitor = CurvatureMonitor(model, TASK, data(1), 2)
    monitor.measure(0)
    pruned(model)
    monitor.notify_pruned()
    train(model, 1)
    monitor.measure(1)
    monitor.notify("rate lowered")
    monitor.measure(2)
    monitor.measure(3)
    events = [record.get("event") for record in monitor.records]
    assert events == [None, "pruned", "rate lowered", None]


def test_rows_are_carried_by_name():
    source = ParameterLayout(("a.weight", "a.bias", "b"), ((2,), (1,), (2,)))
    stored = ParameterLayout(("a.bias", "a.weight_orig", "b"), ((1,), (2,), (2,)))
    target = dense_layout(stored)
    rows = torch.arange(5.0)
    assert carry_over(rows, source, target).tolist() == [2, 0, 1, 3, 4]
    back = carry_over(carry_over(rows, source, target), target, source)
    assert torch.equal(back, rows)
    wider = ParameterLayout(("a.bias", "a.weight", "b"), ((1,), (2,), (3,)))
    assert carry_over(rows, source, wider) is None
    assert carry_over(rows, source, wider, partly=True).tolist() == [2, 0, 1, 0, 0, 0]
    other = ParameterLayout(("c",), ((5,),))
    assert carry_over(rows, source, other, partly=True) is None


def test_names_that_would_be_two_stay_as_they_are():
    layout = ParameterLayout(("a", "a_orig"), ((1,), (1,)))
    assert dense_layout(layout) == layout
