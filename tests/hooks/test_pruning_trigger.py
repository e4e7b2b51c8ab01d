"""When a model in training is pruned, how far, and who is told."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import hesscurv
from hesscurv.hooks import CurvatureMonitor, PruneWhenStable, Stability, every
from hesscurv.optim import PreconditionedOptimizer
from hesscurv.pruning import find_weights, masks_of

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
FEW = {"stages": 1, "gradients_per_stage": 16}


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def data(seed=0, count=4):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        x = torch.randn(16, 6, generator=g).double()
        out.append((x, x[:, :3].argmax(1)))
    return out


def monitor_of(model, **options):
    options = {"quantities": "overlap", "k": 4, "schedule": every(1)} | options
    return CurvatureMonitor(model, TASK, data(1, 1), **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train_step(model, optimizer, step):
    optimizer.zero_grad()
    TASK(model, data()[step % 4]).backward()
    optimizer.step()


def settle(monitor, trigger, steps, first=0):
    """Measure weights that stay; return the steps at which the trigger pruned."""
    pruned = []
    for step in range(first, first + steps):
        monitor.step(step)
        if trigger.step(step) is not None:
            pruned.append(step)
    return pruned


def sparsity_of(model):
    weights = find_weights(model)
    masks = masks_of(model)
    numel = sum(getattr(*w).numel() for w in weights.values())
    return sum(int((~m).sum()) for m in masks.values()) / numel


def test_prunes_after_as_many_settled_measurements_in_a_row_as_asked_for():
    model = net()
    monitor = monitor_of(model)
    trigger = PruneWhenStable(monitor, data(), 0.5, stability=Stability(patience=3), **FEW)
    # The first has no earlier self; the three after it are settled.
    assert settle(monitor, trigger, 3) == []
    assert not trigger.done
    assert settle(monitor, trigger, 5, first=3) == [3]
    assert trigger.done
    assert trigger.pruned == [(3, 0.5)]
    assert sparsity_of(model) == pytest.approx(0.5, abs=1e-12)
    assert [s["in_a_row"] for s in trigger.signals] == [0, 1, 2, 3]
    assert [s["mask_iou"] for s in trigger.signals] == [None, 1.0, 1.0, 1.0]
    # Weights that stay have the same mask, eigenspace and share, up to the solver's tolerance.
    assert all(s["space_overlap"] > 0.99 for s in trigger.signals[1:])
    assert all(s["overlap_change"] < 0.02 for s in trigger.signals[1:])


def test_the_share_is_that_of_the_space_in_the_weights_that_would_be_kept():
    model = net()
    monitor = monitor_of(model)
    trigger = PruneWhenStable(monitor, data(), 0.5, **FEW)
    settle(monitor, trigger, 1)
    flat = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()
    kept = flat.abs() >= flat.abs().sort().values[54]  # 54 of 108
    dense = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    dense["0.weight"], dense["2.weight"] = kept[:72].double(), kept[72:].double()
    mask = torch.cat([part.flatten() for part in dense.values()]).bool()
    # The overlap of a mask that is larger than the space is at most sqrt(4 / 54), not 1.
    expected = hesscurv.metrics.overlap(mask, monitor.pairs) * (54 / 4) ** 0.5
    assert trigger.signals[0]["share"] == pytest.approx(expected, rel=1e-10)
    assert 0.05 < expected < 0.95


def test_values_under_the_mask_do_not_count_in_the_magnitude_mask():
    model = net()
    kept = torch.rand(12, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    prune.custom_from_mask(model[0], "weight", kept)
    monitor = monitor_of(model)
    trigger = PruneWhenStable(monitor, data(), 0.5, stability=Stability(patience=5), **FEW)
    settle(monitor, trigger, 2)
    with torch.no_grad():  # the network stays the same one
        model[0].weight_orig[~kept] = 100.0
    settle(monitor, trigger, 1, first=2)
    assert [s["mask_iou"] for s in trigger.signals] == [None, 1.0, 1.0]
    shares = [s["share"] for s in trigger.signals]
    assert shares[2] == pytest.approx(shares[1], rel=1e-3)  # by the solver's tolerance


def test_after_a_pruning_there_is_no_earlier_mask_to_compare_with():
    model = net()
    monitor = monitor_of(model)
    trigger = PruneWhenStable(monitor, data(), [0.5, 0.7], stability=Stability(patience=1), **FEW)
    settle(monitor, trigger, 1)
    assert int(trigger.state_dict()["mask"].sum()) == 54  # of 108, at the first sparsity
    assert settle(monitor, trigger, 2, first=1) == [1]
    assert int(trigger.state_dict()["mask"].sum()) == 32  # at the second
    assert settle(monitor, trigger, 1, first=3) == [3]
    # The masks before are those of another sparsity, and of other weights.
    assert [s["mask_iou"] is None for s in trigger.signals] == [True, False, True, False]
    assert [s["overlap_change"] is None for s in trigger.signals] == [True, False, True, False]


def test_a_call_after_several_measurements_compares_with_the_last_one_looked_at():
    model = net()
    monitor = monitor_of(model)
    trigger = PruneWhenStable(monitor, data(), 0.5, stability=Stability(patience=2), **FEW)
    for step in range(4):
        monitor.step(step)
    assert trigger.step(3) is None
    assert [s["step"] for s in trigger.signals] == [3]


@pytest.mark.parametrize(
    ("unsettled", "more"), [("space", 6), ("share", 7), ("failure", 4), ("weights", 6)]
)
def test_what_moves_begins_the_count_anew_and_a_failure_does_not_count(
    unsettled, more, monkeypatch
):
    model = net()
    monitor = monitor_of(model)
    trigger = PruneWhenStable(monitor, data(), 0.5, stability=Stability(patience=3), **FEW)
    settle(monitor, trigger, 3)
    if unsettled == "weights":  # one layer's in another order, which takes no function of others
        with torch.no_grad():
            for p, axis in ((model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)):
                p.copy_(p.flip(axis))
    monitor.step(3)
    if unsettled == "space":
        monitor.records[-1]["space_overlap"] = 0.1
    elif unsettled == "failure":
        monitor.records[-1]["status"] = "failed"
    elif unsettled == "share":
        one = monitor.pairs
        biases = torch.zeros_like(one.eigenvectors)
        biases[one.layout.slices()["0.bias"]][: len(one)] = torch.eye(len(one)).to(biases)
        with monkeypatch.context() as patch:
            away = dataclasses.replace(one, eigenvectors=biases)
            patch.setattr(CurvatureMonitor, "pairs", property(lambda self: away))
            assert trigger.step(3) is None
    assert trigger.step(3) is None
    # After the failure one more is enough. After the others it takes three; a share that has
    # jumped jumps back at once, and counts from there.
    assert settle(monitor, trigger, 8, first=4) == [more]


def test_not_before_and_deadline_bound_the_step():
    model = net()
    monitor = monitor_of(model)
    trigger = PruneWhenStable(monitor, data(), 0.5, not_before=7, **FEW)
    assert settle(monitor, trigger, 10) == [7]
    model = net()
    monitor = monitor_of(model)
    trigger = PruneWhenStable(monitor, data(), 0.5, stability=None, deadline=2, **FEW)
    assert settle(monitor, trigger, 5) == [2]


def test_a_schedule_goes_on_by_steps_or_waits_for_stability_again():
    for between, steps in ((4, [3, 7, 11]), (None, [3, 7, 11])):
        model = net()
        monitor = monitor_of(model)
        trigger = PruneWhenStable(monitor, data(), [0.3, 0.5, 0.7], every=between, **FEW)
        # Without `every` each takes a first measurement of the new mask, and three settled ones.
        assert settle(monitor, trigger, 14) == steps
        assert [s for _, s in trigger.pruned] == [0.3, 0.5, 0.7]
        assert sparsity_of(model) == pytest.approx(0.7, abs=1 / 108)


@pytest.mark.parametrize("method", ["obs", "obd", "magnitude"])
def test_any_method_of_prune_model_gives_what_it_gives_alone(method):
    model = net()
    expected = copy.deepcopy(model)
    monitor = monitor_of(model)
    trigger = PruneWhenStable(monitor, data(), 0.6, method=method, **FEW)
    settle(monitor, trigger, 4)
    hesscurv.pruning.prune_model(expected, TASK, data(), 0.6, method=method, **FEW)
    for (name, ours), (other, theirs) in zip(
        model.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)


def test_a_function_of_ones_own_prunes_and_is_followed():
    model = net()
    monitor, seen = monitor_of(model), []

    def magnitude(pruned, sparsity):
        weights = list(find_weights(pruned).values())
        prune.global_unstructured(weights, prune.L1Unstructured, amount=sparsity)
        return "done"

    trigger = PruneWhenStable(
        monitor, sparsity=0.5, prune=magnitude, on_prune=lambda *told: seen.append(told)
    )
    settle(monitor, trigger, 4)
    assert seen == [(3, "done")]
    assert sparsity_of(model) == 0.5


@pytest.mark.filterwarnings("ignore:there is little to gain")
def test_optimizer_and_monitor_go_on_with_the_pruned_model():
    model = net()
    optimizer = PreconditionedOptimizer(sgd(model), model, TASK, data(2), 2, refresh_every=50)
    monitor = monitor_of(model, optimizer=optimizer)
    stable = Stability(mask_iou=0.3, space_overlap=None, overlap_change=None, patience=1)
    trigger = PruneWhenStable(
        monitor, data(), 0.5, stability=stable, not_before=5, optimizer=optimizer, **FEW
    )
    for step in range(12):
        train_step(model, optimizer, step)
        monitor.step(step)
        report = trigger.step(step)
        if report is not None:
            masks = masks_of(model)
            momentum = optimizer.state[model[0].weight_orig]["momentum_buffer"]
            assert not bool(momentum[~masks["0.weight"]].any())
    assert trigger.pruned == [(5, 0.5)]
    assert optimizer.report().refreshes == 2  # of the dense parameters, and of the pruned ones
    assert [r["status"] for r in monitor.records] == ["ok"] * 12
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, masks[name])
    # The curvature of what is pruned is zero: no eigenvector has a part in it.
    rows = monitor.pairs.layout.split(monitor.pairs.eigenvectors)["0.weight"]
    assert bool((rows[~masks["0.weight"]].abs() < 1e-5).all())


def test_training_is_bitwise_the_same_until_it_prunes():
    plain, watched = net(), net()
    optimizers = sgd(plain), sgd(watched)
    monitor = monitor_of(watched)
    trigger = PruneWhenStable(monitor, data(), 0.5, not_before=10**6, optimizer=optimizers[1])
    for step in range(6):
        train_step(plain, optimizers[0], step)
        train_step(watched, optimizers[1], step)
        monitor.step(step)
        trigger.step(step)
    assert len(trigger.signals) == 6
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_error_in_pruning_leaves_all_as_it_was_and_is_tried_again():
    model = net()
    monitor = monitor_of(model)
    calls = []

    def fails_once(pruned, sparsity):
        calls.append(sparsity)
        if len(calls) == 1:
            raise RuntimeError("no memory")
        hesscurv.pruning.prune_model(pruned, TASK, data(), sparsity, method="magnitude", stages=1)
        return "done"

    trigger = PruneWhenStable(monitor, sparsity=0.5, prune=fails_once)
    settle(monitor, trigger, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="no memory"):
        settle(monitor, trigger, 1, first=3)
    assert trigger.pruned == []
    assert before.keys() == model.state_dict().keys()
    assert settle(monitor, trigger, 1, first=4) == [4]


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_prunes_at_the_same_steps(stop, tmp_path):
    def parts():
        model = net()
        monitor = monitor_of(model)
        return model, monitor, PruneWhenStable(monitor, data(), [0.3, 0.6], **FEW)

    model, monitor, trigger = parts()
    settle(monitor, trigger, 12)
    expected = trigger.pruned, trigger.signals
    model, monitor, trigger = parts()
    settle(monitor, trigger, stop)
    parts_of_run = {"model": model, "monitor": monitor, "trigger": trigger}
    torch.save({k: part.state_dict() for k, part in parts_of_run.items()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    model, monitor, trigger = parts()
    hesscurv.pruning.load_pruned_(model, saved["model"])
    monitor.load_state_dict(saved["monitor"])
    trigger.load_state_dict(saved["trigger"])
    settle(monitor, trigger, 12 - stop, first=stop)
    assert (trigger.pruned, trigger.signals) == expected


def test_refuses_a_state_of_other_sparsities_or_of_a_pruned_model():
    model = net()
    monitor = monitor_of(model)
    trigger = PruneWhenStable(monitor, data(), 0.5, **FEW)
    settle(monitor, trigger, 4)
    state = trigger.state_dict()
    with pytest.raises(ValueError, match=r"expected a state with the sparsities \[0\.6\]"):
        PruneWhenStable(monitor, data(), 0.6).load_state_dict(state)
    dense = monitor_of(net())
    with pytest.raises(ValueError, match=r"expected a model pruned to 0\.5, got a dense one"):
        PruneWhenStable(dense, data(), 0.5).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"expected sparsities that rise within \(0, 1\)"),
        ({"sparsity": [0.5, 0.3]}, "expected sparsities that rise"),
        ({"sparsity": []}, "expected sparsities that rise"),
        ({"every": 0}, "expected every >= 1, got 0"),
        ({"not_before": -1}, "expected not_before >= 0, got -1"),
        ({"stability": None}, "expected a stability or a deadline"),
        ({"batches": None}, "expected batches for prune_model, got None"),
        ({"weights": "nowhere"}, "nowhere"),
    ],
)
def test_refuses_values_out_of_range(arguments, message):
    arguments = {"batches": data()} | arguments
    with pytest.raises(ValueError, match=message):
        PruneWhenStable(monitor_of(net()), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": "half"}, "expected sparsity as a number"),
        ({"optimizer": 3}, r"expected a torch\.optim\.Optimizer, got int"),
        ({"stability": 0.9}, r"expected stability=Stability\(...\) or None, got float"),
        ({"every": 1.5}, "expected every to be an int"),
        ({"prune": lambda model, s: None, "stages": 3}, r"expected no arguments .* \['stages'\]"),
    ],
)
def test_refuses_wrong_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        PruneWhenStable(monitor_of(net()), data(), **arguments)


def test_refuses_a_monitor_that_does_not_measure_what_is_needed():
    cheap = monitor_of(net(), quantities="cheap")
    with pytest.raises(ValueError, match=r"monitor with the quantities \['space_overlap'\], got"):
        PruneWhenStable(cheap, data())
    blind = monitor_of(net(), quantities=("loss",))
    with pytest.raises(ValueError, match=r"monitor with the quantities \['eigenvalues'\], got"):
        PruneWhenStable(blind, data(), stability=Stability(space_overlap=None))
    biases = monitor_of(net(), params=["0.bias", "2.bias"])
    with pytest.raises(
        ValueError, match=r"some of the weights \['0.weight', '2.weight'\], got one"
    ):
        PruneWhenStable(biases, data())
    only_mask = Stability(space_overlap=None, overlap_change=None)
    PruneWhenStable(cheap, data(), stability=only_mask)
    with pytest.raises(TypeError, match="expected a CurvatureMonitor, got Sequential"):
        PruneWhenStable(net(), data())
