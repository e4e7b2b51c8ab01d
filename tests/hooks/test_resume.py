"""A monitor that is resumed goes on as one that was never interrupted."""

import io

import pytest
import torch
from hooks.watched import TASK, Clock, data, equal, net, train
from support.bundles import bundled

from hesscurv.hooks import CurvatureMonitor, MonitorOptions, every


def monitor_of(model, clock=None, **options):
    options = {"quantities": "full", "schedule": every(2)} | options
    options |= {"clock": clock or Clock(0.25), "operator_options": {"way": "retained"}}
    return CurvatureMonitor(model, TASK, data(2), 3, **bundled(MonitorOptions, options))


def saved(state):
    """What torch.load(weights_only=True) makes of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_time(records):
    return [{k: v for k, v in r.items() if k not in ("seconds", "fraction")} for r in records]


@pytest.mark.parametrize("quantities", ["full", "cheap", ("mask_iou",)])
def test_a_resumed_run_has_the_records_of_one_in_a_piece(quantities):
    whole = net()
    reference = monitor_of(whole, quantities=quantities)
    optimizer = torch.optim.SGD(whole.parameters(), 0.1, momentum=0.9)
    train(whole, 10, reference.step, optimizer=optimizer)

    model = net()
    first = monitor_of(model, quantities=quantities)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, 5, first.step, optimizer=optimizer)
    state = saved(
        {
            "monitor": first.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model": model.state_dict(),
        }
    )

    again = net(seed=7)
    again.load_state_dict(state["model"])
    optimizer = torch.optim.SGD(again.parameters(), 0.1, momentum=0.9)
    optimizer.load_state_dict(state["optimizer"])
    second = monitor_of(again, quantities=quantities)
    second.load_state_dict(state["monitor"])
    assert second.records == first.records
    train(again, 5, second.step, optimizer=optimizer, first=5)
    assert without_time(second.records) == without_time(reference.records)
    if reference.pairs is not None:
        assert torch.equal(second.pairs.eigenvectors, reference.pairs.eigenvectors)
    assert equal(second.mask, reference.mask)


def test_pairs_mask_and_what_was_measured_last_are_in_the_state():
    model = net()
    first = monitor_of(model)
    train(model, 5, first.step)
    second = monitor_of(model)
    second.load_state_dict(saved(first.state_dict()))
    for name in ("eigenvalues", "eigenvectors", "residuals", "converged"):
        assert torch.equal(getattr(second.pairs, name), getattr(first.pairs, name))
    assert second.pairs.layout == first.pairs.layout
    assert torch.equal(second.mask, first.mask)
    assert not second.due(4)  # measured already
    assert equal(second.state_dict(), first.state_dict())


def test_a_state_shares_nothing_with_the_monitor():
    model = net()
    monitor = monitor_of(model)
    monitor.step(0)
    state = monitor.state_dict()
    before = saved(state)
    train(model, 5, monitor.step)
    assert equal(saved(state), before)


def test_a_postponed_measurement_is_still_due_after_a_resumption():
    clock = Clock(1.0)
    first = monitor_of(net(), clock, quantities="sparsity", max_fraction=0.1)
    for step in range(3):
        clock.now += 1.0
        first.step(step)
    waiting = first.state_dict()["ask_again"]
    assert waiting is not None
    second = monitor_of(net(), clock, quantities="sparsity", max_fraction=0.1)
    second.load_state_dict(first.state_dict())
    assert not second.due(waiting - 1)
    second._budget.training = 1e9
    assert second.due(waiting)


def test_a_smaller_history_takes_the_latest():
    model = net()
    first = monitor_of(model, history=5)
    train(model, 9, first.step)
    second = monitor_of(model, history=2)
    second.load_state_dict(saved(first.state_dict()))
    record = second.measure(9)
    assert [step for step, _ in record["space_overlaps"]] == [6, 8]


@pytest.mark.parametrize("state", [{}, {"version": 99}, None, {"version": 1}])
def test_another_state_is_refused_and_nothing_changes(state):
    monitor = monitor_of(net())
    monitor.step(0)
    before = monitor.state_dict()
    with pytest.raises(ValueError, match="expected the state dict of a CurvatureMonitor"):
        monitor.load_state_dict(state)
    assert equal(monitor.state_dict(), before)


def without(state, *path):
    """A deep copy of a state that lacks one of its parts."""
    out = {k: v for k, v in state.items() if k != path[0] or len(path) > 1}
    if len(path) > 1:
        out[path[0]] = without(state[path[0]], *path[1:])
    return out


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: without(s, "last"),
        lambda s: without(s, "budget", "calls"),
        lambda s: without(s, "measurements", "masks"),
        lambda s: without(s, "measurements", "pairs", "converged"),
        lambda s: without(s, "measurements", "spaces", "last", "layout"),
        lambda s: {**s, "records": [{"status": "ok"}]},
        lambda s: {**s, "records": 3},
        lambda s: {**s, "records": [{"step": "two"}]},
        lambda s: {**s, "budget": {**s["budget"], "training": "long"}},
        lambda s: {**s, "measurements": {**s["measurements"], "count": None}},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    monitor = monitor_of(net())
    monitor.measure(0)
    monitor.measure(2)
    before = monitor.state_dict()
    other = monitor_of(net(seed=3))
    other.measure(5)
    with pytest.raises(ValueError, match="expected the state dict of a CurvatureMonitor"):
        monitor.load_state_dict(damage(other.state_dict()))
    assert equal(monitor.state_dict(), before)
    assert [r["step"] for r in monitor.records] == [0, 2]


def test_a_generator_decides_the_random_vectors_and_is_drawn_from_once():
    def watched(generator=None):
        found = CurvatureMonitor(
            net(), TASK, data(2), 3, quantities=("trace",), generator=generator
        )
        return found.measure(0)["trace"]

    one, same, other = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    assert watched() == watched()
    assert watched(one) == watched(same) != watched(other)
    assert len({watched(), watched(one), watched(other)}) == 3  # `one` has moved on
    before = one.get_state()
    for wrong in ({"batches": []}, {"k": 0}, {"params": ["nothing"]}):
        given = {"batches": data(1), "k": 3} | wrong
        with pytest.raises(ValueError, match=r"expected|no parameter"):
            CurvatureMonitor(net(), TASK, generator=one, **given)
        assert torch.equal(one.get_state(), before)
