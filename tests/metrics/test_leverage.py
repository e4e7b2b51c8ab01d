import math

import pytest
import torch
from torch import nn

from hesscurv.metrics import (
    best_mask,
    leverage_by_parameter,
    leverage_scores,
    overlap,
    overlap_by_k,
    overlap_by_parameter,
    random_mask,
    top_k_mask,
)
from hesscurv.objective.parameters import ParameterLayout, layout_of, select_parameters

SEEDS = [0, 1, 2]
LAYOUT = ParameterLayout(("w", "b", "empty", "scale"), ((4, 5), (5,), (0, 3), ()))  # D = 26
# A few eps of float64 times the number of terms.
TIGHT = 1e-12


@pytest.mark.parametrize("k", [None, 1, 4, 6])
@pytest.mark.parametrize("seed", SEEDS)
def test_leverage_scores_are_the_diagonal_of_the_projector_and_sum_to_k(
    random_basis, as_pairs, k, seed
):
    basis = random_basis(30, 6, seed)
    scores = leverage_scores(basis, k)
    projector = basis[:, :k] @ basis[:, :k].mT
    torch.testing.assert_close(scores, projector.diagonal(), rtol=0, atol=TIGHT)
    assert float(scores.sum()) == pytest.approx(k or 6)
    assert torch.equal(leverage_scores(as_pairs(basis), k), scores)


def test_leverage_scores_do_not_depend_on_the_basis_of_the_space(random_basis):
    basis = random_basis(30, 6)
    torch.testing.assert_close(
        leverage_scores(basis @ random_basis(6, 6, 3)), leverage_scores(basis), rtol=0, atol=TIGHT
    )


@pytest.mark.usefixtures("in_small_blocks")
def test_blocks_of_rows_do_not_change_the_scores(random_basis):
    basis = random_basis(101, 3)
    torch.testing.assert_close(leverage_scores(basis), basis.square().sum(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_leverage_scores_have_the_basis_dtype_and_at_least_float32(random_basis, dtype, expected):
    basis = random_basis(60, 5)
    scores = leverage_scores(basis.to(dtype).requires_grad_())
    assert scores.dtype == expected
    assert not scores.requires_grad
    # Entries of at most 1 rounded to bfloat16 (8 bits) and squared.
    torch.testing.assert_close(scores.double(), leverage_scores(basis), rtol=0, atol=1e-2)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_mask_overlaps_more_than_the_best_mask(random_basis, seed):
    basis = random_basis(8, 3, seed)
    everything = [
        overlap(torch.tensor([(code >> i) & 1 == 1 for i in range(8)]), basis)
        for code in range(256)
        if code.bit_count() == 3
    ]
    assert len(everything) == 56
    assert overlap(best_mask(basis), basis) == pytest.approx(max(everything), rel=TIGHT)


def test_best_mask_of_k_belongs_to_the_first_k_columns(random_basis, as_pairs):
    basis = random_basis(20, 5)
    expected = top_k_mask(basis[:, :2].square().sum(1), 2)
    assert torch.equal(best_mask(as_pairs(basis), 2), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_curve_of_overlap_agrees_with_one_overlap_after_the_other(random_basis, as_pairs, seed):
    basis = random_basis(40, 12, seed)
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers from a small range: many ties.
    scores = torch.randint(8, (40,), generator=generator)
    naive = [overlap(top_k_mask(scores, k), basis[:, :k]) for k in range(1, 13)]
    curve = overlap_by_k(scores, as_pairs(basis))
    assert curve.dtype == torch.float64
    assert curve.tolist() == pytest.approx(naive, rel=TIGHT)
    ks = [7, 1, 12, 7]
    assert overlap_by_k(scores, basis, ks).tolist() == pytest.approx([naive[k - 1] for k in ks])


def test_curve_of_overlap_reaches_the_full_space(random_basis):
    curve = overlap_by_k(torch.arange(6.0), random_basis(6, 6))
    assert float(curve[-1]) == pytest.approx(1, rel=TIGHT)


def test_curve_of_overlap_keeps_the_best_curve_at_1_for_coordinate_axes():
    order = torch.tensor([4, 0, 3, 1])
    basis = torch.eye(5, dtype=torch.float64)[:, order]
    scores = torch.tensor([0.8, 0.2, 0.1, 0.5, 0.9], requires_grad=True)
    assert overlap_by_k(scores, basis).tolist() == [1, 1, 1, 1]
    assert overlap_by_k(-scores, basis, range(1, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_contributions_of_parameters_sum_to_the_whole(random_basis, as_pairs, seed):
    basis = random_basis(26, 4, seed)
    mask = random_mask(26, 9, torch.Generator().manual_seed(seed))
    parts = overlap_by_parameter(mask, as_pairs(basis, LAYOUT))
    assert list(parts) == list(LAYOUT.names)
    assert sum(p.overlap for p in parts.values()) == pytest.approx(overlap(mask, basis))
    assert sum(p.leverage_share for p in parts.values()) == pytest.approx(1)
    assert sum(p.num_kept for p in parts.values()) == 9
    assert [p.numel for p in parts.values()] == [20, 5, 0, 1]
    rows = basis[20:25].square().sum(1)
    assert parts["b"].num_kept == int(mask[20:25].sum())
    assert parts["b"].leverage_share == pytest.approx(float(rows.sum()) / 4)
    assert parts["b"].overlap == pytest.approx(float(rows[mask[20:25]].sum()) / math.sqrt(9 * 4))
    assert parts["empty"].overlap == 0


def test_leverage_by_parameter_has_the_shapes_of_a_models_weights(random_basis):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    selected = select_parameters(model)
    layout = layout_of(selected)
    basis = random_basis(layout.numel, 5)
    parts = leverage_by_parameter(basis, layout)
    assert {n: t.shape for n, t in parts.items()} == {n: p.shape for n, p in selected.items()}
    assert torch.equal(layout.flatten(parts), leverage_scores(basis))


def test_a_layout_given_by_hand_overrides_the_stored_one(random_basis, as_pairs):
    other = ParameterLayout(("all",), ((26,),))
    pairs = as_pairs(random_basis(26, 4), LAYOUT)
    assert list(leverage_by_parameter(pairs, other)) == ["all"]
    assert list(overlap_by_parameter(torch.ones(26) > 0, pairs, other)) == ["all"]


def test_a_missing_or_wrong_layout_is_refused(random_basis, as_pairs):
    basis, mask = random_basis(26, 4), torch.ones(26) > 0
    wrong = ParameterLayout(("all",), ((25,),))
    for call in (leverage_by_parameter, lambda *args: overlap_by_parameter(mask, *args)):
        for pairs in (basis, as_pairs(basis)):
            with pytest.raises(ValueError, match=r"got neither `layout` nor .*pass layout=layout_"):
                call(pairs)
            with pytest.raises(ValueError, match=r"layout of 26 entries.*got one of 25"):
                call(pairs, wrong)
            with pytest.raises(TypeError, match=r"ParameterLayout, got dict"):
                call(pairs, {"w": (26,)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: leverage_scores(v, 0), ValueError, r"1 <= k <= 4 \(the number of columns\)"),
        (lambda v: leverage_scores(v, 5), ValueError, r"got k=5"),
        (lambda v: leverage_scores(v, 2.0), TypeError, r"expected k to be an integer, got 2.0"),
        (lambda v: best_mask(v, 5), ValueError, r"got k=5"),
        (lambda v: overlap_by_k(torch.ones(25), v), ValueError, r"each of the 26 rows.*got 25"),
        (lambda v: overlap_by_k(torch.ones(26, 1), v), ValueError, r"got \(26, 1\)"),
        (lambda v: overlap_by_k(torch.full((26,), torch.nan), v), ValueError, r"26 NaN of 26"),
        (lambda v: overlap_by_k(torch.ones(26), v, []), ValueError, r"at least one rank"),
        (lambda v: overlap_by_k(torch.ones(26), v, [5]), ValueError, r"1 <= k in ks <= 4 .*=5"),
        (lambda v: overlap_by_k(torch.ones(26), v, ["1"]), TypeError, r"integer, got '1'"),
        (lambda v: overlap_by_k(torch.ones(26) > 0, v), TypeError, r"scores.*got torch.bool"),
        (
            lambda v: overlap_by_parameter(torch.ones(25) > 0, v, LAYOUT),
            ValueError,
            r"mask of 26 entries for this basis, got 25",
        ),
        (
            lambda v: overlap_by_parameter(v, v, LAYOUT),
            TypeError,
            r"expected mask to be a bool mask \(D,\), got torch.float64",
        ),
    ],
)
def test_bad_arguments_are_refused(random_basis, call, error, message):
    with pytest.raises(error, match=message):
        call(random_basis(26, 4))
