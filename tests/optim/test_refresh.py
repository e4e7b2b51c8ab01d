"""When the eigenspace is computed anew, what that costs, and what of it is seen."""

from itertools import pairwise

import pytest
import torch
from optim.training import (
    SPECTRA,
    Quadratic,
    data,
    net,
    precondition,
    quadratic_data,
    quadratic_loss,
    set_gradients,
    sgd,
    train,
    weights,
)
from planted import planted
from support.bundles import bundled

from hesscurv.optim import PreconditionedOptimizer, PreconditionerOptions
from hesscurv.optim.preconditioner.refresh_schedule import RefreshSchedule


class Clock:
    """Seconds that pass as told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def alone(number):
    return number


def run(schedule, clock, steps, step_seconds, refresh_seconds, every=None, largest=alone):
    """The steps at which a schedule asks for a refresh, by a clock."""
    asked = []
    for step in range(steps):
        if schedule.now(step, every, largest):
            asked.append(step)
            clock.now += refresh_seconds
            schedule.refreshed(step, refresh_seconds)
        clock.now += step_seconds(step) if callable(step_seconds) else step_seconds
    return asked


# -- the schedule, by a clock of our own ------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 7])
def test_an_interval_is_kept_whatever_the_time(every):
    clock = Clock()
    asked = run(RefreshSchedule(0.2, clock), clock, 30, 1.0, 500.0, every)
    assert asked == list(range(0, 30, every))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("refresh_seconds", [0.1, 3.0, 40.0])
def test_without_an_interval_the_share_of_time_stays_below_the_limit(fraction, refresh_seconds):
    clock = Clock()
    schedule = RefreshSchedule(fraction, clock)
    asked = run(schedule, clock, 3000, 0.5, refresh_seconds)
    assert schedule.elapsed() == pytest.approx(len(asked) * refresh_seconds + 3000 * 0.5)
    # The last one may not have been earned again by the end: one more than the share.
    most = fraction * schedule.elapsed() + refresh_seconds
    assert schedule.refresh_seconds == pytest.approx(len(asked) * refresh_seconds)
    assert schedule.refresh_seconds <= most
    # And what was allowed was used, but for the steps that are timed first, ten each time.
    earned = refresh_seconds * (1 - fraction) / fraction / 0.5
    assert asked[1] - asked[0] == pytest.approx(max(10, earned), abs=1)


def test_refreshes_in_vain_become_rarer_until_one_is_worth_it():
    clock = Clock()
    schedule = RefreshSchedule(0.5, clock)
    asked, worth = [], [False] * 6 + [True] * 3
    for step in range(2000):
        if schedule.now(step, None, alone):
            clock.now += 20.0
            schedule.refreshed(step, 20.0, worth_it=worth[min(len(asked), 8)])
            asked.append(step)
        clock.now += 1.0
    gaps = [later - earlier for earlier, later in pairwise(asked)]
    assert gaps[:9] == [40, 80, 160, 320, 320, 320, 20, 20, 20]


def test_slower_steps_are_taken_account_of_after_the_next_refresh():
    clock = Clock()
    schedule = RefreshSchedule(0.5, clock)
    asked = run(schedule, clock, 400, lambda step: 1.0 if step < 100 else 4.0, 80.0)
    # 80 is chosen in the first steps, and again from 80 to 90, before they are slower.
    assert asked == [0, 80, 160, *range(180, 400, 20)]


def test_the_slowest_process_decides_for_all():
    clock = Clock()
    asked = run(RefreshSchedule(0.5, clock), clock, 100, 1.0, 20.0, largest=lambda n: max(n, 45.0))
    assert asked == [0, 45, 90]


def test_processes_talk_to_each_other_once_a_refresh_and_at_the_same_steps():
    clock, calls = Clock(), []

    def largest(number):
        calls.append(number)
        return number

    asked = run(RefreshSchedule(0.5, clock), clock, 100, 1.0, 20.0, largest=largest)
    assert len(asked) == 5
    assert calls == [pytest.approx(20.0)] * 5


def test_a_schedule_goes_on_where_another_was():
    clock = Clock()
    first = RefreshSchedule(0.5, clock)
    assert run(first, clock, 26, 1.0, 20.0) == [0, 20]
    for every, expected in ((None, 40), (30, 50), (3, 26)):
        clock = Clock()
        second = RefreshSchedule(0.5, clock)
        # Chosen by then already.
        second.go_on_from(20, 40)
        step = 26
        while not second.now(step, every, alone):
            step += 1
        assert step == expected
    # In the midst of timing, there is no time of a refresh to go by: it is taken when steps are.
    third = RefreshSchedule(0.5, Clock())
    third.go_on_from(20, None)
    assert [third.now(step, None, alone) for step in range(26, 37)] == [False] * 10 + [True]


def test_going_back_in_time_starts_the_timing_anew():
    clock = Clock()
    schedule = RefreshSchedule(0.5, clock)
    assert run(schedule, clock, 55, 1.0, 20.0) == [0, 20, 40]
    schedule.go_on_from(4, None)
    asked = []
    for step in range(5, 60):
        if schedule.now(step, None, alone):
            asked.append(step)
            schedule.refreshed(step, 20.0)
        clock.now += 1.0
    assert asked == [25, 45]  # 20 seconds from step 5 on, the last refresh's


# -- the optimizer ----------------------------------------------------------------------------


def refreshes(optimizer, model, steps):
    """The steps before which the eigenspace was computed."""
    seen, counts = [], [optimizer.report().refreshes]

    def note(step):
        counts.append(optimizer.report().refreshes)
        if counts[-1] > counts[-2]:
            seen.append(step)

    train(model, optimizer, steps, after=note)
    return seen


def test_the_interval_is_honoured():
    model = net()
    assert refreshes(sgd(model, refresh_every=4), model, 10) == [0, 4, 8]


def test_the_interval_may_be_changed_in_the_group():
    model = net()
    optimizer = sgd(model, refresh_every=100)
    assert refreshes(optimizer, model, 6) == [0]
    optimizer.param_groups[0]["curvature_refresh_every"] = 2
    assert refreshes(optimizer, model, 5) == [0, 2, 4]  # six steps ago is long enough


def test_another_rank_is_a_refresh_at_once():
    model = net()
    optimizer = sgd(model, refresh_every=100)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["curvature_rank"] = 5
    assert refreshes(optimizer, model, 4) == [0]
    assert len(optimizer.report().gains) == 5
    optimizer.param_groups[0]["curvature_rank"] = 2
    assert refreshes(optimizer, model, 4) == [0]
    assert len(optimizer.report().gains) == 2


def test_another_damping_is_the_next_steps():
    H = quadratic_data(SPECTRA["positive"])
    base_model = Quadratic()
    base = torch.optim.SGD(base_model.parameters(), lr=1.0)
    optimizer = precondition(base, base_model, quadratic_loss, H, refresh_every=100, tol=1e-10)
    moved = []
    for damping in (None, 40.0, 0.5, None):
        optimizer.param_groups[0]["curvature_damping"] = damping
        before = weights(base_model)
        set_gradients(base_model, torch.ones(12, dtype=torch.float64))
        optimizer.step()
        moved.append(before - weights(base_model))
        assert optimizer.report().damping == pytest.approx(damping or 1.6)
    assert optimizer.report().refreshes == 1
    # The weights changed by a step in between, and what is subtracted was rounded there.
    torch.testing.assert_close(moved[0], moved[3], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(moved[0], moved[1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_warm_start_takes_fewer_products_than_a_cold_one(seed):
    def products(warm):
        """Products of the second refresh, after a few small steps."""
        model = net(seed=seed)
        base = torch.optim.SGD(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(seed)
        optimizer = precondition(base, model, refresh_every=5, generator=generator, tol=0.01)
        train(model, optimizer, 5)
        before = optimizer.report().num_matvecs
        if not warm:
            optimizer._tracked.current = None
        train(model, optimizer, 1)
        return optimizer.report().num_matvecs - before

    assert 4 <= products(warm=True) < products(warm=False)


def test_a_refresh_of_what_has_not_moved_takes_a_product_a_pair_and_a_block():
    model = net()
    optimizer = precondition(torch.optim.SGD(model.parameters(), lr=0.0), model, refresh_every=1)
    train(model, optimizer, 1)
    before = optimizer.report().num_matvecs
    train(model, optimizer, 1)
    # The r + 1 pairs, since what is left is watched too, and a block of 4 for the products' noise.
    assert optimizer.report().num_matvecs - before == 4 + 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_within_a_share_of_time_a_refresh_is_short_and_the_next_goes_on_from_it(seed):
    # Eigenvalues close to each other, which a cold solve takes many products for.
    spectrum = torch.linspace(2.0, 1.0, 60, dtype=torch.float64)
    spectrum[0] = 9.0
    matrix = planted(spectrum, 60, seed).matrix[None]

    def course(every):
        model = Quadratic(shapes=[(60,)])
        set_gradients(model, torch.ones(60, dtype=torch.float64))
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        H = [matrix]
        options = {"refresh_every": every, "tol": 1e-3}
        options["generator"] = torch.Generator().manual_seed(seed)
        optimizer = precondition(base, model, quadratic_loss, H, **options)
        products, residuals = [0], []
        for _ in range(6):
            optimizer.step()
            for group in optimizer.param_groups:
                group["curvature_due"] = group["curvature_step"]  # at once, not when it is earned
            products.append(optimizer.report().num_matvecs)
            residuals.append(max(optimizer._tracked.current.residuals))
        return [later - earlier for earlier, later in pairwise(products)], residuals

    (first, *_), _ = course(every=1)
    products, residuals = course(every=None)
    assert max(products) <= 2 * 4 < first  # two for each of the r + 1 pairs
    assert residuals[-1] < 0.8 * residuals[0]


def test_time_is_measured_by_the_schedules_clock():
    model, clock = net(), Clock()
    optimizer = sgd(model, refresh_every=None, max_fraction=0.5)
    optimizer._schedule.clock = clock
    solve = optimizer._tracker.solve

    def slow(*args):
        clock.now += 30.0
        return solve(*args)

    optimizer._tracker.solve = slow

    def tick(_):
        clock.now += 1.0

    train(model, optimizer, 70, after=tick)
    report = optimizer.report()
    assert report.refreshes == 3  # at 0, 30 and 60
    assert report.refresh_seconds == 90.0
    assert report.seconds == 160.0
    assert report.refresh_fraction == pytest.approx(90 / 160)


# -- drift ------------------------------------------------------------------------------------


def of_changing_curvature(**options):
    """An optimizer of w^4, whose curvature 12 w^2 changes with the weights."""
    model = Quadratic(shapes=[(6,)])
    scale = torch.tensor([1.0, 0.5, 0.3, 0.1, 0.05, 0.01], dtype=torch.float64)
    with torch.no_grad():
        model.parts[0].copy_(torch.ones(6))

    def loss(model):
        return (scale * model.flat() ** 4).sum()

    base = torch.optim.SGD(model.parameters(), lr=1e-9)
    return model, PreconditionedOptimizer(
        base, model, loss, rank=2, refresh_every=1000, **bundled(PreconditionerOptions, options)
    )


def steps_with(model, optimizer, count):
    found = []
    for _ in range(count):
        before = optimizer.report().refreshes
        model.parts[0].grad = torch.ones(6, dtype=torch.float64)
        optimizer.step()
        found.append(optimizer.report().refreshes - before)
    return found


def test_drift_is_seen_after_the_weights_have_jumped_and_not_before():
    model, optimizer = of_changing_curvature(drift_tol=0.3, check_every=4, tol=1e-8)
    assert steps_with(model, optimizer, 10) == [1] + [0] * 9
    with torch.no_grad():
        model.parts[0].mul_(2)  # four times the curvature
    assert steps_with(model, optimizer, 8) == [0, 0, 1, 0, 0, 0, 0, 0]  # at step 12
    assert optimizer.report().eigenvalues[0] == pytest.approx(48, rel=1e-6)


def test_drift_within_the_tolerance_is_left_alone():
    model, optimizer = of_changing_curvature(drift_tol=0.3, check_every=1, tol=1e-8)
    steps_with(model, optimizer, 1)
    with torch.no_grad():
        model.parts[0].mul_(1.1)  # 1.21 times the curvature: off by .21
    assert steps_with(model, optimizer, 3) == [0, 0, 0]
    with torch.no_grad():
        model.parts[0].mul_(1.1)  # off by .46
    assert steps_with(model, optimizer, 3) == [1, 0, 0]


def test_a_check_takes_one_product_and_none_without_a_tolerance():
    for tolerance, expected in ((0.3, 5), (None, 0)):
        model, optimizer = of_changing_curvature(drift_tol=tolerance, check_every=2, tol=1e-8)
        steps_with(model, optimizer, 2)
        before = optimizer.report().num_matvecs
        steps_with(model, optimizer, 10)
        assert optimizer.report().num_matvecs - before == expected


def test_batches_of_the_curvature_need_not_be_those_of_the_gradient():
    model, twin = net(), net()
    other = data(seed=7)
    optimizer = sgd(model, other, refresh_every=1)
    train(model, optimizer, 3)
    assert optimizer.report().refreshes == 3
    train(twin, sgd(twin, refresh_every=1), 3)
    assert not torch.allclose(weights(model), weights(twin))
