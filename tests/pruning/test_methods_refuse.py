"""What is wrong is refused with a message, and leaves the module as it was, to the hook."""

import pytest
import torch
from mask_cases import linear, lowest_by_sorting, permuted_scores, two_layers
from torch import nn
from torch.nn.utils import prune

from hesscurv.pruning.masks.global_pruning import curvature_global
from hesscurv.pruning.masks.methods import (
    CurvatureNM,
    CurvatureStructured,
    CurvatureUnstructured,
    curvature_nm,
    curvature_structured,
    curvature_unstructured,
)
from hesscurv.pruning.weights import current_mask

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
