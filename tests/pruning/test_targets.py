"""Masks of exact counts, by budgets and by N:M patterns."""

import pytest
import torch
from torch import nn

from hesscurv import ParameterLayout
from hesscurv.pruning.targets import Pattern, make_budgets, next_mask
from hesscurv.pruning.weights import Weight

SEEDS = (0, 1, 2)
CPU = torch.device("cpu")
LAYOUT = ParameterLayout(("a.weight", "b.0.weight", "b.1.weight"), ((3, 7), (5, 3), (2, 8)))
STEPS = (0.2, 0.55, 0.55, 0.9, 1.0)


def kept_of(mask):
    return {name: int(part.sum()) for name, part in LAYOUT.split(mask).items()}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scope", ["global", "layer", {"a": 0.5, "b": 0.75}, {"b.1.weight": 0.3}])
def test_each_budget_is_met_exactly_at_every_step(scope, seed):
    scores = torch.rand(LAYOUT.numel, generator=torch.Generator().manual_seed(seed))
    budgets = make_budgets(LAYOUT, scope, 0.8, CPU)
    mask = torch.ones(LAYOUT.numel, dtype=torch.bool)
    for progress in STEPS:
        new = next_mask(scores, mask, budgets, progress)
        assert not bool((new & ~mask).any())
        for budget in budgets:
            n = len(budget.index)
            assert int(new[budget.index].sum()) == n - round(progress * budget.sparsity * n)
            kept, dropped = new[budget.index], ~new[budget.index]
            if bool(dropped.any()):
                assert scores[budget.index][kept].min() > scores[budget.index][dropped].max()
        covered = torch.cat([budget.index for budget in budgets])
        outside = torch.ones_like(mask).index_fill(0, covered, False)
        assert bool(new[outside].all())
        mask = new


def test_scopes_are_one_budget_or_one_each_or_as_told():
    assert [b.name for b in make_budgets(LAYOUT, "global", 0.5, CPU)] == ["all weights"]
    assert [b.name for b in make_budgets(LAYOUT, "layer", 0.5, CPU)] == list(LAYOUT.names)
    budgets = make_budgets(LAYOUT, {"b": 0.25, "a.weight": 0}, 0.5, CPU)
    assert [(b.name, b.sparsity, len(b.index)) for b in budgets] == [
        ("b", 0.25, 31),
        ("a.weight", 0.0, 21),
    ]


def test_what_is_pruned_already_counts_and_stays():
    budgets = make_budgets(LAYOUT, "global", 0.5, CPU)
    mask = torch.arange(LAYOUT.numel) % 4 != 0
    scores = torch.arange(LAYOUT.numel).float().neg()  # the pruned ones would be kept
    new = next_mask(scores, mask, budgets, 1.0)
    assert int(new.sum()) == LAYOUT.numel - round(0.5 * LAYOUT.numel)
    assert not bool((new & ~mask).any())
    assert torch.equal(next_mask(scores, new, budgets, 0.2), new)


def test_of_equal_scores_the_first_are_kept():
    budgets = make_budgets(LAYOUT, "global", 0.5, CPU)
    mask = torch.ones(LAYOUT.numel, dtype=torch.bool)
    new = next_mask(torch.zeros(LAYOUT.numel), mask, budgets, 1.0)
    assert torch.equal(new, torch.arange(LAYOUT.numel) < 26)


def test_a_small_layer_may_end_up_empty():
    layout = ParameterLayout(("a",), ((1, 2),))
    budgets = make_budgets(layout, "layer", 0.9, CPU)
    mask = next_mask(torch.rand(2), torch.ones(2, dtype=torch.bool), budgets, 1.0)
    assert not bool(mask.any())


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("row", "expected scope 'global', 'layer' or a dict"),
        (0.5, "expected scope 'global', 'layer' or a dict"),
        ({"c": 0.5}, "'c' is no weight or module to prune; there are"),
        ({"b.0.weigh": 0.5}, "is no weight or module"),
        ({"b": 0.5, "b.1": 0.3}, "'b.1' names a weight twice"),
        ({"a": 1.0}, r"sparsity in \[0, 1\) for 'a', got 1.0"),
        ({"a": -0.1}, "got -0.1"),
        ({"a": float("nan")}, "got nan"),
        ({"a": True}, "got True"),
    ],
)
def test_scopes_that_cannot_be_are_refused(scope, message):
    with pytest.raises(ValueError, match=message):
        make_budgets(LAYOUT, scope, 0.5, CPU)


# -- patterns ---------------------------------------------------------------------------------

MODULES = {
    "conv": nn.Conv2d(8, 3, 3),
    "back": nn.ConvTranspose2d(8, 4, 2),
    "linear": nn.Linear(12, 5),
}
WEIGHTS = {name: Weight(module, "weight") for name, module in MODULES.items()}
PATTERNED = ParameterLayout(tuple(MODULES), tuple(tuple(m.weight.shape) for m in MODULES.values()))


def groups_of(mask, m):
    """By hand: neighbours along the input dimension, the first of a transposed convolution."""
    parts = PATTERNED.split(mask)
    moved = [parts["conv"].movedim(1, -1), parts["back"].movedim(0, -1), parts["linear"]]
    return torch.cat([part.reshape(-1, m) for part in moved])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("structure", ["2:4", "1:4", "3:4", "1:2"])
def test_patterns_hold_at_the_end_and_progress_in_step(structure, seed):
    pattern = Pattern.parse(structure)
    scores = torch.rand(PATTERNED.numel, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(PATTERNED.numel, dtype=torch.bool)
    in_all = PATTERNED.numel * (pattern.m - pattern.n) // pattern.m
    for progress in STEPS:
        new = pattern.next_mask(scores, mask, PATTERNED, WEIGHTS, progress)
        assert not bool((new & ~mask).any())
        assert int((~new).sum()) == round(progress * in_all)
        mask = new
    assert bool((groups_of(mask, pattern.m).sum(1) == pattern.n).all())
    # In each group the best are kept.
    best = groups_of(scores, pattern.m).topk(pattern.n, 1).values.sum(1)
    kept = groups_of(torch.where(mask, scores, 0), pattern.m).sum(1)
    torch.testing.assert_close(kept, best)


def test_what_a_pattern_finds_pruned_stays_pruned():
    pattern = Pattern(2, 4)
    before = torch.rand(PATTERNED.numel) < 0.5
    mask = pattern.next_mask(torch.rand(PATTERNED.numel), before, PATTERNED, WEIGHTS, 1.0)
    assert not bool((mask & ~before).any())
    had = groups_of(before, 4).sum(1)
    assert torch.equal(groups_of(mask, 4).sum(1), had.clamp(max=2))


def test_patterns_fit_where_m_divides_the_inputs():
    fits = {n: Pattern(2, 4).fits(w, tuple(w.module.weight.shape)) for n, w in WEIGHTS.items()}
    assert fits == {"conv": True, "back": True, "linear": True}
    assert not Pattern(2, 5).fits(WEIGHTS["linear"], (5, 12))
    assert not Pattern(2, 4).fits(Weight(nn.Linear(4, 4), "bias"), (4,))


@pytest.mark.parametrize("structure", ["2", "2:4:8", "a:b", "", 24, "-1:4", "2.0:4"])
def test_other_structures_are_refused(structure):
    with pytest.raises(ValueError, match="expected structure None or 'N:M'"):
        Pattern.parse(structure)


@pytest.mark.parametrize("structure", ["0:4", "4:4", "5:4"])
def test_patterns_that_keep_all_or_nothing_are_refused(structure):
    with pytest.raises(ValueError, match="expected 0 < N < M"):
        Pattern.parse(structure)


def test_no_structure_is_no_pattern():
    assert Pattern.parse(None) is None
