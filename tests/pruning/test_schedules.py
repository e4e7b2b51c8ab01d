"""The growth of sparsity against its formulas, and schedules that cannot be."""

import itertools

import pytest

from hesscurv.pruning.run.sparsity_schedules import sparsities

STARTS = (0.0, 0.3)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("stages", [1, 2, 7])
def test_named_schedules_follow_their_formulas(start, stages):
    end, times = 0.9, [j / stages for j in range(1, stages + 1)]
    cubic = [0.9 - (0.9 - start) * (1 - t) ** 3 for t in times]
    assert sparsities("cubic", stages, start, end) == pytest.approx(cubic, abs=1e-12)
    linear = [start + (0.9 - start) * t for t in times]
    assert sparsities("linear", stages, start, end) == pytest.approx(linear, abs=1e-12)
    kept = [1 - start, *(1 - s for s in sparsities("geometric", stages, start, end))]
    ratios = [b / a for a, b in itertools.pairwise(kept)]
    assert ratios == pytest.approx([ratios[0]] * stages, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cubic", "linear", "geometric", lambda t: t**2])
def test_the_end_is_exact_and_nothing_falls(schedule):
    for end in (0.1, 0.3, 0.7, 0.8, 0.97):
        for start in (0.0, 0.1 * end, end):
            path = sparsities(schedule, 9, start, end)
            assert len(path) == 9
            assert path[-1] == end
            # The last entry is rounded another way than the one before it.
            assert all(b >= a - 1e-12 for a, b in zip([start, *path], path, strict=False))


def test_a_function_says_the_part_of_the_way():
    assert sparsities(lambda t: t**2, 2, 0.2, 0.6) == pytest.approx([0.3, 0.6])


def test_sparsities_are_taken_as_they_are_and_end_exactly():
    assert sparsities([0.1, 0.1, 0.5], 1, 0.0, 0.5) == [0.1, 0.1, 0.5]
    assert sparsities((0.3, 0.1 + 0.2 + 0.4), 1, 0.0, 0.7) == [0.3, 0.7]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("quadratic", "expected a schedule of .*'cubic', 'geometric', 'linear'.*'quadratic'"),
        ([0.5, 0.4, 0.8], "do not fall, from 0.2 on"),
        ([0.1, 0.8], "do not fall, from 0.2 on"),
        ([], "do not fall"),
        ([0.3, float("nan"), 0.8], "do not fall"),
        ([0.3, float("nan")], "do not fall"),
        ([0.3, 0.7], "ends at sparsity 0.8, got 0.7"),
        (lambda t: t / 2, "ends at sparsity 0.8, got 0.5"),
        (lambda t: 1 - t, "do not fall"),
        (lambda t: 2 * t, "ends at sparsity 0.8, got 1.4"),
    ],
)
def test_what_cannot_be_is_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        sparsities(schedule, 2, 0.2, 0.8)
