"""How scores of channels are reduced, normalised and divided by what a channel costs."""

import copy

import pytest
import torch
import torch_pruning as tp
from channels import EXAMPLE, build, entries_of_channels, group_of, groups_of, random_pairs

from hesscurv.integrations import EigenspaceImportance, macs_per_entry


def test_layers_are_reduced_as_asked():
    model = build("plain")
    pairs, group = random_pairs(model), group_of(model, "conv1")
    score = lambda how: EigenspaceImportance(model, pairs, group_reduction=how)(group)  # noqa: E731
    layers = score(None)
    assert layers.shape == (3, 5)  # conv1, bn1, conv2
    torch.testing.assert_close(score("mean"), layers.mean(0))
    torch.testing.assert_close(score("max"), layers.amax(0))
    torch.testing.assert_close(score("prod"), layers.prod(0))
    torch.testing.assert_close(score("first"), layers[0])
    # Jointly is not one by one.
    assert not torch.allclose(score("sum"), layers.sum(0))


@pytest.mark.parametrize(
    "normalizer", [None, "sum", "mean", "max", "standarization", "gaussian", "sentinel_0.5", "lamp"]
)
def test_normalizers_are_those_of_torch_pruning(normalizer):
    model = build("plain")
    group, pairs = groups_of(model)[0], random_pairs(model)
    raw = EigenspaceImportance(model, pairs)(group)
    scores = EigenspaceImportance(model, pairs, normalizer=normalizer)(group)
    theirs = tp.importance.GroupMagnitudeImportance(normalizer=normalizer)
    expected = theirs._normalize(raw.float(), normalizer)  # lamp makes float32
    torch.testing.assert_close(scores.float(), expected, rtol=1e-5, atol=1e-6)


def test_a_normalizer_may_be_a_function():
    model = build("plain")
    group, pairs = groups_of(model)[0], random_pairs(model)
    scores = EigenspaceImportance(model, pairs, normalizer=torch.log)(group)
    torch.testing.assert_close(scores, EigenspaceImportance(model, pairs)(group).log())


@pytest.mark.parametrize("name", ["plain", "residual", "dense", "depthwise"])
def test_costs_are_the_multiply_adds_that_a_channel_takes_along(name):
    model = build(name)
    costs, pairs, example = (
        macs_per_entry(model, EXAMPLE.double()),
        random_pairs(model),
        EXAMPLE.double(),
    )
    per_entry = torch.cat(
        [
            torch.full((p.numel(),), costs.get(name, 0.0), dtype=torch.float64)
            for name, p in model.named_parameters()
        ]
    )
    first = next(n for n, p in model.named_parameters() if p.ndim == 4)
    assert costs[first] == 36  # images of 6 x 6
    assert macs_per_entry(model, torch.cat([example] * 3)) == costs
    for group in groups_of(model):
        plain = EigenspaceImportance(model, pairs)(group)
        scores = EigenspaceImportance(model, pairs, costs=costs)(group)
        expected = plain / (entries_of_channels(model, group) * per_entry).sum(1)
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def test_a_transposed_kernel_meets_every_input_once():
    assert macs_per_entry(build("depthwise"), EXAMPLE.double())["up.weight"] == 36


def test_counting_leaves_the_model_alone():
    model = build("plain").train()
    state = copy.deepcopy(model.state_dict())
    macs_per_entry(model, EXAMPLE.double())
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
