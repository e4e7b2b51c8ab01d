"""Schedules are true at the steps that they name, and hold no state."""

import pickle

import pytest

from hesscurv.hooks import dense_then_sparse, every, logarithmic


def steps(schedule, count):
    return [step for step in range(count) if schedule(step)]


def test_every_has_an_interval_and_a_first_step():
    assert steps(every(4), 13) == [0, 4, 8, 12]
    assert steps(every(4, start=3), 13) == [3, 7, 11]


def test_logarithmic_steps_are_rounded_powers_of_ten():
    for per_decade in (1, 3, 5, 20):
        powers = {round(10 ** (i / per_decade)) for i in range(4 * per_decade + 1)}
        assert steps(logarithmic(per_decade), 10_001) == sorted({0} | powers)


def test_dense_then_sparse_changes_at_its_step():
    schedule = dense_then_sparse(until=20, dense=5, sparse=50)
    assert steps(schedule, 180) == [0, 5, 10, 15, 20, 70, 120, 170]
    assert steps(dense_then_sparse(0, 1, 10), 25) == [0, 10, 20]


@pytest.mark.parametrize("schedule", [every(7), logarithmic(), dense_then_sparse()])
def test_asking_again_gives_the_same_answer(schedule):
    assert steps(schedule, 300) == steps(schedule, 300)
    assert not schedule(-1)
    assert steps(pickle.loads(pickle.dumps(schedule)), 300) == steps(schedule, 300)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: every(0), ValueError),
        (lambda: every(2, start=-1), ValueError),
        (lambda: every(2.5), TypeError),
        (lambda: every(True), TypeError),
        (lambda: logarithmic(0), ValueError),
        (lambda: dense_then_sparse(until=-1), ValueError),
        (lambda: dense_then_sparse(sparse=0), ValueError),
        (lambda: dense_then_sparse(dense="5"), TypeError),
    ],
)
def test_wrong_numbers_are_refused(make, error):
    with pytest.raises(error, match="expected"):
        make()
