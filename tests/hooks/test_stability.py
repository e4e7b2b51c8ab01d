"""What counts as settled."""

import math

import pytest

from hesscurv.hooks.stability import Stability, relative_change

SETTLED = {"mask_iou": 0.99, "space_overlap": 0.9, "overlap_change": 0.05}


def test_each_bound_is_needed_and_is_met_by_equality():
    bounds = Stability(0.95, 0.7, 0.2)
    assert bounds.holds(SETTLED)
    assert bounds.holds({"mask_iou": 0.95, "space_overlap": 0.7, "overlap_change": 0.2})
    assert not bounds.holds(SETTLED | {"mask_iou": 0.94})
    assert not bounds.holds(SETTLED | {"space_overlap": 0.69})
    assert not bounds.holds(SETTLED | {"overlap_change": 0.21})


@pytest.mark.parametrize("key", SETTLED)
def test_what_has_no_earlier_self_or_is_nan_is_not_settled(key):
    assert not Stability().holds(SETTLED | {key: None})
    assert not Stability().holds(SETTLED | {key: math.nan})
    assert Stability(**{key: None}).holds(SETTLED | {key: None})


def test_it_says_what_it_needs():
    assert Stability().needs == ["space_overlap"]
    assert Stability(space_overlap=None, overlap_change=None).needs == []


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [(0.1, 0.1, 0.0), (0.1, 0.2, 0.5), (0.2, 0.1, 0.5), (0.0, 0.0, 0.0), (None, 1.0, None)],
)
def test_changes_are_relative_to_the_larger_one(before, after, change):
    assert relative_change(before, after) == change


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_iou": 0.0}, r"expected mask_iou in \(0, 1\], got 0.0"),
        ({"mask_iou": 1.5}, r"expected mask_iou in \(0, 1\], got 1.5"),
        ({"space_overlap": math.nan}, "expected space_overlap in"),
        ({"overlap_change": -1.0}, r"expected overlap_change in \(0, inf\]"),
        ({"patience": 0}, "expected patience >= 1, got 0"),
        (
            {"mask_iou": None, "space_overlap": None, "overlap_change": None},
            "expected a bound on mask_iou",
        ),
    ],
)
def test_refuses_bounds_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stability(**arguments)


@pytest.mark.parametrize("arguments", [{"mask_iou": "a"}, {"mask_iou": True}, {"patience": 1.5}])
def test_refuses_wrong_types(arguments):
    with pytest.raises(TypeError, match="expected"):
        Stability(**arguments)
