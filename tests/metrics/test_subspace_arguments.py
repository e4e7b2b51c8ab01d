import pytest
import torch

from hesscurv.metrics import (
    best_mask,
    grassmann_distances,
    leverage_scores,
    overlap,
    overlap_z_score,
    principal_angles,
)
from hesscurv.objective.parameters import ParameterLayout

TWO_SPACES = [overlap, principal_angles, grassmann_distances, overlap_z_score]
ONE_BASIS = [leverage_scores, best_mask]


@pytest.mark.parametrize("metric", TWO_SPACES)
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (None, TypeError, r"got NoneType"),
        ([[1.0], [0.0]], TypeError, r"bool mask \(D,\), a basis \(D, k\) or Eigenpairs, got list"),
        (torch.zeros(6, dtype=torch.bool), ValueError, r"at least one True.*got none"),
        (torch.ones(2, 3, dtype=torch.bool), ValueError, r"flat mask.*got \(2, 3\); use"),
        (torch.ones(6, dtype=torch.int64), TypeError, r"got torch.int64.*\.bool\(\) for a mask"),
        (torch.ones(6, 2, dtype=torch.complex64), TypeError, r"real floating.*got torch.complex64"),
        (torch.ones(6), ValueError, r"floating vector of shape \(6,\); pass \w\.unsqueeze\(1\)"),
        (torch.ones(2, 6), ValueError, r"1 <= k <= D, vectors as columns, got \(2, 6\)"),
        (torch.ones(6, 0), ValueError, r"1 <= k <= D, vectors as columns, got \(6, 0\)"),
        (torch.ones(6, 1, 1), ValueError, r"shape \(D, k\).*got \(6, 1, 1\)"),
        (torch.eye(6)[:, :2] * 2, ValueError, r"orthonormal.*got about 3; pass torch.linalg.qr"),
        (torch.ones(6, 6) / 6**0.5, ValueError, r"orthonormal columns in \w of shape \(6, 6\)"),
        (torch.zeros(6, 1), ValueError, r"orthonormal"),
        (torch.eye(6)[:, :2] * float("nan"), ValueError, r"finite basis \w, got NaN or infinite"),
        (torch.eye(6)[:, :2] / 0, ValueError, r"finite basis \w, got NaN or infinite"),
    ],
)
def test_what_spans_no_subspace_is_refused_in_either_place(metric, bad, error, message):
    good = torch.eye(6, dtype=torch.float64)[:, :2]
    with pytest.raises(error, match=message):
        metric(bad, good)
    with pytest.raises(error, match=message):
        metric(good, bad)


@pytest.mark.parametrize("metric", ONE_BASIS)
def test_metrics_of_one_basis_refuse_masks_and_other_objects(metric):
    with pytest.raises(TypeError, match=r"basis \(D, k\) or Eigenpairs, got a bool mask"):
        metric(torch.ones(6, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"got NoneType"):
        metric(None)
    with pytest.raises(ValueError, match=r"orthonormal columns in pairs"):
        metric(torch.eye(6)[:, :2] * 0.5)


@pytest.mark.parametrize("metric", TWO_SPACES)
def test_spaces_of_different_dimension_are_refused(metric, random_basis, mask_of):
    for other in (random_basis(7, 2), mask_of(7, [0, 1])):
        with pytest.raises(ValueError, match=r"one space, got D=6 and D=7; select the same"):
            metric(random_basis(6, 2), other)


def test_eigenpairs_over_parameters_of_other_shapes_are_refused(random_basis, as_pairs):
    basis = random_basis(6, 2)
    layouts = [ParameterLayout(("w", "b"), shapes) for shapes in [((2, 2), (2,)), ((4,), (2,))]]
    with pytest.raises(ValueError, match=r"differ in shape: 'w' \(2, 2\) against 'w' \(4,\)"):
        overlap(*(as_pairs(basis, layout) for layout in layouts))


def test_eigenpairs_of_a_wrapped_model_with_prefixed_names_are_accepted(random_basis, as_pairs):
    basis = random_basis(6, 2)
    layouts = [ParameterLayout((name,), ((6,),)) for name in ("w", "module.w")]
    assert overlap(*(as_pairs(basis, layout) for layout in layouts)) == pytest.approx(1)


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_orthonormal_bases_of_every_precision_are_accepted(random_basis, rank, dtype):
    basis = random_basis(512, rank, 1, dtype)
    # bfloat16 keeps 8 bits, so one vector's length is right to some 1e-3.
    assert overlap(basis, basis) == pytest.approx(1, abs=2e-2)


def test_a_float32_basis_cast_to_float64_is_accepted(random_basis):
    basis = random_basis(2000, 50, 1, torch.float32).double()
    assert overlap(basis, basis) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("column", [0, 17, 199])
def test_one_bad_column_among_many_is_refused(random_basis, dtype, column):
    basis = random_basis(400, 200, 1, dtype)
    basis[:, column] = basis[:, column - 1]
    with pytest.raises(ValueError, match=r"orthonormal columns"):
        leverage_scores(basis)


def test_one_nan_among_many_entries_is_refused(random_basis):
    basis = random_basis(400, 20)
    basis[399, 19] = float("nan")
    with pytest.raises(ValueError, match=r"finite basis"):
        leverage_scores(basis)


def test_the_remedy_for_a_skewed_basis_spans_the_same_space(random_basis):
    basis = random_basis(20, 3)
    skewed = basis @ torch.tensor([[2.0, 1, 0], [0, 1, 5], [0, 0, 1]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"torch\.linalg\.qr\(a\)\.Q"):
        overlap(skewed, basis)
    assert overlap(torch.linalg.qr(skewed).Q, basis) == pytest.approx(1)
