"""Importances through the steps of torch-pruning, to the end on real architectures."""

import pytest
import torch
import torch_pruning as tp
from channels import (
    EXAMPLE,
    TASK,
    CifarResNet,
    Dense,
    OwnAttention,
    ViT,
    build,
    data,
    graph_of,
    group_of,
    random_pairs,
)

import hesscurv
from hesscurv.integrations import EigenspaceImportance, FisherImportance


def test_a_function_is_called_once_for_each_state_of_the_model():
    model, calls = build("plain"), []

    def compute(given):
        calls.append([tuple(p.shape) for p in given.parameters()])
        return random_pairs(given)

    importance = EigenspaceImportance(model, compute)
    graph = graph_of(model)
    for group in graph.get_all_groups(ignored_layers=[model.fc2]):
        importance(group)
    assert len(calls) == 1
    graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [1]).prune()
    for group in graph.get_all_groups(ignored_layers=[model.fc2]):
        assert importance(group).shape == (len(group[0].idxs),)
    assert len(calls) == 2
    with torch.no_grad():
        model.fc1.weight.mul_(2)  # a step of training
    importance(group)
    assert len(calls) == 3


def test_a_failed_measurement_leaves_no_stale_scores():
    model, fails = build("plain"), []

    def compute(given):
        if fails:
            raise RuntimeError("no more")
        return random_pairs(given)

    importance, group = EigenspaceImportance(model, compute), group_of(model, "conv1")
    importance(group)
    with torch.no_grad():
        model.fc1.weight.mul_(2)
    fails.append(True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no more"):
            importance(group)


def test_scores_of_a_pruned_model_are_those_of_a_new_importance():
    model, batches = build("residual"), data()
    importance = FisherImportance(model, TASK, batches)
    graph = graph_of(model)
    importance(next(iter(graph.get_all_groups(ignored_layers=[model.head]))))
    graph.get_pruning_group(model.stem, tp.prune_conv_out_channels, [2]).prune()
    for group in graph.get_all_groups(ignored_layers=[model.head]):
        expected = FisherImportance(model, TASK, batches)(group)
        torch.testing.assert_close(importance(group), expected, rtol=0, atol=0)


def importances(model, batches):
    def compute(given):
        H = hesscurv.GGNOperator(given, TASK, batches, way="retained")
        return hesscurv.eigsh(H, k=3, method="single_pass", tol=0.5)

    return {
        "eigenspace": EigenspaceImportance(model, compute),
        "fisher": FisherImportance(model, TASK, batches),
        "ggn": FisherImportance(model, TASK, batches, rows="ggn", weights="readers"),
    }


@pytest.mark.parametrize("kind", ["eigenspace", "fisher", "ggn"])
@pytest.mark.parametrize("is_global", [True, False])
def test_iterative_pruning_reaches_the_ratio(kind, is_global):
    torch.manual_seed(0)
    model, batches = CifarResNet().eval(), data(dtype=torch.float32)
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE,
        importances(model, batches)[kind],
        global_pruning=is_global,
        pruning_ratio=0.5,
        max_pruning_ratio=0.9,
        iterative_steps=3,
        ignored_layers=[model.linear],
    )
    widths = lambda: sum(  # noqa: E731
        len(g[0].idxs) for g in pruner.DG.get_all_groups(ignored_layers=[model.linear])
    )
    before, seen = widths(), []
    for _ in range(3):
        pruner.step()
        seen.append(widths() / before)
        assert torch.isfinite(model(batches[0][0])).all()
    assert seen[0] > seen[1] > seen[2]
    assert seen[2] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind", ["eigenspace", "fisher", "ggn"])
@pytest.mark.parametrize("net", [lambda: ViT(16), lambda: ViT(16, own_attention=True), Dense])
def test_real_architectures_get_pruned(kind, net):
    torch.manual_seed(0)
    model, batches = net().eval(), data(dtype=torch.float32)
    given = [
        (p, p.ndim - 1) for n, p in model.named_parameters() if n in ("cls_token", "pos_embed")
    ]
    heads = {
        layer: module.heads
        for module in model.modules()
        if isinstance(module, OwnAttention)
        for layer in (module.q, module.k, module.v)
    }
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE,
        importances(model, batches)[kind],
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        unwrapped_parameters=given or None,
        num_heads=heads,
    )
    before = sum(p.numel() for p in model.parameters())
    pruner.step()
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    assert torch.isfinite(model(batches[0][0])).all()
