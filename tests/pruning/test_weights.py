import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hesscurv.pruning.attention import prepare_attention_
from hesscurv.pruning.masks.methods import curvature_unstructured
from hesscurv.pruning.weights import (
    Weight,
    as_dense_name,
    check_prunable,
    current_mask,
    current_parameter,
    find_weights,
    pruned_weights,
    refresh_,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2)


def network():
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "block": Block(),
            "rnn": nn.LSTM(4, 3),
            "scale": nn.LayerNorm([4, 4]),
            "fc": nn.Linear(4, 4),
        }
    ).double()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        return self.head(self.inner(self.embedding(index)))


def attention(**kwargs):
    return nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)}).double()


DEFAULT = [
    "embedding.weight",
    "block.conv.weight",
    "block.up.weight",
    "rnn.weight_ih_l0",
    "rnn.weight_hh_l0",
    "fc.weight",
]


def test_weights_of_two_dimensions_are_found_by_name_in_order():
    model = network()
    found = find_weights(model)
    assert list(found) == DEFAULT
    assert found["block.conv.weight"] == (model["block"].conv, "weight")
    assert hash(found["fc.weight"]) == hash((model["fc"], "weight"))
    assert {(model["fc"], "weight"): 1}[found["fc.weight"]] == 1


def test_frozen_weights_are_left_out_unless_named():
    model = network()
    model["fc"].weight.requires_grad_(False)
    assert list(find_weights(model)) == [n for n in DEFAULT if n != "fc.weight"]
    assert list(find_weights(model, "fc.weight")) == ["fc.weight"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("block", ["block.conv.weight", "block.up.weight"]),
        ("fc.bias", ["fc.bias"]),
        (["fc", "block.conv.weight"], ["block.conv.weight", "fc.weight"]),
        (["block.norm.weight", "block.conv"], ["block.conv.weight", "block.norm.weight"]),
        (lambda name, p: name.startswith("block") and p.shape[0] == 4, DEFAULT[1:3]),
    ],
)
def test_names_submodules_and_predicates_select(names, expected):
    assert list(find_weights(network(), names)) == expected


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("fd.weight", ValueError, "no parameter or submodule 'fd.weight'"),
        ("fc.weights", ValueError, "no parameter or submodule"),
        ("block.norm", ValueError, "'block.norm' has no weight of two dimensions"),
        ([], ValueError, "found none"),
        (lambda name, p: False, ValueError, "found none"),
        (3, TypeError, "got int"),
        ([nn.Parameter(torch.ones(2))], TypeError, "expected names"),
    ],
)
def test_wrong_selections_are_refused(names, error, message):
    with pytest.raises(error, match=message):
        find_weights(network(), names)


def test_pruned_weights_keep_their_dense_names():
    model = network()
    prune.l1_unstructured(model["fc"], "weight", 0.5)
    prune.l1_unstructured(model["rnn"], "weight_hh_l0", 0.5)
    assert list(find_weights(model)) == [*DEFAULT[:3], *DEFAULT[3:]]
    assert list(find_weights(model, "fc.weight_orig")) == ["fc.weight"]
    assert list(pruned_weights(model)) == ["rnn.weight_hh_l0", "fc.weight"]
    assert as_dense_name("fc.weight_orig") == "fc.weight"
    assert as_dense_name("fc.weight") == "fc.weight"


def test_wrappers_are_looked_through():
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(model, backend="eager")
    assert find_weights(compiled) == {"0.weight": Weight(model[0], "weight")}
    assert list(find_weights(nn.DataParallel(model))) == ["0.weight"]


def test_a_module_that_occurs_twice_is_one_weight():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    assert list(find_weights(model)) == ["0.weight"]
    assert find_weights(model, "2.weight") == {"0.weight": (shared, "weight")}


@pytest.mark.parametrize("names", [None, ["embedding", "inner"], lambda name, p: True])
def test_tied_weights_are_left_out_with_a_warning_that_names_both(names):
    with pytest.warns(UserWarning, match=r"'embedding.weight'.*'head.weight'") as caught:
        assert list(find_weights(Tied(), names)) == ["inner.weight"]
    assert len(caught) == 1


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_tied_weights_asked_for_by_name_are_refused(name):
    other = {"embedding.weight": "head.weight", "head.weight": "embedding.weight"}[name]
    with pytest.raises(ValueError, match=f"'{name}'.*same parameter as .*'{other}'"):
        find_weights(Tied(), name)


def test_a_weight_tied_to_a_pruned_one_is_found_out():
    model = Tied()
    prune.l1_unstructured(model.embedding, "weight", 0.5)
    with pytest.raises(ValueError, match="same parameter"):
        find_weights(model, "head.weight")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "part"),
    [
        (parametrizations.weight_norm, "0.parametrizations.weight.original1"),
        (parametrizations.orthogonal, "0.parametrizations.weight.original"),
        (nn.utils.weight_norm, "0.weight_v"),
        (nn.utils.spectral_norm, "0.weight_orig"),
    ],
)
def test_weights_computed_from_others_are_refused(wrap, part):
    model = nn.Sequential(wrap(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=r"left out.*'0.weight': it is computed"):
        assert list(find_weights(model)) == ["1.weight"]
    for name in ["0.weight", part]:
        with pytest.raises(ValueError, match="computed from other parameters"):
            find_weights(model, name)
    with pytest.raises(ValueError, match="computed from other parameters"):
        curvature_unstructured(model[0], "weight", 0.5, torch.ones(3, 3))
    assert list(find_weights(model, "0.bias")) == ["0.bias"]


def test_a_removed_parametrization_can_be_pruned():
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    parametrize.remove_parametrizations(layer, "weight")
    curvature_unstructured(layer, "weight", 4, torch.arange(9.0).view(3, 3))
    assert torch.equal(current_mask(layer, "weight"), torch.arange(9).view(3, 3) > 3)


def test_lazy_and_integer_weights_are_refused():
    lazy = nn.Sequential(nn.LazyLinear(3))
    for names in [None, "0.weight"]:
        with pytest.raises(ValueError, match="not initialised"):
            find_weights(lazy, names)
    whole = nn.Sequential(nn.Linear(2, 2))
    whole[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="int8"):
        find_weights(whole, "0.weight")
    with pytest.raises(ValueError, match="found none"):
        find_weights(whole)


def test_the_output_projection_of_an_unprepared_attention_is_refused():
    model = attention()
    with pytest.warns(UserWarning, match=r"out_proj.weight.*prepare_attention_"):
        assert list(find_weights(model)) == ["mha.in_proj_weight"]
    with pytest.raises(ValueError, match="prepare_attention_"):
        find_weights(model, "mha.out_proj.weight")
    with pytest.raises(ValueError, match="prepare_attention_"):
        check_prunable(model["mha"].out_proj, "weight")


def test_a_prepared_attention_is_pruned_throughout():
    model = attention()
    prepare_attention_(model)
    prepare_attention_(model)
    assert len(model["mha"]._forward_pre_hooks) == 1
    assert list(find_weights(model)) == ["mha.in_proj_weight", "mha.out_proj.weight"]
    assert list(find_weights(copy.deepcopy(model))) == list(find_weights(model))


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("copied", [False, True])
def test_a_pruned_attention_trains_and_infers_with_its_current_masked_weights(copied, kdim):
    model = attention(kdim=kdim)
    prepare_attention_(model)
    for weight in find_weights(model).values():
        curvature_unstructured(*weight, 0.5, torch.rand_like(current_parameter(*weight)))
    if copied:
        model = copy.deepcopy(model)
    mha = model["mha"]
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    key = x if kdim is None else torch.randn(3, 5, 6, dtype=torch.float64)
    inputs = (x, x, x) if kdim is None else (x, key, x)
    masks = {n: current_mask(*w) for n, w in find_weights(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        mha(*inputs)[0].square().sum().backward()
        optimizer.step()

    dense = attention(kdim=kdim)["mha"]
    for name, weight in find_weights(model).items():
        assert torch.equal(current_mask(*weight), masks[name])
        path, _, tensor = name.removeprefix("mha.").rpartition(".")
        with torch.no_grad():
            getattr(dense.get_submodule(path), tensor).copy_(
                current_parameter(*weight) * masks[name]
            )
    with torch.no_grad():
        dense.in_proj_bias.copy_(mha.in_proj_bias)
        dense.out_proj.bias.copy_(mha.out_proj.bias)
        for training in [True, False]:  # eval without gradients is the fast path
            expected = dense.train(training)(*inputs)[0]
            torch.testing.assert_close(mha.train(training)(*inputs)[0], expected)
        prune.remove(mha.out_proj, "weight")
        torch.testing.assert_close(mha(*inputs)[0], expected)


def test_a_pruned_encoder_layer_gives_the_same_in_eval_mode_without_gradients():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    prepare_attention_(layer)
    for weight in find_weights(layer).values():
        curvature_unstructured(*weight, 0.5, torch.rand_like(current_parameter(*weight)))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    trained = layer.train()(x)
    with torch.no_grad():
        for weight in find_weights(layer).values():
            current_parameter(*weight).mul_(1.5)
        stale = layer.eval()(x)
        for weight in find_weights(layer).values():
            current_parameter(*weight).div_(1.5)
        torch.testing.assert_close(layer.eval()(x), trained.detach())
    assert not torch.allclose(stale, trained)


def test_current_parameter_is_one_object_before_while_and_after_pruning():
    layer = nn.Linear(3, 2).double()
    parameter = current_parameter(layer, "weight")
    assert parameter is layer.weight
    assert current_mask(layer, "weight") is None
    curvature_unstructured(layer, "weight", 2, torch.arange(6).view(2, 3))
    assert current_parameter(layer, "weight") is parameter
    expected = torch.tensor([[False, False, True], [True, True, True]])
    assert torch.equal(current_mask(layer, "weight"), expected)
    prune.remove(layer, "weight")
    assert current_parameter(layer, "weight") is parameter
    with pytest.raises(ValueError, match="'weird' of a Linear"):
        current_parameter(layer, "weird")


def test_refresh_sets_the_masked_weight_and_can_be_copied():
    layer = nn.Linear(3, 2).double()
    prune.l1_unstructured(layer, "weight", 3)
    mask = layer.weight_mask.clone()
    with torch.no_grad():
        layer.weight_orig.copy_(torch.arange(1.0, 7.0).view(2, 3))
    refresh_(layer, "weight")
    assert torch.equal(layer.weight, torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3) * mask)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    refresh_(layer, "bias")  # not pruned: nothing to do


def test_a_pruned_recurrent_layer_computes_with_its_masked_weights():
    rnn, dense = nn.LSTM(4, 3).double(), nn.LSTM(4, 3).double()
    dense.load_state_dict(rnn.state_dict())
    for name in ["weight_ih_l0", "weight_hh_l0"]:
        scores = torch.rand(getattr(rnn, name).shape)
        curvature_unstructured(rnn, name, 0.5, scores)
        with torch.no_grad():
            getattr(dense, name).mul_(scores >= scores.flatten().sort().values[scores.numel() // 2])
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(copy.deepcopy(rnn)(x)[0], dense(x)[0])
    torch.testing.assert_close(rnn(x)[0], dense(x)[0])
