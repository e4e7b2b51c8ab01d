import itertools

import pytest
import torch
from torch import nn

from hesscurv.metrics import intersection_over_union, magnitude_mask, random_mask, top_k_mask
from hesscurv.objective.parameters import layout_of, select_parameters


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("k", [1, 2, 13, 42, 43])
def test_magnitude_mask_keeps_the_k_largest_in_the_operators_order(k):
    model = small_model()
    mask = magnitude_mask(model, k)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert mask.dtype == torch.bool
    assert mask.shape == (43,)
    assert mask.sum() == k
    if k < 43:
        assert vector.abs()[mask].min() >= vector.abs()[~mask].max()
    assert torch.equal(magnitude_mask(vector, k), mask)


def test_magnitude_mask_covers_the_selected_parameters_only():
    model = small_model()
    mask = magnitude_mask(model, 3, params="2")
    selected = select_parameters(model, "2")
    assert torch.equal(mask, magnitude_mask(layout_of(selected).flatten(selected), 3))
    model[0].weight.requires_grad_(False)
    assert magnitude_mask(model, 3).shape == (43 - 20,)


def test_magnitude_mask_counts_tied_weights_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert magnitude_mask(model, 2).shape == (9,)


def test_magnitude_mask_handles_parameters_of_mixed_precision():
    model = small_model()
    model[2].to(torch.bfloat16)
    assert magnitude_mask(model, 10).sum() == 10


def test_magnitude_mask_leaves_the_model_as_it_was():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    magnitude_mask(model, 10)[:] = True
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad


def test_ties_are_broken_by_index_and_masks_of_growing_k_are_nested():
    scores = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0, 0.0, 3.0])
    kept = [top_k_mask(scores, k).nonzero().flatten().tolist() for k in range(1, 8)]
    assert kept[:5] == [[1], [1, 3], [1, 3, 6], [0, 1, 3, 6], [0, 1, 2, 3, 6]]
    assert all(set(small) < set(large) for small, large in itertools.pairwise(kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_top_k_mask_keeps_exactly_k_of_heavily_tied_scores(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (10_000,), generator=generator).to(dtype)
    for k in (1, 777, 5000, 10_000):
        mask = top_k_mask(scores, k)
        stable = torch.sort(scores, descending=True, stable=True).indices[:k]
        assert mask.sum() == k
        assert mask[stable].all()


def test_top_k_mask_keeps_infinite_scores_first_and_minus_infinite_last():
    scores = torch.tensor([0.0, -float("inf"), float("inf"), 1.0])
    assert top_k_mask(scores, 1).tolist() == [False, False, True, False]
    assert top_k_mask(scores, 3).tolist() == [True, False, True, True]


def test_random_masks_are_reproducible_and_have_exactly_k():
    masks = [random_mask(50, 20, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert all(mask.sum() == 20 and mask.shape == (50,) for mask in masks)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_masks_keep_every_entry_equally_often(seed):
    generator = torch.Generator().manual_seed(seed)
    counts = sum(random_mask(10, 3, generator).double() for _ in range(2000))
    # Binomial(2000, 0.3): standard deviation 20.5; 5 of them.
    assert (counts - 600).abs().max() < 105


def test_random_mask_without_a_generator_follows_the_global_seed():
    torch.manual_seed(3)
    first = random_mask(30, 5)
    torch.manual_seed(3)
    assert torch.equal(random_mask(30, 5), first)


def test_intersection_over_union_counts_entries(mask_of):
    a, b = mask_of(10, [0, 1, 2, 3]), mask_of(10, [2, 3, 4])
    assert intersection_over_union(a, b) == 2 / 5
    assert intersection_over_union(b, a) == 2 / 5
    assert intersection_over_union(a, a) == 1
    assert intersection_over_union(a, ~a) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: magnitude_mask(small_model(), 0), ValueError, r"1 <= k <= 43 .*got k=0"),
        (lambda: magnitude_mask(small_model(), 44), ValueError, r"1 <= k <= 43 .*got k=44"),
        (lambda: magnitude_mask(small_model(), 0.2), TypeError, r"integer, got 0.2; a fraction"),
        (lambda: magnitude_mask(small_model(), True), TypeError, r"integer, got True"),
        (lambda: magnitude_mask(small_model(), 1, params="x"), ValueError, r"no parameter or sub"),
        (lambda: magnitude_mask({"w": 1}, 1), TypeError, r"module or a flat.*got dict"),
        (lambda: magnitude_mask(torch.ones(3), 1, params="x"), ValueError, r"with a module only"),
        (lambda: magnitude_mask(torch.ones(3, 2), 1), ValueError, r"shape \(D,\), got \(3, 2\)"),
        (lambda: magnitude_mask(torch.tensor([1, float("nan")]), 1), ValueError, r"1 NaN of 2"),
        (lambda: top_k_mask([1.0], 1), TypeError, r"real tensor \(D,\), got list"),
        (lambda: top_k_mask(torch.ones(3, dtype=torch.bool), 1), TypeError, r"got torch.bool"),
        (lambda: top_k_mask(torch.ones(3) * 1j, 1), TypeError, r"got torch.complex64"),
        (lambda: top_k_mask(torch.ones(0), 1), ValueError, r"got \(0,\)"),
        (lambda: random_mask(0, 1), ValueError, r"got D=0"),
        (lambda: random_mask(5, 6), ValueError, r"1 <= k <= 5 \(D\), got k=6"),
        (
            lambda: intersection_over_union(torch.ones(3), torch.ones(3) > 0),
            TypeError,
            r"expected a to be a bool mask \(D,\), got torch.float32; pass a.bool\(\)",
        ),
        (
            lambda: intersection_over_union([True], torch.ones(1) > 0),
            TypeError,
            r"expected a to be a bool mask \(D,\), got list",
        ),
        (
            lambda: intersection_over_union(torch.ones(3) > 0, torch.ones(4) > 0),
            ValueError,
            r"same parameters, got \(3,\) and \(4,\)",
        ),
        (
            lambda: intersection_over_union(torch.ones(3) > 0, torch.zeros(3) > 0),
            ValueError,
            r"at least one True in the mask b",
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
