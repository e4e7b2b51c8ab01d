"""Ours and torch's own pruning go on top of each other, and come off in the same way."""

import copy

import pytest
import torch
from mask_cases import EXPECTED, OURS, linear, permuted_scores
from torch import nn
from torch.nn.utils import prune

from hesscurv.pruning.weights import current_mask

TORCHS = {
    "l1": lambda m: prune.l1_unstructured(m, "weight", 0.25),
    "random": lambda m: prune.random_unstructured(m, "weight", 5),
    "ln": lambda m: prune.ln_structured(m, "weight", 1, n=2, dim=0),
    "random structured": lambda m: prune.random_structured(m, "weight", 1, dim=1),
    "custom": lambda m: prune.custom_from_mask(m, "weight", (torch.rand(m.weight.shape) > 0.3)),
    "identity": lambda m: prune.identity(m, "weight"),
}


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
