"""What cannot be scored, or not be pruned after it, is refused with what to do."""

import warnings

import pytest
import torch
import torch_pruning as tp
from channels import TASK, build, data, graph_of, group_of, groups_of, random_pairs
from torch import nn
from torch.nn.utils import parametrizations, prune

import hesscurv
from hesscurv.integrations import EigenspaceImportance, FisherImportance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "obd"}, "expected kind"),
        ({"group_reduction": "joint"}, "expected group_reduction"),
        ({"normalizer": "median"}, "expected normalizer"),
        ({"normalizer": "sentinel_2"}, "expected normalizer"),
        ({"weights": "writers"}, "expected weights"),
        ({"kind": "leverage", "diagonal": torch.ones(3)}, "no diagonal"),
        ({"diagonal": torch.ones(3)}, "diagonal of shape"),
    ],
)
def test_unknown_options_are_refused(options, message):
    model = build("plain")
    with pytest.raises(ValueError, match=message):
        EigenspaceImportance(model, random_pairs(model), **options)


@pytest.mark.parametrize("options", [{"rows": "hessian"}, {"draws": 2}, {"chunk_size": 0}])
def test_unknown_rows_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        FisherImportance(build("plain"), TASK, data(), **options)


def test_wrong_types_are_refused():
    model = build("plain")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        EigenspaceImportance(model.forward, random_pairs(model))
    with pytest.raises(TypeError, match="Eigenpairs"):
        EigenspaceImportance(model, random_pairs(model).eigenvectors)
    bare = random_pairs(model)
    bare = hesscurv.Eigenpairs(
        bare.eigenvalues, bare.eigenvectors, bare.residuals, bare.converged, 0
    )
    with pytest.raises(ValueError, match="layout"):
        EigenspaceImportance(model, bare)


def test_costs_that_cannot_divide_are_refused():
    model = build("plain")
    for cost in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite costs"):
            EigenspaceImportance(model, random_pairs(model), costs={"conv1.weight": cost})
    importance = EigenspaceImportance(model, random_pairs(model), costs={"fc2.weight": 1.0})
    with pytest.raises(ValueError, match=r"costs of the channels in the group of conv1"):
        importance(group_of(model, "conv1"))


def test_nan_is_refused():
    model = build("plain")
    pairs, group = random_pairs(model), group_of(model, "conv1")
    pairs.eigenvectors[3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"expected finite scores for the group of conv1"):
        EigenspaceImportance(model, pairs)(group)
    batches = data()
    batches[0][0][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected finite scores"):
        FisherImportance(model, TASK, batches)(group)


@pytest.mark.parametrize("rows", ["fisher", "ggn"])
def test_a_loss_that_is_no_mean_over_samples_is_refused(rows):
    model = build("plain")
    weight = torch.tensor([1.0, 3.0, 0.5])
    # A weighted mean that is not known as one.
    task = hesscurv.supervised(lambda out, y: nn.functional.cross_entropy(out, y, weight.to(out)))
    batches = [(x, torch.arange(len(x)) % 3) for x, _ in data()]
    with pytest.raises(ValueError, match=r"mean of its samples' own, weighted by task\.weight"):
        FisherImportance(model, task, batches, rows=rows)(groups_of(model)[0])


def test_samples_without_any_weight_are_refused():
    model, task = build("plain"), hesscurv.supervised(nn.CrossEntropyLoss())
    task.weight = lambda batch: 0.0
    with pytest.raises(ValueError, match="at least one batch that has a weight"):
        FisherImportance(model, task, data())(groups_of(model)[0])


def test_ties_are_refused():
    model = build("plain")
    group = group_of(model, "conv2")
    with torch.no_grad():
        model.bn2.weight.zero_()
        model.bn2.bias.fill_(-1)  # no channel is ever active
        for layer in (model.conv2, model.fc1):
            layer.weight.zero_()
    with pytest.raises(ValueError, match=r"scores that differ within the group of conv2"):
        FisherImportance(model, TASK, data())(group)


def test_masked_and_computed_weights_are_refused():
    model = build("plain")
    group = group_of(model, "conv1")
    with torch.no_grad():
        prune.l1_unstructured(model.conv2, "weight", amount=0.4)
    importance = EigenspaceImportance(model, lambda m: random_pairs(m))
    with pytest.raises(ValueError, match=r"masked by torch.nn.utils.prune.*prune.remove"):
        importance(group)
    prune.remove(model.conv2, "weight")
    assert importance(group).shape == (5,)
    parametrizations.weight_norm(model.conv1)
    with pytest.raises(ValueError, match="computed from other parameters"):
        importance(group)


def test_torch_pruning_itself_breaks_masked_layers():
    # The reason for refusing them; once this no longer fails, they can be let through.
    model = build("plain")
    with torch.no_grad():
        prune.l1_unstructured(model.conv2, "weight", amount=0.4)
    group = graph_of(model).get_pruning_group(model.conv1, tp.prune_conv_out_channels, [0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reads the gradient of a tensor that has none
        group.prune()
    with pytest.raises((TypeError, RuntimeError, KeyError)):
        model(data()[0][0])


def test_a_group_of_another_model_is_refused():
    model, other = build("plain"), build("plain")
    importance = EigenspaceImportance(model, random_pairs(model))
    with pytest.raises(ValueError, match="not the model's"):
        importance(groups_of(other)[0])


def test_fixed_pairs_serve_one_step():
    model = build("plain")
    importance = EigenspaceImportance(model, random_pairs(model))
    graph = graph_of(model)
    graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [1]).prune()
    group = graph.get_pruning_group(model.conv2, tp.prune_conv_out_channels, list(range(4)))
    with pytest.raises(ValueError, match=r"pass a function"):
        importance(group)
