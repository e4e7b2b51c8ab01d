"""The methods prune the lowest scores, over a tensor, its slices, its groups and many tensors."""

import copy

import pytest
import torch
from mask_cases import (
    EXPECTED,
    OURS,
    linear,
    lowest_by_sorting,
    lowest_slices_by_sorting,
    n_of_m_by_sorting,
    permuted_scores,
    two_layers,
)
from torch import nn
from torch.nn.utils import prune

from hesscurv.pruning.masks.global_pruning import curvature_global
from hesscurv.pruning.masks.methods import (
    CurvatureUnstructured,
    curvature_nm,
    curvature_structured,
    curvature_unstructured,
)
from hesscurv.pruning.weights import current_mask

SEEDS = [0, 1, 2]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", OURS)
def test_the_lowest_signed_scores_are_pruned(method, seed):
    layer, scores = linear(), permuted_scores((4, 8), seed)
    dense = layer.weight.detach().clone()
    assert OURS[method](layer, scores) is layer
    expected = EXPECTED[method](scores, torch.ones(4, 8, dtype=torch.bool))
    assert torch.equal(current_mask(layer, "weight"), expected)
    assert torch.equal(layer.weight, dense * expected)
    assert torch.equal(layer.weight_orig, dense)
    assert layer.weight_mask.dtype == torch.float64


@pytest.mark.parametrize(("amount", "pruned"), [(0, 0), (5, 5), (32, 32), (0.0, 0), (0.3, 10)])
def test_amounts_are_counts_or_fractions(amount, pruned):
    layer, scores = linear(), permuted_scores((4, 8))
    curvature_unstructured(layer, "weight", amount, scores)
    expected = lowest_by_sorting(scores, torch.ones(4, 8, dtype=torch.bool), pruned)
    assert torch.equal(current_mask(layer, "weight"), expected)
    assert int((layer.weight_mask == 0).sum()) == pruned
    torchs = prune.l1_unstructured(linear(), "weight", amount)
    assert int((torchs.weight_mask == 0).sum()) == pruned


def test_a_fraction_is_of_what_survives_and_an_integer_is_not_a_fraction():
    layer, scores = linear(), permuted_scores((4, 8))
    for expected in [16, 8, 4]:
        curvature_unstructured(layer, "weight", 0.5, scores)
        assert int(layer.weight_mask.sum()) == expected
    curvature_unstructured(layer, "weight", 1, scores)
    assert int(layer.weight_mask.sum()) == 3
    curvature_unstructured(layer, "weight", 1.0, scores)
    assert int(layer.weight_mask.sum()) == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", OURS)
def test_scores_of_other_dtypes_rank_as_well_and_leave_the_masks_dtype(method, dtype):
    layer, scores = linear(), permuted_scores((4, 8))
    OURS[method](layer, scores.to(dtype).requires_grad_(dtype.is_floating_point))
    OURS[method](layer, scores.to(dtype))
    expected = EXPECTED[method](scores, torch.ones(4, 8, dtype=torch.bool))
    assert torch.equal(current_mask(layer, "weight"), EXPECTED[method](scores, expected))
    assert layer.weight_mask.dtype == layer.weight.dtype == torch.float64


def test_integers_beyond_the_precision_of_floats_are_ranked():
    scores = 2**60 + torch.arange(32).flip(0).view(4, 8)
    layer = curvature_unstructured(linear(), "weight", 8, scores)
    assert torch.equal(current_mask(layer, "weight"), torch.arange(32).view(4, 8) < 24)


def test_of_equal_scores_the_first_are_kept_and_the_count_is_exact():
    layer = curvature_unstructured(linear(), "weight", 10, torch.zeros(4, 8))
    assert torch.equal(current_mask(layer, "weight").flatten(), torch.arange(32) < 22)
    layer = curvature_structured(linear(), "weight", 3, 1, torch.zeros(4, 8))
    assert torch.equal(current_mask(layer, "weight")[0], torch.arange(8) < 5)
    layer = curvature_nm(linear(), "weight", 1, 4, torch.zeros(4, 8))
    assert torch.equal(current_mask(layer, "weight")[2], torch.arange(8) % 4 == 0)


def test_infinite_scores_are_kept_or_go_first():
    scores = permuted_scores((4, 8))
    scores[0, 0], scores[3, 7] = torch.inf, -torch.inf
    layer = curvature_unstructured(linear(), "weight", 1, scores)
    assert not current_mask(layer, "weight")[3, 7]
    layer = curvature_unstructured(linear(), "weight", 31, scores)
    assert current_mask(layer, "weight")[0, 0]
    # A pruned entry never comes back, not even against one of score -inf.
    layer = prune.custom_from_mask(linear(), "weight", torch.arange(32).view(4, 8) % 2)
    curvature_nm(layer, "weight", 2, 4, torch.full((4, 8), -torch.inf))
    assert torch.equal(current_mask(layer, "weight"), torch.arange(32).view(4, 8) % 2 == 1)


def test_slices_score_what_is_left_of_them():
    layer = linear(2, 3)
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 0], [1, 1], [1, 1]]))
    scores = torch.tensor([[3.0, 100.0], [1.0, 1.0], [2.0, 2.0]])
    curvature_structured(layer, "weight", 2, 0, scores)
    expected = torch.tensor([[False, False], [False, False], [True, True]])
    assert torch.equal(current_mask(layer, "weight"), expected)


@pytest.mark.parametrize("dim", [0, 1, -1, -3])
def test_structured_pruning_takes_any_dimension_of_a_convolution(dim):
    layer = nn.Conv2d(3, 4, (2, 5)).double().to(memory_format=torch.channels_last)
    scores = permuted_scores((4, 3, 2, 5))
    curvature_structured(layer, "weight", 1, dim, scores)
    expected = lowest_slices_by_sorting(scores, torch.ones_like(scores).bool(), dim, 1)
    assert torch.equal(current_mask(layer, "weight"), expected)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 4)])
@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (nn.Linear(8, 3), 1),
        (nn.Conv2d(8, 3, 3), 1),
        (nn.Conv1d(16, 4, 2, groups=2), 1),
        (nn.ConvTranspose2d(4, 6, 2), 0),
        (nn.Embedding(3, 8), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_n_of_m_are_kept_along_the_inputs(layer, dim, n, m):
    layer = copy.deepcopy(layer).double()
    scores = permuted_scores(layer.weight.shape)
    curvature_nm(layer, "weight", n, m, scores)
    alive = torch.ones(layer.weight.shape, dtype=torch.bool)
    expected = n_of_m_by_sorting(scores, alive, n, m, dim)
    assert torch.equal(current_mask(layer, "weight"), expected)
    assert int(layer.weight_mask.sum()) == layer.weight.numel() * n // m


def test_pruned_entries_count_among_the_zeros_of_a_group():
    layer = linear(4, 3)
    before = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1]])
    prune.custom_from_mask(layer, "weight", before)
    curvature_nm(layer, "weight", 2, 4, torch.arange(12.0).view(3, 4))
    expected = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 1]])
    assert torch.equal(current_mask(layer, "weight"), expected.bool())


@pytest.mark.parametrize("amount", [0.5, 7])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_scores_are_ranked_over_all_tensors(ours, pruned, amount):
    model, scores = two_layers()
    alive = torch.ones(48, dtype=torch.bool)
    if pruned:
        prune.l1_unstructured(model[0], "weight", 0.25)
        alive[:32] = model[0].weight_mask.flatten().bool()
    if ours:
        curvature_global(scores, amount, scores)
    else:
        prune.global_unstructured(
            list(scores), CurvatureUnstructured, importance_scores=scores, amount=amount
        )
    together = torch.cat([s.flatten() for s in scores.values()])
    count = amount if isinstance(amount, int) else round(amount * int(alive.sum()))
    expected = lowest_by_sorting(together, alive, count)
    assert torch.equal(current_mask(model[0], "weight"), expected[:32].view(4, 8))
    assert torch.equal(current_mask(model[2], "weight"), expected[32:].view(4, 4))
    if ours:
        copy.deepcopy(model)
        for layer in (model[0], model[2]):
            assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)


def test_global_pruning_ranks_scores_of_mixed_dtypes_and_takes_plain_tuples():
    model, scores = two_layers()
    mixed = {
        (weight.module, weight.name): s.to(dtype)
        for (weight, s), dtype in zip(scores.items(), [torch.float32, torch.int64], strict=True)
    }
    curvature_global(iter(mixed), 24, mixed)
    together = torch.cat([s.flatten() for s in scores.values()])
    expected = lowest_by_sorting(together, torch.ones(48).bool(), 24)
    assert torch.equal(current_mask(model[2], "weight"), expected[32:].view(4, 4))
