import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hesscurv.pruning.global_pruning import curvature_global
from hesscurv.pruning.methods import (
    CurvatureNM,
    CurvatureStructured,
    CurvatureUnstructured,
    curvature_nm,
    curvature_structured,
    curvature_unstructured,
)
from hesscurv.pruning.weights import current_mask, current_parameter, find_weights

SEEDS = [0, 1, 2]


def linear(inputs=8, outputs=4, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).double()


def permuted_scores(shape, seed=0):
    """Distinct signed integers, so that no rounding and no tie matters."""
    numel = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(numel, generator=generator) - numel // 2).double().view(shape)


def lowest_by_sorting(scores, alive, count):
    """The mask without the `count` lowest of what is alive, one Python number after the other."""
    flat, kept = scores.flatten().tolist(), alive.flatten().tolist()
    order = sorted((i for i in range(len(flat)) if kept[i]), key=lambda i: (flat[i], -i))
    for i in order[:count]:
        kept[i] = False
    return torch.tensor(kept).view(scores.shape)


def lowest_slices_by_sorting(scores, alive, dim, count):
    mask = alive.clone()
    sums = {
        i: sum(s for s, a in zip(row.flatten().tolist(), live.flatten().tolist(), strict=True) if a)
        for i, (row, live) in enumerate(
            zip(scores.movedim(dim, 0), alive.movedim(dim, 0), strict=True)
        )
        if live.any()
    }
    for i in sorted(sums, key=lambda i: (sums[i], -i))[:count]:
        mask.movedim(dim, 0)[i] = False
    return mask


def n_of_m_by_sorting(scores, alive, n, m, dim=1):
    mask = alive.clone().movedim(dim, -1).contiguous()
    rows = mask.view(-1, mask.shape[-1])
    values = scores.movedim(dim, -1).reshape(rows.shape)
    for row, value in zip(rows, values, strict=True):
        for start in range(0, len(row), m):
            group = [i for i in range(start, start + m) if row[i]]
            for i in sorted(group, key=lambda i: -value[i])[n:]:
                row[i] = False
    return mask.movedim(-1, dim)


OURS = {
    "unstructured": lambda m, s: curvature_unstructured(m, "weight", 0.5, s),
    "structured": lambda m, s: curvature_structured(m, "weight", 0.5, 0, s),
    "structured inputs": lambda m, s: curvature_structured(m, "weight", 2, 1, s),
    "n:m": lambda m, s: curvature_nm(m, "weight", 2, 4, s),
}
EXPECTED = {
    "unstructured": lambda s, a: lowest_by_sorting(s, a, round(0.5 * int(a.sum()))),
    "structured": lambda s, a: lowest_slices_by_sorting(s, a, 0, round(0.5 * int(a.any(1).sum()))),
    "structured inputs": lambda s, a: lowest_slices_by_sorting(s, a, 1, 2),
    "n:m": lambda s, a: n_of_m_by_sorting(s, a, 2, 4),
}
TORCHS = {
    "l1": lambda m: prune.l1_unstructured(m, "weight", 0.25),
    "random": lambda m: prune.random_unstructured(m, "weight", 5),
    "ln": lambda m: prune.ln_structured(m, "weight", 1, n=2, dim=0),
    "random structured": lambda m: prune.random_structured(m, "weight", 1, dim=1),
    "custom": lambda m: prune.custom_from_mask(m, "weight", (torch.rand(m.weight.shape) > 0.3)),
    "identity": lambda m: prune.identity(m, "weight"),
}


def state_of(module):
    """All that pruning could change, by identity and by value."""
    return {
        "parameters": [(n, id(p), p.detach().clone()) for n, p in module._parameters.items()],
        "buffers": [(n, id(b), b.clone()) for n, b in module._buffers.items()],
        "hooks": list(module._forward_pre_hooks.items()),
        "methods": [
            list(h) if isinstance(h, prune.PruningContainer) else h
            for h in module._forward_pre_hooks.values()
        ],
        "weight": (id(module.weight), module.weight.detach().clone()),
    }


def assert_unchanged(module, before):
    after = state_of(module)
    assert str(after) == str(before)  # ids and values, to printed precision
    for key in ("parameters", "buffers"):
        for (_, _, a), (_, _, b) in zip(after[key], before[key], strict=True):
            assert torch.equal(a, b)


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


@pytest.mark.parametrize("theirs", TORCHS)
@pytest.mark.parametrize("method", OURS)
def test_ours_composes_onto_torchs(method, theirs):
    layer, scores = linear(), permuted_scores((4, 8))
    TORCHS[theirs](layer)
    alive = layer.weight_mask.bool()
    OURS[method](layer, scores)
    assert torch.equal(current_mask(layer, "weight"), EXPECTED[method](scores, alive))
    assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    assert len(layer._forward_pre_hooks) == 1


@pytest.mark.parametrize("theirs", TORCHS)
@pytest.mark.parametrize("method", OURS)
def test_torchs_composes_onto_ours(method, theirs):
    layer, scores = linear(), permuted_scores((4, 8))
    OURS[method](layer, scores)
    alive = layer.weight_mask.bool()
    torch.manual_seed(3)
    TORCHS[theirs](layer)
    # What torch's method does on top of the same mask given by torch's own means.
    reference = prune.custom_from_mask(linear(), "weight", alive)
    torch.manual_seed(3)
    TORCHS[theirs](reference)
    assert torch.equal(layer.weight_mask, reference.weight_mask)
    assert torch.equal(layer.weight, reference.weight)


@pytest.mark.parametrize("second", OURS)
@pytest.mark.parametrize("first", OURS)
def test_ours_composes_onto_ours(first, second):
    layer = linear()
    scores, more = permuted_scores((4, 8)), permuted_scores((4, 8), 1)
    OURS[first](layer, scores)
    OURS[second](layer, more)
    alive = EXPECTED[first](scores, torch.ones(4, 8, dtype=torch.bool))
    assert torch.equal(current_mask(layer, "weight"), EXPECTED[second](more, alive))


@pytest.mark.parametrize("method", OURS)
def test_pruning_is_removed_and_copied_as_torchs(method):
    layer, scores = linear(), permuted_scores((4, 8))
    x = torch.randn(2, 8, dtype=torch.float64)
    OURS[method](layer, scores)
    OURS[method](layer, permuted_scores((4, 8), 1))
    masked = layer.weight.detach().clone()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight_orig.mul_(2)
    torch.testing.assert_close(twin(x) - twin.bias, 2 * (layer(x) - layer.bias))
    prune.remove(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, masked)
    assert [n for n, _ in layer.named_parameters()] == ["bias", "weight"]
    assert not list(layer.buffers())
    assert not layer._forward_pre_hooks


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


NAN = torch.full((4, 8), torch.nan)
FINE = torch.ones(4, 8)
WRONG = {
    "missing": (lambda m: CurvatureUnstructured.apply(m, "weight", 0.5), TypeError, "got none"),
    "missing, structured": (
        lambda m: curvature_structured(m, "weight", 0.5),
        TypeError,
        "got none",
    ),
    "nan": (lambda m: curvature_unstructured(m, "weight", 0.5, NAN), ValueError, "32 NaN"),
    "nan, n:m": (lambda m: curvature_nm(m, "weight", 2, 4, NAN), ValueError, "NaN"),
    "inf - inf": (
        lambda m: curvature_structured(m, "weight", 1, 1, FINE.cumsum(0).sub(2.5).mul(torch.inf)),
        ValueError,
        "both inf and -inf",
    ),
    "shape": (
        lambda m: curvature_unstructured(m, "weight", 0.5, torch.ones(8, 4)),
        ValueError,
        r"shape \(4, 8\).*got \(8, 4\)",
    ),
    "bool": (
        lambda m: curvature_unstructured(m, "weight", 0.5, FINE.bool()),
        TypeError,
        "torch.bool",
    ),
    "list": (lambda m: curvature_unstructured(m, "weight", 0.5, [1.0]), TypeError, "got list"),
    "amount": (lambda m: curvature_unstructured(m, "weight", 1.5, FINE), ValueError, "1.5"),
    "nan amount": (
        lambda m: curvature_unstructured(m, "weight", float("nan"), FINE),
        ValueError,
        "nan",
    ),
    "negative": (lambda m: curvature_unstructured(m, "weight", -1, FINE), ValueError, "-1"),
    "text": (lambda m: curvature_unstructured(m, "weight", "0.5", FINE), TypeError, "'0.5'"),
    "true": (lambda m: curvature_unstructured(m, "weight", True, FINE), TypeError, "True"),
    "too many": (lambda m: curvature_unstructured(m, "weight", 33, FINE), ValueError, "amount=33"),
    "slices": (lambda m: curvature_structured(m, "weight", 5, 0, FINE), ValueError, "amount=5"),
    "dim": (lambda m: curvature_structured(m, "weight", 1, 2, FINE), IndexError, "dim=2"),
    "dim type": (lambda m: curvature_structured(m, "weight", 1, 0.5, FINE), TypeError, "0.5"),
    "bias": (
        lambda m: curvature_structured(m, "bias", 1, 0, torch.ones(4)),
        ValueError,
        "two dimensions",
    ),
    "m": (lambda m: curvature_nm(m, "weight", 2, 5, FINE), ValueError, "m=5 divides"),
    "n > m": (lambda m: curvature_nm(m, "weight", 4, 2, FINE), ValueError, "n=4 and m=2"),
    "name": (lambda m: curvature_unstructured(m, "wait", 0.5, FINE), ValueError, "'wait'"),
    "no module": (lambda m: curvature_unstructured("m", "weight", 0.5, FINE), TypeError, "str"),
    "global, missing": (
        lambda m: curvature_global([(m, "weight"), (m, "bias")], 0.5, {(m, "weight"): FINE}),
        ValueError,
        "'bias' of Linear",
    ),
    "global, shape": (
        lambda m: curvature_global([(m, "weight")], 0.5, {(m, "weight"): FINE[0]}),
        ValueError,
        "shape",
    ),
    "global, nan": (
        lambda m: curvature_global([(m, "weight")], 0.5, {(m, "weight"): NAN}),
        ValueError,
        "NaN",
    ),
    "global, twice": (
        lambda m: curvature_global([(m, "weight")] * 2, 0.5, {(m, "weight"): FINE}),
        ValueError,
        "twice",
    ),
    "global, none": (lambda m: curvature_global([], 0.5, {}), ValueError, "got none"),
    "global, list": (
        lambda m: curvature_global([(m, "weight")], 0.5, [FINE]),
        TypeError,
        "got list",
    ),
    "global, too many": (
        lambda m: curvature_global([(m, "weight")], 99, {(m, "weight"): FINE}),
        ValueError,
        "amount=99",
    ),
}


@pytest.mark.parametrize("before", ["dense", "pruned by torch", "pruned twice"])
@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_leaves_the_module_as_it_was(wrong, before):
    layer = linear()
    if before != "dense":
        prune.l1_unstructured(layer, "weight", 0.25)
        layer(torch.ones(8, dtype=torch.float64))
    if before == "pruned twice":
        curvature_unstructured(layer, "weight", 1, permuted_scores((4, 8)))
    state = state_of(layer)
    call, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        call(layer)
    assert_unchanged(layer, state)


@pytest.mark.parametrize("pruned", [False, True])
def test_an_error_in_the_middle_restores_hooks_order_and_containers(monkeypatch, pruned):
    layers = [linear(), linear(seed=1)]
    for layer in layers if pruned else []:
        prune.l1_unstructured(layer, "weight", 0.25)
        prune.l1_unstructured(layer, "weight", 0.25)
    states = [state_of(layer) for layer in layers]
    register = nn.Module.register_forward_pre_hook

    def fail_on_the_second(module, hook, **kwargs):
        if module is layers[1]:
            raise KeyboardInterrupt
        return register(module, hook, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", fail_on_the_second)
    scores = {(layer, "weight"): permuted_scores((4, 8)) for layer in layers}
    with pytest.raises(KeyboardInterrupt):
        curvature_global(scores, 0.5, scores)
    with pytest.raises(KeyboardInterrupt):
        curvature_unstructured(layers[1], "weight", 0.5, FINE)
    for layer, state in zip(layers, states, strict=True):
        assert_unchanged(layer, state)


def test_a_hook_that_torch_dropped_is_given_back():
    layer = linear()
    prune.l1_unstructured(layer, "weight", 0.25)
    alive = layer.weight_mask.bool()
    with pytest.raises(ValueError, match="should be smaller"):
        prune.l1_unstructured(layer, "weight", 999)
    assert not layer._forward_pre_hooks
    scores = permuted_scores((4, 8))
    curvature_unstructured(layer, "weight", 4, scores)
    assert torch.equal(current_mask(layer, "weight"), lowest_by_sorting(scores, alive, 4))
    prune.remove(layer, "weight")


def two_layers():
    model = nn.Sequential(linear(8, 4), nn.Tanh(), linear(4, 4, seed=1))
    scores = permuted_scores((48,))
    weights = list(find_weights(model).values())
    return model, dict(zip(weights, [scores[:32].view(4, 8), scores[32:].view(4, 4)], strict=True))


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


def test_torchs_global_pruning_refuses_nan_and_methods_that_are_not_unstructured():
    model, scores = two_layers()
    for method, arguments in [
        (CurvatureNM, {"n": 2, "m": 4}),
        (CurvatureStructured, {"amount": 1}),
    ]:
        with pytest.raises(TypeError, match='Only "unstructured"'):
            prune.global_unstructured(list(scores), method, importance_scores=scores, **arguments)
    scores[(model[0], "weight")][1, 2] = torch.nan
    with pytest.raises(ValueError, match="1 NaN of 48"):
        prune.global_unstructured(
            list(scores), CurvatureUnstructured, importance_scores=scores, amount=0.5
        )


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
    ids=["SGD", "AdamW"],
)
@pytest.mark.parametrize("method", OURS)
def test_what_is_pruned_stays_zero_while_the_rest_is_trained(method, optimizer):
    layer = linear()
    step = optimizer(layer.parameters())
    x = torch.randn(16, 8, dtype=torch.float64)
    for epoch in range(6):
        if epoch == 2:  # the optimiser has momenta for all entries by now
            OURS[method](layer, permuted_scores((4, 8)))
            kept = layer.weight != 0
            start = layer.weight[kept].clone()
        step.zero_grad()
        (layer(x) - 1).square().sum().backward()
        step.step()
    y = layer(x)
    assert torch.equal(layer.weight != 0, kept)
    assert bool((layer.weight[kept] != start).all())
    torch.testing.assert_close(y, x @ (layer.weight_orig * kept).mT + layer.bias)
    assert current_parameter(layer, "weight") in step.state


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_pruned_and_trained(backend):
    model, scores = two_layers()
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(4, 8, dtype=torch.float64)
    compiled(x)
    assert list(find_weights(compiled)) == ["0.weight", "2.weight"]
    curvature_global(find_weights(compiled).values(), 0.5, scores)
    kept = {w: current_mask(*w) for w in scores}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        optimizer.step()
    first, second = (w.module.weight_orig * kept[w] for w in scores)
    expected = torch.tanh(x @ first.mT + model[0].bias) @ second.mT + model[2].bias
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_masks_stay_through_distributed_training(tmp_path, wrapped_first):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, scores = two_layers()
        wrap = nn.parallel.DistributedDataParallel
        parallel = wrap(model) if wrapped_first else None
        curvature_global(find_weights(parallel or model).values(), 0.5, scores)
        parallel = parallel or wrap(model)
        kept = {w: current_mask(*w) for w in scores}
        before = {w: w.module.weight.clone() for w in scores}
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1, weight_decay=0.1)
        x = torch.randn(4, 8, dtype=torch.float64)
        for _ in range(3):
            optimizer.zero_grad()
            parallel(x).square().sum().backward()
            optimizer.step()
        parallel(x)
        for weight, mask in kept.items():
            assert torch.equal(weight.module.weight != 0, mask)
            assert bool((weight.module.weight != before[weight])[mask].all())
    finally:
        torch.distributed.destroy_process_group()
