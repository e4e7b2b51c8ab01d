"""A training run is the same, bit for bit, with a monitor and without, whatever happens in it."""

import random
import warnings

import numpy
import pytest
import torch
from hooks.watched import TASK, data, equal, left_behind, net, train
from torch import nn

from hesscurv.hooks import CurvatureMonitor, MonitorWarning, every

STEPS = 8


def both(make, after_steps=True, **options):
    """Losses and what is left of a run without a monitor, and of one with it."""
    found = []
    for watched in (False, True):
        model = make()
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(3)
        monitor = None
        if watched:
            dtype = next(model.parameters()).dtype
            probe = [(inputs.to(dtype), targets) for inputs, targets in data(2)]
            monitor = CurvatureMonitor(model, TASK, probe, 4, schedule=every(3), quantities="full")
        after = monitor.step if monitor is not None and after_steps else lambda step: None
        losses = train(model, STEPS, after, **options)
        found.append((losses, left_behind(model), monitor))
    return found


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_watched_run_has_the_same_bits(noisy, autocast):
    (losses, left, _), (watched_losses, watched, monitor) = both(
        lambda: net(noisy=noisy).float() if autocast else net(noisy=noisy), autocast=autocast
    )
    assert [r["status"] for r in monitor.records] == ["ok"] * 3
    assert losses == watched_losses
    assert equal(left, watched)


def test_a_compiled_model_trains_with_the_same_bits():
    (losses, left, _), (watched_losses, watched, monitor) = both(
        lambda: torch.compile(net(noisy=True), backend="aot_eager")
    )
    assert [r["status"] for r in monitor.records] == ["ok"] * 3
    assert losses == watched_losses
    assert equal(left, watched)


def test_a_model_in_eval_mode_stays_in_it():
    model = net(noisy=True)
    model[1].eval()
    monitor = CurvatureMonitor(model, TASK, data(1), 2)
    before = left_behind(model)
    assert monitor.measure(0)["status"] == "ok"
    assert equal(before, left_behind(model))
    assert not model[1].training
    assert model[0].training


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_measuring_inside_a_grad_mode_gives_the_same_record(mode):
    model = net()
    plain = CurvatureMonitor(model, TASK, data(2), 3, quantities="full")
    inside = CurvatureMonitor(model, TASK, data(2), 3, quantities="full")
    for _ in range(2):  # the second starts from the first, whose tensors are then used
        expected = plain.measure(0)
        before = left_behind(model)
        with mode():
            got = inside.measure(0)
            assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert equal(before, left_behind(model))
        assert got["status"] == "ok"
        assert got["eigenvalues"] == pytest.approx(expected["eigenvalues"], rel=1e-9)
        assert not inside.pairs.eigenvectors.is_inference()
    train(model, 1, inside.step)


def test_the_mode_of_autocast_does_not_enter_the_record():
    model, probe = net().float(), [(inputs.float(), targets) for inputs, targets in data(2)]
    expected = CurvatureMonitor(model, TASK, probe, 3).measure(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = CurvatureMonitor(model, TASK, probe, 3).measure(0)
    assert got["sharpness"] == pytest.approx(expected["sharpness"], rel=1e-6)


def loader(shuffle=True):
    inputs, targets = (torch.cat(parts) for parts in zip(*data(), strict=True))
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=8, shuffle=shuffle
    )


def test_reading_the_probe_set_draws_no_random_numbers():
    model = net()
    before = left_behind(model)
    CurvatureMonitor(model, TASK, loader(), 2, samples=16)
    assert equal(before, left_behind(model))


class Unruly:
    """Batches whose reading draws from every generator there is, and counts."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        random.random(), numpy.random.rand(), torch.rand(1)
        yield from data(2)


def test_the_probe_set_is_read_once_and_what_reading_draws_is_put_back():
    model, batches = net(), Unruly()
    before = left_behind(model)
    monitor = CurvatureMonitor(model, TASK, batches, 2, quantities="full")
    for step in range(3):
        monitor.measure(step)
    assert batches.passes == 1
    assert equal(before, left_behind(model))


def test_the_probe_set_is_fixed_though_its_tensors_are_written_to():
    model, batches = net(), data(1)
    monitor = CurvatureMonitor(model, TASK, batches, 2)
    before = monitor.measure(0)["loss"]
    batches[0][0].zero_()
    assert monitor.measure(1)["loss"] == before


class Failing(nn.Module):
    """A layer that fails or goes wrong when it is told to, outside of training."""

    def __init__(self, how):
        super().__init__()
        self.how, self.armed = how, False

    def forward(self, x):
        if self.armed and not self.training:
            random.random(), torch.rand(1)
            if self.how == "raises":
                raise RuntimeError("no more of this")
            if self.how == "out of memory":
                raise torch.OutOfMemoryError("asked for too much")
            return x * float("nan")
        return x


@pytest.mark.parametrize("how", ["raises", "out of memory", "not finite"])
def test_a_failing_measurement_changes_nothing_and_training_goes_on(how):
    found = []
    for watched in (False, True):
        model = net(noisy=True)
        model.append(Failing(how))
        torch.manual_seed(3)
        monitor = CurvatureMonitor(model, TASK, data(2), 3, schedule=every(1))

        def after(step, model=model, monitor=monitor, watched=watched):
            model[-1].armed = step in (2, 3, 5)
            if watched:
                monitor.step(step)
            model[-1].armed = False

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = train(model, STEPS, after)
        found.append((losses, left_behind(model)))
    assert equal(*found)
    status = [record["status"] for record in monitor.records]
    assert status == ["ok", "ok", "failed", "failed", "ok", "failed", "ok", "ok"]
    told = [w for w in caught if issubclass(w.category, MonitorWarning)]
    assert len(told) == 1
    assert "step 2" in str(told[0].message)
    failed = monitor.records[2]
    assert set(failed) == {"step", "status", "error", "seconds", "num_matvecs", "fraction"}
    assert monitor.records[4].keys() == monitor.records[0].keys()


def test_an_interrupt_passes_and_leaves_the_model_as_it_was():
    class Interrupting(nn.Module):
        def forward(self, x):
            if not self.training:
                raise KeyboardInterrupt
            return x

    model = net().append(Interrupting())
    monitor = CurvatureMonitor(model, TASK, data(1), 2)
    before = left_behind(model)
    with pytest.raises(KeyboardInterrupt):
        monitor.step(0)
    assert equal(before, left_behind(model))
    assert monitor.records == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_run_has_the_same_bits_and_nothing_but_the_probe_stays():
    found = []
    for watched in (False, True):
        model = net(noisy=True).cuda()
        torch.manual_seed(3)
        monitor = CurvatureMonitor(model, TASK, data(2), 4, quantities="full")
        batches = [(x.cuda(), y.cuda()) for x, y in data()]
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        losses, held = [], []
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = TASK(model, batches[step % len(batches)])
            loss.backward()
            optimizer.step()
            if watched:
                monitor.measure(step)
            losses.append(loss.item())
            held.append(torch.cuda.memory_allocated())
        found.append((losses, left_behind(model), torch.cuda.get_rng_state()))
    assert equal(*found)
    assert monitor.pairs.eigenvectors.device.type == "cpu"
    assert held[-1] == held[2]  # it does not grow
