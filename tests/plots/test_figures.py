import math

import pytest
import torch
from plots import recorded

import hesscurv
from hesscurv import plots

pytest.importorskip("matplotlib")


def test_a_spectrum_has_each_eigenvalue_at_its_rank_among_those_of_its_sign():
    drawn = recorded.lines(plots.spectrum(recorded.pairs()))
    assert drawn["positive, 2"] == ([1, 2], [5.0, 1.0])
    assert drawn["negative, 2"] == ([1], [3.0])
    assert drawn["negative, not converged, 1"] == ([2], [pytest.approx(0.1)])


def test_the_floor_of_a_spectrum_is_the_largest_residual_from_each_rank_on():
    # Rank 1 has residuals 1e-3 and 1e-2, rank 2 has 1e-4 and 5e-2.
    assert recorded.lines(plots.spectrum(recorded.pairs()))["largest residual"] == (
        [1, 2],
        [5e-2, 5e-2],
    )


def test_a_floor_far_below_the_spectrum_is_told_and_leaves_it_the_room():
    values = torch.tensor([2.0, -1.0])
    exact = hesscurv.Eigenpairs(
        values, torch.eye(2), torch.full((2,), 1e-12), torch.ones(2, dtype=torch.bool), 4
    )
    ax = plots.spectrum(exact)
    assert "residuals up to 1e-12, below" in recorded.lines(ax)
    assert ax.get_ylim()[0] > 0.1


@pytest.mark.parametrize("source", ["tensor", "record"])
def test_a_spectrum_is_drawn_from_eigenvalues_alone(source):
    values = [-3.0, -1.0, 0.0, math.nan]
    given = torch.tensor(values) if source == "tensor" else {"step": 3, "eigenvalues": values}
    drawn = recorded.lines(plots.spectrum(given))
    assert drawn == {"negative, 2": ([1, 2], [3.0, 1.0])}


def test_eigenvalues_by_step_have_all_of_both_signs_and_the_residuals():
    drawn = recorded.lines(plots.eigenvalues(recorded.run()))
    assert drawn["positive"][0] == [0, 0, 10, 10, 30, 30, 40, 40]
    assert drawn["negative"][1] == [3.0, 0.1] * 4
    assert drawn["largest residual"] == ([0, 10, 30, 40], [1e-3] * 4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_overlap_by_k_is_that_of_the_metric_beside_its_chance_level(seed):
    pairs = recorded.pairs(seed)
    scores = torch.rand(recorded.D, generator=torch.Generator().manual_seed(seed))
    ax = plots.overlap_by_k(scores, pairs, label="mine")
    drawn = recorded.lines(ax)
    assert drawn["mine"] == ([1, 2, 3, 4], hesscurv.overlap_by_k(scores, pairs).tolist())
    chance = drawn["chance ± 3 std, k / D"]
    assert chance == ([1, 2, 3, 4], [k / recorded.D for k in range(1, 5)])
    band = ax.collections[0].get_paths()[0].vertices
    mean, std = hesscurv.chance_overlap(4, recorded.D)
    assert max(band[:, 1]) == pytest.approx(mean + 3 * std)


def test_a_second_curve_over_k_gets_another_colour_and_no_second_chance_level():
    scores, pairs = torch.rand(recorded.D), recorded.pairs()
    ax = plots.overlap_by_k(scores, pairs, label="one")
    assert plots.overlap_by_k(-scores, pairs, ax, label="two") is ax
    assert list(recorded.lines(ax)) == ["chance ± 3 std, k / D", "one", "two"]
    assert len({line.get_color() for line in ax.get_lines()}) == 3


def test_overlap_by_k_of_records_has_a_curve_for_each_that_did_not_fail():
    ax = plots.overlap_by_k(recorded.run(), num_parameters=recorded.D)
    drawn = recorded.lines(ax)
    assert list(drawn) == ["chance ± 3 std, k / D", "step 0", "step 10", "step 30", "step 40"]
    assert drawn["step 30"] == ([1, 2, 3, 4], pytest.approx([0.1, 0.2, 0.3, 0.4]))


def test_of_many_curves_over_k_the_legend_names_few_the_last_among_them():
    records = [recorded.record(step) for step in range(0, 400, 10)]
    ax = plots.overlap_by_k(records)
    assert len(ax.get_lines()) == 40
    names = list(recorded.lines(ax))
    assert len(names) <= 7
    assert names[0] == "step 0"
    assert names[-1] == "step 390"


def test_overlap_by_step_breaks_at_a_failure_and_marks_it():
    drawn = recorded.lines(plots.overlap_by_step(recorded.run()))
    steps, values = drawn["overlap"]
    assert steps == [0, 10, 20, 30, 40]
    assert math.isnan(values[2])
    assert values[:2] + values[3:] == pytest.approx([0.3, 0.31, 0.33, 0.34])
    assert drawn["chance ± 3 std"] == ([0, 10, 30, 40], [0.1] * 4)
    assert drawn["measurement failed"][0] == [20]


def test_sharpness_stands_beside_two_over_the_learning_rate():
    drawn = recorded.lines(plots.sharpness(recorded.run()))
    assert drawn["2 / learning rate"] == ([0, 10, 30, 40], pytest.approx([20, 20, 40, 40]))
    assert drawn["sharpness, largest eigenvalue"][1][:2] == [5, 6]
    assert "the optimizer's edge" not in drawn  # the same line


def test_momentum_moves_the_edge_that_is_drawn():
    records = [{**r, "stable_rate": 2 * 1.9 / r["sharpness"]} for r in map(recorded.record, (0, 9))]
    drawn = recorded.lines(plots.sharpness(records))
    assert drawn["the optimizer's edge"][1] == pytest.approx([38, 38])


def test_a_quantity_that_was_not_due_leaves_no_gap():
    records = recorded.run()
    del records[1]["loss"]
    (line,) = [
        line for line in plots.by_step(records, "loss").get_lines() if len(line.get_xdata()) > 1
    ]
    assert list(line.get_xdata()) == [0, 20, 30, 40]


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_is_no_number_is_a_gap(value):
    records = [recorded.record(step) for step in (0, 10, 20)]
    records[1]["loss"] = value
    line = plots.by_step(records, "loss", label="loss").get_lines()[0]
    assert line.get_xdata().tolist() == [0, 10, 20]
    assert math.isnan(line.get_ydata()[1])


def test_a_trace_has_two_standard_errors_around_it():
    ax = plots.by_step([recorded.record(0), recorded.record(10)], "trace")
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(heights), max(heights)) == (19.0, 22.0)


def test_an_event_is_marked_once_in_the_legend():
    records = [{**recorded.record(step), "event": "pruned"} for step in (0, 10, 20)]
    ax = plots.sharpness(records)
    assert list(recorded.lines(ax)).count("pruned") == 1
    assert sum(set(line.get_xdata()) == {10} for line in ax.get_lines()) == 1


def test_steps_of_a_logarithmic_schedule_get_a_logarithmic_axis():
    even = plots.by_step([recorded.record(step) for step in range(0, 80, 10)], "loss")
    doubled = plots.by_step(
        [recorded.record(step) for step in (0, *(2**i for i in range(12)))], "loss"
    )
    assert even.get_xscale() == "linear"
    assert doubled.get_xscale() == "symlog"
    assert -1 < doubled.get_xlim()[0] < 0
    assert 2048 < doubled.get_xlim()[1] < 4096


def test_leverage_of_records_is_a_heat_map_of_parameters_by_steps():
    ax = plots.leverage(recorded.run())
    cells = ax.get_images()[0].get_array()
    assert cells.shape == (3, 5)
    assert cells[:, 0].tolist() == [0.5, 0.1, 0.4]
    assert cells.mask[:, 2].all()  # the failed one
    assert cells.mask.sum() == 3
    assert [label.get_text() for label in ax.get_yticklabels()] == list(recorded.NAMES)


def test_a_parameter_that_a_record_lacks_is_grey_in_it_alone():
    records = [recorded.record(0), recorded.record(10)]
    del records[0]["leverage_by_parameter"]["0.bias"]
    cells = plots.leverage(records).get_images()[0].get_array()
    # Rows come in the order of first sight, so the missing one is last.
    assert cells.mask.tolist() == [[False, False], [False, False], [True, False]]


def test_leverage_of_eigenpairs_is_bars_with_the_share_of_entries_across():
    ax = plots.leverage(recorded.pairs())
    scores = hesscurv.leverage_by_parameter(recorded.pairs())
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([float(s.sum()) / recorded.K for s in scores.values()])
    marks = [segment[0][0] for segment in ax.collections[0].get_segments()]
    assert marks == [30 / 40, 6 / 40, 4 / 40]


def test_leverage_of_one_record_is_bars():
    ax = plots.leverage(recorded.record(0))
    assert [bar.get_width() for bar in ax.patches] == [0.5, 0.1, 0.4]


def test_sparsity_is_drawn_of_records_numbers_masks_and_reports():
    mask = torch.tensor([[True, False], [False, False]])
    ax = plots.sparsity({"a": 0.25, "b": mask})
    assert [bar.get_width() for bar in ax.patches] == [0.25, 0.75]
    layers = [hesscurv.pruning.run.pruning_report.LayerReport("a", 10, 4, 0.6, 0.0, 0.0)]
    report = hesscurv.pruning.run.pruning_report.PruningReport(
        "obs", 0.6, 4, 10, 1.0, 1.0, 1.0, None, 0, 0, 0.0, layers=layers
    )
    ax = plots.sparsity(report)
    assert [bar.get_width() for bar in ax.patches] == [0.6]
    assert "0.6" in ax.get_xlabel()
    assert plots.sparsity(recorded.run()).get_images()[0].get_clim() == (0, 1)


@pytest.mark.parametrize(("draw", "slope"), [(plots.space_overlaps, 0.01), (plots.mask_ious, 0.02)])
def test_a_matrix_is_symmetric_with_ones_on_its_diagonal(draw, slope):
    ax = draw(recorded.run())
    cells, steps = ax.get_images()[0].get_array(), [0, 10, 30, 40]
    expected = [[1 - slope * abs(a - b) for b in steps] for a in steps]
    assert cells.tolist() == [pytest.approx(row) for row in expected]
    assert len(ax.texts) == 16  # few cells have their numbers in them


def test_a_matrix_of_comparisons_with_the_last_alone_has_one_side_diagonal():
    records = [{"step": 0}, {"step": 5, "space_overlap": 0.5}, {"step": 9, "space_overlap": 0.8}]
    cells = plots.space_overlaps(records).get_images()[0].get_array()
    assert cells.filled(-1).tolist() == [[1, 0.5, -1], [0.5, 1, 0.8], [-1, 0.8, 1]]


def test_names_lose_what_all_share_and_stay_distinct():
    from hesscurv.plots.by_parameter import shorten

    names = [f"model.layers.{i}.attention.projection.weight" for i in range(3)]
    assert shorten(names, 40) == [f"{i}.attention.projection.weight" for i in range(3)]
    cut = shorten(names, 20)
    assert all(len(name) == 20 and "…" in name for name in cut)
    assert len(set(cut)) == 3
    twins = ["a" * 30 + "b" + "c" * 30, "a" * 30 + "d" + "c" * 30]
    assert shorten(twins, 20) == twins


@pytest.mark.parametrize(
    ("steps", "texts"),
    [
        ([0, 900, 9999], ["0", "900", "9999"]),
        ([10_000, 24_475], ["10k", "24.5k"]),
        ([1_000_000, 1_000_400], ["1M", "1.0004M"]),
    ],
)
def test_steps_are_short_and_told_apart(steps, texts):
    from hesscurv.plots.canvas import short_steps

    assert short_steps(steps) == texts
