"""Sentences on top of a monitor's page: said where the records support them, and only there."""

import math
import re

import pytest
from support.html_pages import Page

from hesscurv.plots.monitor_findings import monitor_findings
from hesscurv.plots.monitor_report import make_report


def records_of(**columns):
    """Records at steps 0, 10, ..., each quantity a list of values; None where it is missing."""
    count = max(map(len, columns.values()))
    return [
        {"step": 10 * i, "status": "ok"}
        | {key: values[i] for key, values in columns.items() if values[i] is not None}
        for i in range(count)
    ]


def said(word, records):
    found = [sentence for sentence in monitor_findings(records) if word in sentence]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        # sharpness x rate / 2, and rate / stable rate where momentum moves the limit
        ({"sharpness": 14.0, "learning_rate": 0.1}, "at 70 % of the stability limit"),
        ({"sharpness": 14.0, "learning_rate": 0.1, "stable_rate": 0.4}, "at 25 % of"),
        ({"sharpness": 26.0, "learning_rate": 0.1}, "at 130 % of"),
        (
            {"sharpness": 14.0, "learning_rate": 0.1, "sharpness_converged": False},
            "at 70 % or more of",
        ),
    ],
)
def test_sharpness_is_compared_with_its_limit(last, expected):
    sentence = said("stability limit", [{"step": 40, **last}])
    assert expected in sentence
    assert "step 40" in sentence


@pytest.mark.parametrize(
    "last",
    [
        {"sharpness": 14.0},  # no optimizer
        {"sharpness": 14.0, "learning_rate": 0.0},
        {"sharpness": math.nan, "learning_rate": 0.1},
        {"sharpness": math.inf, "learning_rate": 0.1},
        {"sharpness": None, "learning_rate": 0.1},  # as a file of JSON has NaN
        {"sharpness": -2.0, "learning_rate": 0.1},  # no curvature is too large for the rate
    ],
)
def test_there_is_no_limit_without_a_rate_and_a_positive_finite_sharpness(last):
    before = {"step": 0, "sharpness": 1.0, "learning_rate": 0.1}
    assert said("limit", [before, {"step": 40, **last}]) is None


def test_the_step_at_which_the_limit_was_passed_is_named():
    records = records_of(sharpness=[30.0, 10.0, 25.0, 21.0], learning_rate=[0.1] * 4)
    assert "above it since step 20" in said("limit", records)
    assert "above it in 3 of 5" in said(
        "limit", [*records, {"step": 99, "sharpness": 2.0, "learning_rate": 0.1}]
    )


def overlaps(*z_scores, std=0.01):
    return records_of(
        overlap=[None if z is None else 0.1 + z * 0.01 for z in z_scores],
        overlap_chance=[0.1] * len(z_scores),
        overlap_chance_std=[std] * len(z_scores),
    )


@pytest.mark.parametrize(
    ("z_scores", "expected"),
    [
        ((9, 5, 1, 1.9, -1), "From step 20 on the overlap .* is within chance"),
        ((1, 0, 3, 4), "From step 20 on the overlap .* is above chance"),
        ((1, 0, -1), "From the first measurement on .* is within chance"),
        ((5, 4, 3), "From the first measurement on .* is above chance"),
        ((1, 5, 6, 1), r"At step 30 .* is within chance .* as at 1 of the 3"),
        ((5, -3, -4), "From step 10 on .* is below chance"),
        ((1,), "^At step 0 .* is within chance"),
        ((5, 1, None, math.nan, 1), "From step 10 on"),  # unmeasured in between
    ],
)
def test_the_run_of_overlaps_on_one_side_of_chance_is_dated(z_scores, expected):
    sentence = said("overlap of the largest weights", overlaps(*z_scores))
    assert re.search(expected, sentence), sentence


@pytest.mark.parametrize(
    "records",
    [
        overlaps(5, 1, 1, std=0.0),  # it cannot vary
        overlaps(5, 1, 1, std=math.nan),
        overlaps(5, 1, math.nan),
        records_of(overlap=[0.3, 0.2]),  # no level to compare with
    ],
)
def test_nothing_is_said_of_chance_where_it_is_unknown(records):
    assert said("chance", records) is None


def spaces(*values):
    return records_of(loss=[1.0] * len(values), space_overlap=list(values))


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ((None, 0.3, 0.95, 0.91, 0.99), 20),
        ((None, 0.95, 0.95), 10),
        ((None, 0.95, 0.3, 0.95, 0.95), 30),
        ((None, 0.3, 0.9, 0.95), None),  # 0.9 is not above 0.9, and one alone does not stay
        ((None, 0.3, 0.5, 0.4), None),
        ((None, 0.95, 0.96, 0.2), None),
        ((None, 0.95, math.nan, 0.95), None),
        ((None, 0.95), None),
        ((None,), None),
    ],
)
def test_a_settled_space_is_dated(values, step):
    sentence = said("settled", spaces(*values))
    if step is None:
        assert sentence is None
    else:
        assert f"settled at step {step}: overlap with the last one stays above 0.9" in sentence


def test_a_space_that_changes_is_said_to_change():
    assert "0.40 at step 30" in said("still changing", spaces(None, 0.3, 0.5, 0.4))
    assert said("still changing", spaces(None, 0.95, 0.95)) is None
    assert said("still changing", spaces(None, 0.3, math.nan)) is None


def test_a_space_that_drifts_slowly_has_not_settled_before_it_is_near_the_present_one():
    records = spaces(None, *[0.95] * 5)
    assert "step 10" in said("settled", records)
    records[-1]["space_overlaps"] = [[0, 0.2], [10, 0.5], [20, 0.8], [30, 0.92], [40, 0.95]]
    assert "step 30" in said("settled", records)


def test_a_history_of_spaces_is_enough():
    records = records_of(
        space_overlaps=[[], [[0, 0.4]], [[0, 0.4], [10, 0.95]], [[10, 0.93], [20, 0.97]]]
    )
    assert "step 20" in said("settled", records)


def test_negative_eigenvalues_count_beyond_their_residuals():
    record = {"step": 3, "eigenvalues": [5.0, -4.0, -0.1, math.nan], "residuals": [0.2] * 4}
    sentence = said("negative", [record])
    assert "1 of the 4 eigenvalues of largest magnitude is negative at step 3" in sentence
    assert "the lowest -4." in sentence
    assert said("negative", [{**record, "residuals": None}]).startswith("2 of the 4")
    assert said("negative", [{"step": 3, "eigenvalues": [5.0, 4.0]}]) is None


def test_a_loss_that_is_no_longer_finite_comes_first():
    records = records_of(
        loss=[1.0, math.nan, 1.0, math.nan, math.inf], sharpness=[1.0] * 5, learning_rate=[0.1] * 5
    )
    assert (
        monitor_findings(records)[0] == "The loss on the probe set is not finite from step 30 on."
    )
    assert "fell from 2 at step 0 to 1 at step 10" in said("loss", records_of(loss=[2.0, 1.0]))
    assert said("loss", records_of(loss=[1.0, 1.001])) is None


@pytest.mark.parametrize("records", [[], [{"step": 0}], [{"step": 0, "status": "ok", "loss": 1.0}]])
def test_records_without_a_story_have_no_sentence(records):
    assert monitor_findings(records) == []


def test_failed_measurements_support_nothing_but_their_number():
    failed = {"step": 5, "status": "failed", "sharpness": 1.0, "learning_rate": 0.1}
    assert monitor_findings([failed]) == ["No measurement has succeeded, of 1."]
    good = {"step": 0, "sharpness": 14.0, "learning_rate": 0.1}
    assert "(step 0)" in said("limit", [good, failed])


def test_there_are_at_most_three_sentences_and_the_page_shows_them():
    records = spaces(None, 0.95, 0.95, 0.95)
    for record, other in zip(records, overlaps(9, 9, 1, 1), strict=True):
        record |= other
        record |= {"sharpness": 5.0, "learning_rate": 0.1, "eigenvalues": [5.0, -1.0]}
    findings = monitor_findings(records)
    assert len(findings) == 3
    page = Page(make_report(records, title="t"))
    assert page.open == []
    assert page.findings == findings
    # Each number stands beside what it compares with.
    assert page.cards["last sharpness"] == ["5", "limit 20"]
    assert page.cards["last overlap"] == ["0.11", "chance 0.1 ± 0.01"]
    assert page.cards["last overlap with earlier space"] == ["0.95", "0.95 at step 10"]
    assert page.cards["negative eigenvalues"] == ["1 of 2"]
