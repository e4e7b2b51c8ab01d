"""Scores of channels are the quadratic forms, over all entries that a channel takes along."""

import copy

import pytest
import torch
import torch_pruning as tp
from channels import (
    NETWORKS,
    TASK,
    build,
    data,
    entries_of_channels,
    flat,
    forms,
    graph_of,
    group_of,
    groups_of,
    random_pairs,
)
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv.integrations import EigenspaceImportance, FisherImportance


def sample_gradients(model, batches):
    rows = []
    for x, y in batches:
        for i in range(len(x)):
            loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros(p.numel(), dtype=p.dtype) if s is None else s.flatten()
                        for s, p in zip(slopes, model.parameters(), strict=True)
                    ]
                )
            )
    return torch.stack(rows)


def gauss_newton(model, batches):
    """The matrix by an explicit Jacobian of the outputs and the softmax's covariance."""
    total, count = 0, 0
    for x, _ in batches:
        for i in range(len(x)):
            out = model(x[i : i + 1])[0]
            jacobian = torch.stack(
                [
                    torch.cat(
                        [
                            torch.zeros(p.numel(), dtype=p.dtype) if s is None else s.flatten()
                            for s, p in zip(
                                torch.autograd.grad(
                                    z,
                                    list(model.parameters()),
                                    retain_graph=True,
                                    allow_unused=True,
                                ),
                                model.parameters(),
                                strict=True,
                            )
                        ]
                    )
                    for z in out
                ]
            )
            p = torch.softmax(out.detach(), 0)
            total = total + jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
            count += 1
    return total / count


@pytest.mark.parametrize("name", NETWORKS)
def test_eigenspace_scores_are_the_quadratic_form_of_the_whole_channel(name):
    model = build(name)
    pairs, w = random_pairs(model), flat(model)
    V, scale = pairs.eigenvectors, pairs.eigenvalues.abs()
    d = torch.rand(len(w), dtype=torch.float64)
    expected = {
        "joint": ({}, (V * scale) @ V.T),
        "diagonal": ({}, torch.diag((V**2) @ scale)),
        "residual": ({"diagonal": d}, (V * scale) @ V.T + d.diag()),
        "diagonal with residual": ({"kind": "diagonal", "diagonal": d}, None),
    }
    expected["diagonal"][0]["kind"] = "diagonal"
    for group in groups_of(model):
        masks = entries_of_channels(model, group)
        assert masks.any(1).all()
        for options, matrix in expected.values():
            if matrix is None:
                matrix = torch.diag((V**2) @ scale + d)
            scores = EigenspaceImportance(model, pairs, **options)(group)
            torch.testing.assert_close(scores, forms(matrix, w, masks))
        scores = EigenspaceImportance(model, pairs, kind="leverage")(group)
        torch.testing.assert_close(scores, (masks * V.square().sum(1)).sum(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_fisher_scores_are_a_loop_over_the_samples(name):
    model, batches = build(name), data()
    w, rows = flat(model), sample_gradients(model, batches)
    importance = FisherImportance(model, TASK, batches)
    for group in groups_of(model):
        masks = entries_of_channels(model, group)
        expected = 0.5 * (rows @ (masks * w).T).square().mean(0)
        torch.testing.assert_close(importance(group), expected)


def test_gauss_newton_rows_have_the_matrix_as_their_mean_square():
    model, batches = build("plain"), data((2,))
    group = group_of(model, "conv1")
    expected = forms(gauss_newton(model, batches), flat(model), entries_of_channels(model, group))
    importance = FisherImportance(model, TASK, batches, rows="ggn", draws=400, chunk_size=2)
    # 400 draws of a square, for two samples: a standard error of 5 % at most.
    torch.testing.assert_close(importance(group), expected, rtol=0.2, atol=0)


def test_rows_of_one_output_need_no_luck():
    # With one output a sign squares away: the mean square is the matrix, at any draw.
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    task = hesscurv.supervised(nn.MSELoss())
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, list(range(5)))
    G = hesscurv.GGNOperator(model, task, [(x, y)]) @ torch.eye(31, dtype=torch.float64)
    scores = FisherImportance(model, task, [(x, y)], rows="ggn")(group)
    torch.testing.assert_close(scores, forms(G, flat(model), entries_of_channels_of(group, model)))


def entries_of_channels_of(group, model):
    masks = torch.zeros(5, 31, dtype=torch.bool)
    for c in range(5):  # 0.weight (5, 4), 0.bias (5,), 2.weight (1, 5), 2.bias (1,)
        masks[c, 4 * c : 4 * c + 4] = masks[c, 20 + c] = masks[c, 25 + c] = True
    return masks


def test_grouped_convolutions_count_their_own_group():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1, bias=False), nn.Conv2d(6, 4, 1, groups=2, bias=False)
    ).double()
    pairs, w = random_pairs(model), flat(model)
    graph = graph_of(model)
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(6)))
    group_items = [item for item in group if item.dep.target.module is model[1]]
    masks = torch.zeros(6, len(w), dtype=torch.bool)
    for c in range(6):
        masks[c, 2 * c : 2 * c + 2] = True  # (6, 2)
        for row in range(2):  # (4, 3): outputs 2 g and 2 g + 1 read inputs 3 g .. 3 g + 2
            masks[c, 12 + 3 * (2 * (c // 3) + row) + c % 3] = True
    read = {item.dep.handler for item in group_items}
    assert tp.prune_conv_in_channels in read
    if tp.prune_conv_out_channels in read:  # torch-pruning couples the outputs, too
        pytest.skip("this torch-pruning couples both sides of a grouped convolution")
    matrix = (pairs.eigenvectors * pairs.eigenvalues.abs()) @ pairs.eigenvectors.T
    torch.testing.assert_close(EigenspaceImportance(model, pairs)(group), forms(matrix, w, masks))


def test_readers_remove_the_channel_by_themselves():
    model = build("plain")
    pairs, w = random_pairs(model), flat(model)
    slices = pairs.layout.slices()
    matrix = (pairs.eigenvectors * pairs.eigenvalues.abs()) @ pairs.eigenvectors.T
    x = data((4,))[0][0]
    for layer, reader, width in [
        ("conv1", "conv2.weight", 1),
        ("conv2", "fc1.weight", 4),
        ("fc1", "fc2.weight", 1),
    ]:
        group = group_of(model, layer)
        count = len(group[0].idxs)
        masks = torch.zeros(count, len(w), dtype=torch.bool)
        shape = dict(model.named_parameters())[reader].shape
        for c in range(count):
            part = torch.zeros(shape, dtype=torch.bool)
            part[:, c * width : (c + 1) * width] = True
            masks[c, slices[reader]] = part.flatten()
        scores = EigenspaceImportance(model, pairs, weights="readers")(group)
        torch.testing.assert_close(scores, forms(matrix, w, masks))
        for channel in (0, count - 1):
            without, pruned = copy.deepcopy(model), copy.deepcopy(model)
            with torch.no_grad():
                for p, m in zip(
                    without.parameters(), pairs.layout.split(masks[channel]).values(), strict=True
                ):
                    p[m] = 0
            name = {m: n for n, m in model.named_modules()}[group[0].dep.target.module]
            root = pruned.get_submodule(name)
            graph_of(pruned).get_pruning_group(root, group[0].dep.handler, [channel]).prune()
            torch.testing.assert_close(without(x), pruned(x))


def test_part_of_a_group_is_scored_in_the_order_given():
    model = build("plain")
    importance = EigenspaceImportance(model, random_pairs(model))
    graph = graph_of(model)
    whole = importance(graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, range(5)))
    part = importance(graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [3, 0, 2]))
    torch.testing.assert_close(part, whole[[3, 0, 2]])


def test_parameters_that_were_not_measured_count_nothing():
    model = build("plain")
    pairs = random_pairs(model, params=["conv1.weight", "conv1.bias"])
    importance = EigenspaceImportance(model, pairs)
    group, other = group_of(model, "conv1"), group_of(model, "conv2")
    masks = entries_of_channels(model, group)[:, : pairs.layout.numel]
    matrix = (pairs.eigenvectors * pairs.eigenvalues.abs()) @ pairs.eigenvectors.T
    w = flat(model)[: pairs.layout.numel]
    torch.testing.assert_close(importance(group), forms(matrix, w, masks))
    with pytest.raises(ValueError, match=r"none of the parameters .*bn2.* was measured"):
        importance(other)
