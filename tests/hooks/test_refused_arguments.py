"""What cannot be watched is refused before anything is read or changed; loggers cannot harm."""

import warnings

import pytest
import torch
from hooks.watched import TASK, Kept, data, net, train
from support.bundles import bundled

import hesscurv
from hesscurv.hooks import CurvatureMonitor, MonitorOptions, MonitorWarning, every


class Untouched:
    """Batches that must not be read."""

    def __iter__(self):
        raise AssertionError("the batches were read")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "net"}, TypeError, "expected a torch.nn.Module, got str"),
        ({"task": 3}, TypeError, "expected a task"),
        ({"k": 0}, ValueError, "expected k >= 1, got 0"),
        ({"k": 2.5}, TypeError, "expected k to be an int"),
        ({"quantities": "sharpnes"}, ValueError, "expected quantities among .* got 'sharpnes'"),
        ({"quantities": ()}, ValueError, "at least one quantity"),
        ({"quantities": (1,)}, TypeError, "expected names"),
        ({"schedule": 10}, TypeError, r"use hesscurv.hooks.every\(10\)"),
        ({"clock": 1.0}, TypeError, "expected clock to be callable"),
        ({"optimizer": 0.1}, TypeError, "expected an optimizer with param_groups, got float"),
        ({"loggers": [print]}, TypeError, r"expected loggers with a method log\(record, step\)"),
        ({"max_fraction": 0}, ValueError, "expected a finite max_fraction > 0 and < 1"),
        ({"max_fraction": 1}, ValueError, "expected a finite max_fraction > 0 and < 1"),
        ({"max_fraction": "10%"}, TypeError, "expected max_fraction to be a number"),
        ({"curvature": "kfac"}, ValueError, "expected curvature among"),
        ({"curvature": "ggn", "task": lambda m, b: 0}, TypeError, "parts outputs and loss"),
        ({"samples": 0}, ValueError, "expected samples >= 1"),
        ({"tol": 0}, ValueError, "expected a finite tol > 0"),
        ({"tol": None}, TypeError, "expected tol to be a number"),
        ({"max_matvecs": 0}, ValueError, "expected max_matvecs >= 1"),
        ({"mask_size": 0}, ValueError, "expected mask_size >= 1"),
        ({"mask_size": 1.5}, ValueError, "expected a finite mask_size > 0 and <= 1"),
        ({"trace_matvecs": 1}, ValueError, "expected trace_matvecs >= 2"),
        ({"history": -1}, ValueError, "expected history >= 0"),
        ({"params": "5"}, ValueError, "'5'"),
        ({"operator_options": {"waay": "retained"}}, TypeError, r"got \['waay'\]"),
        ({"operator_options": {"training": True}}, TypeError, "are CurvatureMonitor's own"),
        ({"generator": 3}, TypeError, "expected generator to be a torch.Generator"),
    ],
)
def test_wrong_arguments_are_refused_before_the_batches_are_read(change, error, message):
    given = {"model": net(), "task": TASK, "batches": Untouched()} | change
    with pytest.raises(error, match=message):
        CurvatureMonitor(given.pop("model"), given.pop("task"), **bundled(MonitorOptions, given))


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([], ValueError),
        (data(1)[0], ValueError),
        (data(1)[0][0], ValueError),
        (iter(data(1)), TypeError),
        (7, TypeError),
    ],
)
def test_what_is_no_probe_set_is_refused(batches, error):
    with pytest.raises(error, match="expected"):
        CurvatureMonitor(net(), TASK, batches)


def test_a_step_that_is_no_integer_is_refused():
    monitor = CurvatureMonitor(net(), TASK, data(1), 2)
    with pytest.raises(TypeError):
        monitor.step("3")
    with pytest.raises(TypeError):
        monitor.measure(1.5)
    assert monitor.records == []
    assert monitor.step(torch.tensor(0))["step"] == 0


def test_a_logger_that_fails_is_warned_of_once_and_the_others_are_called():
    class Broken:
        def log(self, record, step):
            record.clear()
            raise OSError("no room")

    kept, model = Kept(), net()
    loggers = [Broken(), kept, Broken()]
    monitor = CurvatureMonitor(model, TASK, data(1), 2, schedule=every(1), loggers=loggers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, 3, monitor.step)
    told = [str(w.message) for w in caught if issubclass(w.category, MonitorWarning)]
    assert len(told) == 2  # one for each logger
    assert all("logger Broken failed at step 0 with OSError: no room" in text for text in told)
    assert [step for step, _ in kept.records] == [0, 1, 2]
    assert [record for _, record in kept.records] == monitor.records


def test_a_warning_names_the_line_of_the_loop():
    class Broken:
        def log(self, record, step):
            raise OSError("no room")

    monitor = CurvatureMonitor(net(), TASK, data(1), 2, loggers=[Broken()])
    with pytest.warns(MonitorWarning) as caught:
        monitor.step(0)
    assert caught[0].filename == __file__


def test_pairs_that_have_not_converged_are_recorded_without_a_warning():
    model = net()
    monitor = CurvatureMonitor(
        model, TASK, data(2), 5, tol=1e-12, options=MonitorOptions(max_matvecs=10)
    )
    train(model, 1, monitor.step)
    model[0].weight.data.mul_(1.5)
    record = monitor.measure(1)
    assert record["num_matvecs"] <= 10
    assert record["converged"] < 5
    hessian = hesscurv.HessianOperator(model, TASK, data(2))
    V, values = monitor.pairs.eigenvectors, monitor.pairs.eigenvalues
    measured = (hessian @ V - V * values).norm(dim=0)
    assert record["residuals"] == pytest.approx(measured.tolist(), rel=0.3)


def test_numbers_without_another_default_are_needed():
    with pytest.raises(TypeError, match="expected k to be an int"):
        CurvatureMonitor(net(), TASK, data(1), None)
    with pytest.raises(TypeError, match="expected trace_matvecs to be an int, got None"):
        MonitorOptions(trace_matvecs=None)
