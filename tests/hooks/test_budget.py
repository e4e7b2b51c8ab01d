"""The share of the time that measurements take, under a clock of the test's own."""

import pytest
from hooks.watched import TASK, Clock, data, net

from hesscurv.hooks import CurvatureMonitor, MonitorOptions, every
from hesscurv.hooks.monitoring.budget import Budget


def watched(max_fraction, seconds=3.0, step_seconds=1.0, steps=400, schedule=None, model=None):
    """A run under a clock that moves by the step, and by each measurement's logger."""
    clock = Clock()

    class Slow:
        def log(self, record, step):
            clock.now += seconds(step) if callable(seconds) else seconds

    monitor = CurvatureMonitor(
        model or net(),
        TASK,
        data(1),
        1,
        quantities=("sparsity",),
        schedule=schedule or every(2),
        max_fraction=max_fraction,
        loggers=[Slow()],
        options=MonitorOptions(clock=clock),
    )
    shares = []
    for step in range(steps):
        clock.now += step_seconds
        monitor.step(step)
        if monitor._budget.training:
            shares.append(monitor._budget.measuring / monitor._budget.training)
    return monitor, shares


def test_without_a_limit_the_schedule_is_kept():
    monitor, _ = watched(None)
    assert [r["step"] for r in monitor.records] == list(range(0, 400, 2))


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("step_seconds", [0.1, 1.0, 20.0])
def test_a_limit_is_kept_after_the_first_measurement(fraction, step_seconds):
    steps = 300 if step_seconds > 1 else 2000
    monitor, shares = watched(fraction, step_seconds=step_seconds, steps=steps)
    taken = [record["step"] for record in monitor.records]
    assert len(taken) > 1
    # From the second one on, which waited for the first one's cost and its own to be earned.
    assert max(shares[taken[1] + 1 :]) <= fraction * (1 + 1e-9)
    # And it is used: one more would have been too much, up to the grid of steps.
    if step_seconds == 1.0:
        assert shares[-1] >= fraction - 2 * 3.0 / 2000


def test_a_postponed_measurement_is_taken_as_soon_as_it_is_affordable():
    # The first, at step 0, takes 3 s. The second is due at 2, and needs (3 + 3) / .1 = 60 s.
    monitor, _ = watched(0.1)
    assert [r["step"] for r in monitor.records][:4] == [0, 60, 90, 120]


def test_one_postponed_measurement_stands_for_all_that_were_due():
    monitor, _ = watched(0.1, seconds=10.0, schedule=every(1), steps=250)
    assert [r["step"] for r in monitor.records] == [0, 200]


def test_the_same_clock_gives_the_same_decisions():
    first, second = watched(0.2)[0], watched(0.2)[0]
    assert first.records == second.records


def test_a_cost_that_grows_is_noticed():
    _, shares = watched(0.1, seconds=lambda step: 1.0 + step / 100, steps=2000)
    assert shares[-1] <= 0.1 * (1 + 1 / 50)  # the last cost is a little short of the next one


def test_the_time_between_calls_is_that_of_training():
    clock = Clock()
    budget = Budget(0.1, clock)
    for _ in range(3):
        clock.now += 5.0
        budget.enter()
        clock.now += 2.0
        budget.measured(2.0)
        budget.leave()
    assert (budget.training, budget.measuring) == (10.0, 6.0)  # before the first call: not known
    assert budget.fraction() == 6 / 16
    assert budget.fraction(4.0) == 10 / 20


def test_the_record_has_its_cost_and_the_share_so_far():
    clock = Clock(per_look=0.5)
    monitor = CurvatureMonitor(
        net(), TASK, data(1), 1, quantities="sparsity", options=MonitorOptions(clock=clock)
    )
    for step in (0, 1):
        clock.now += 10.0
        monitor.measure(step)
    first, second = monitor.records
    assert first["seconds"] == 0.5
    assert first["fraction"] == 1.0
    assert second["fraction"] < 0.5


def test_the_budget_goes_on_after_a_resumption():
    clock = Clock()
    budget = Budget(0.1, clock)
    budget.leave()
    clock.now += 50.0
    budget.enter()
    budget.measured(3.0)
    resumed = Budget(0.1, clock)
    resumed.load_state_dict(budget.state_dict())
    clock.now += 1e6  # between the two runs: nobody's
    resumed.enter()
    assert (resumed.training, resumed.measuring) == (50.0, 3.0)
    assert resumed.wait() == budget.wait()
