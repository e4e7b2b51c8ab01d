"""Masks stay through training: by optimisers with state, compiled, and distributed."""

import time

import pytest
import torch
from mask_cases import OURS, linear, permuted_scores, two_layers
from torch import nn

from hesscurv.pruning.masks.global_pruning import curvature_global
from hesscurv.pruning.weights import current_mask, current_parameter, find_weights


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
        time.sleep(0.1)  # gloo's threads need the GIL once more, which the group's end would hold
        torch.distributed.destroy_process_group()
