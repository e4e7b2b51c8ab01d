import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hesscurv.pruning.attention import prepare_attention_
from hesscurv.pruning.masks.global_pruning import curvature_global
from hesscurv.pruning.masks.methods import curvature_unstructured
from hesscurv.pruning.masks.sparse_files import load_sparse, save_sparse
from hesscurv.pruning.masks.state_dicts import (
    apply_masks_,
    dense_state_dict,
    load_pruned_,
    masks_of,
)
from hesscurv.pruning.weights import current_parameter, find_weights, pruned_weights


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 4, 3),
            norm=nn.BatchNorm2d(4),
            flat=nn.Flatten(),
            fc=nn.Linear(16, 3),
        )
    ).double()
    model(torch.randn(8, 1, 4, 4, dtype=torch.float64))  # running statistics of its own
    return model.eval()


def pruned_network(seed=0, amount=0.5):
    model = network(seed)
    weights = find_weights(model).values()
    curvature_global(weights, amount, {w: torch.rand(w.module.weight.shape) for w in weights})
    return model


X = torch.arange(32.0, dtype=torch.float64).view(2, 1, 4, 4).sin()


def structure(model):
    return {
        path: (
            [(n, id(p)) for n, p in module._parameters.items()],
            list(module._buffers),
            list(module._forward_pre_hooks.items()),
            [
                h._pruning_methods
                for h in module._forward_pre_hooks.values()
                if hasattr(h, "_pruning_methods")
            ],
        )
        for path, module in model.named_modules()
    }


def assert_same_state(a, b):
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_dense_state_dict_makes_a_dense_model_compute_the_same():
    model, dense = pruned_network(), network(1)
    state = dense_state_dict(model)
    assert set(state) == set(dense.state_dict())
    dense.load_state_dict(state)
    assert torch.equal(dense(X), model(X))
    assert int((state["fc.weight"] == 0).sum()) == int((model.fc.weight_mask == 0).sum())
    assert state._metadata == model.state_dict()._metadata


def test_a_dense_models_state_dict_is_its_own():
    model = network()
    assert_same_state(dense_state_dict(model), model.state_dict())
    assert_same_state(dense_state_dict(torch.compile(model, backend="eager")), model.state_dict())


def test_a_models_own_buffers_may_be_called_masks():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.register_buffer("causal_mask", torch.tensor([[-1.0, 2.0]]))
            self.register_buffer("scale_orig", torch.tensor(3.0))

    model = Causal()
    curvature_unstructured(model, "weight", 1, torch.arange(4.0).view(2, 2))
    assert set(dense_state_dict(model)) == {"weight", "causal_mask", "scale_orig"}
    other = Causal()
    load_pruned_(other, model.state_dict())
    assert_same_state(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("target", ["dense", "pruned", "pruned by torch"])
def test_a_pruned_state_dict_loads_into_dense_and_pruned_models(target):
    source = pruned_network()
    model = pruned_network(1, 0.25) if target == "pruned" else network(1)
    if target == "pruned by torch":
        prune.l1_unstructured(model.fc, "weight", 3)
    parameters = {n: id(current_parameter(*w)) for n, w in find_weights(model).items()}
    state = source.state_dict()
    load_pruned_(model, state)
    assert_same_state(masks_of(model), masks_of(source))
    assert torch.equal(model.fc.weight, source.fc.weight)  # before any forward
    assert torch.equal(copy.deepcopy(model)(X), source(X))
    assert torch.equal(model(X), source(X))
    assert {n: id(current_parameter(*w)) for n, w in find_weights(model).items()} == parameters
    assert_same_state(source.state_dict(), state)
    assert_same_state(dict(sorted(model.state_dict().items())), dict(sorted(state.items())))


def test_a_loaded_mask_stays_through_training_and_further_pruning():
    model = network(1)
    load_pruned_(model, pruned_network().state_dict())
    kept = masks_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    model(X)
    for name, mask in kept.items():
        assert torch.equal(find_weights(model)[name].module.weight != 0, mask)
    curvature_unstructured(model.fc, "weight", 0.5, torch.rand(3, 16))
    left = int(kept["fc.weight"].sum())
    assert int(masks_of(model)["fc.weight"].sum()) == left - round(0.5 * left)


def test_a_dense_state_dict_loads_under_the_masks_that_a_model_has():
    model, source = pruned_network(), network(1)
    masks = masks_of(model)
    load_pruned_(model, source.state_dict())
    assert_same_state(masks_of(model), masks)
    assert torch.equal(model.fc.weight_orig, source.fc.weight)
    assert torch.equal(model.fc.weight, source.fc.weight * masks["fc.weight"])


def test_masks_are_dropped_on_request():
    model, source = pruned_network(), network(1)
    parameter = current_parameter(model.fc, "weight")
    load_pruned_(model, source.state_dict(), keep_masks=False)
    assert masks_of(model) == {}
    assert not prune.is_pruned(model)
    assert torch.equal(model(X), source(X))
    assert model.fc.weight is parameter
    half = pruned_network()
    prune.remove(half.conv, "weight")
    model = pruned_network(2)
    load_pruned_(model, half.state_dict(), keep_masks=False)
    assert_same_state(masks_of(model), masks_of(half))
    assert torch.equal(model(X), half(X))


def test_dense_to_pruned_to_dense_gives_the_masked_weights_back():
    dense = network()
    masks = {"fc.weight": torch.rand(3, 16) > 0.5, "conv.bias": torch.tensor([True, False] * 2)}
    model = network(1)
    load_pruned_(model, dense.state_dict())
    apply_masks_(model, masks)
    back = network(2)
    load_pruned_(back, dense_state_dict(model))
    expected = dict(dense.state_dict())
    for name, mask in masks.items():
        expected[name] = expected[name] * mask
    assert_same_state(dict(back.state_dict()), expected)


def without(state, name):
    return {n: v for n, v in state.items() if n != name}


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda s: without(s, "norm.bias"), ValueError, r"lacks \['norm.bias'\] \(1 in all\)"),
        (lambda s: {**s, "head.weight": X}, ValueError, r"has \['head.weight'\]"),
        (lambda s: {f"module.{n}": v for n, v in s.items()}, ValueError, "prefix"),
        (
            lambda s: {**s, "fc.bias": torch.ones(4)},
            ValueError,
            r"\(3,\) for 'fc.bias', got \(4,\)",
        ),
        (lambda s: {**s, "fc.weight_mask": torch.ones(3, 1)}, ValueError, "'fc.weight_mask'"),
        (lambda s: {**s, "fc.weight_mask": s["fc.weight_mask"] / 2}, ValueError, "zeros and ones"),
        (lambda s: {**s, "fc.bias": [1.0]}, ValueError, "tensor for 'fc.bias', got list"),
        (lambda s: list(s), TypeError, "got list"),
        (
            lambda s: {
                **without(s, "norm.running_mean"),
                "norm.running_mean_orig": torch.ones(4),
                "norm.running_mean_mask": torch.ones(4),
            },
            ValueError,
            "'running_mean'|'norm.running_mean'",
        ),
    ],
)
@pytest.mark.parametrize("make", [network, pruned_network])
def test_a_state_dict_that_does_not_fit_changes_nothing(make, break_it, error, message):
    model = make(1)
    before, values = structure(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        load_pruned_(model, break_it(pruned_network().state_dict()))
    assert structure(model) == before
    assert_same_state(model.state_dict(), values)


@pytest.mark.parametrize("keep_masks", [True, False])
@pytest.mark.parametrize("make", [network, pruned_network])
@pytest.mark.parametrize("load", [network, pruned_network])
def test_an_error_while_loading_changes_nothing(monkeypatch, load, make, keep_masks):
    model = make(1)
    before, values = structure(model), copy.deepcopy(model.state_dict())
    weight = model.fc.weight.detach().clone()
    loading = nn.Module.load_state_dict

    def fail_at_the_end(self, *args, **kwargs):
        loading(self, *args, **kwargs)
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(nn.Module, "load_state_dict", fail_at_the_end)
    with pytest.raises(RuntimeError, match="on fire"):
        load_pruned_(model, load().state_dict(), keep_masks=keep_masks)
    assert structure(model) == before
    assert_same_state(model.state_dict(), values)
    assert torch.equal(model.fc.weight, weight)


def test_masks_are_applied_on_top_of_those_that_are_there():
    model = network()
    first = {"fc.weight": torch.arange(48).view(3, 16) % 2 == 0}
    second = {
        "fc.weight": torch.arange(48).view(3, 16) % 3 == 0,
        "norm.weight": torch.arange(4) > 0,
    }
    apply_masks_(model, {})
    assert masks_of(model) == {}
    apply_masks_(model, first)
    assert_same_state(masks_of(model), first)
    apply_masks_(model, second)
    expected = {
        "norm.weight": torch.arange(4) > 0,
        "fc.weight": torch.arange(48).view(3, 16) % 6 == 0,
    }
    assert_same_state(masks_of(model), expected)
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    other = network()
    apply_masks_(other, masks_of(model))
    assert torch.equal(other(X), model(X))


GOOD = torch.zeros(3, 16, dtype=torch.bool)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"fc.weight": GOOD, "conv.weight": GOOD}, ValueError, "'conv.weight'"),
        ({"fc.weight": GOOD, "conv.wait": GOOD}, ValueError, "'conv.wait'"),
        ({"fc.weight": GOOD, "conv": GOOD}, ValueError, "full names.*'conv'"),
        ({"fc.weight": GOOD.double()}, TypeError, "float64"),
        ({"fc.weight": 1}, TypeError, "got int"),
        (GOOD, TypeError, "got Tensor"),
    ],
)
@pytest.mark.parametrize("make", [network, pruned_network])
def test_wrong_masks_change_nothing(make, masks, error, message):
    model = make()
    before, values = structure(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        apply_masks_(model, masks)
    assert structure(model) == before
    assert_same_state(model.state_dict(), values)


def test_a_module_that_occurs_twice_is_saved_and_loaded_under_both_names(tmp_path):
    def twice(seed):
        torch.manual_seed(seed)
        shared = nn.Linear(4, 4).double()
        return nn.Sequential(shared, nn.Tanh(), shared)

    model, x = twice(0), X.view(8, 4)
    apply_masks_(model, {"2.weight": torch.eye(4).bool()})
    assert list(masks_of(model)) == ["0.weight"]
    dense, pruned = twice(1), twice(2)
    dense.load_state_dict(dense_state_dict(model))
    load_pruned_(pruned, model.state_dict())
    assert torch.equal(dense(x), model(x))
    assert torch.equal(pruned(x), model(x))
    save_sparse(model, tmp_path / "model")
    load_pruned_(pruned, load_sparse(tmp_path / "model", masks=True))
    assert torch.equal(pruned(x), model(x))
    assert_same_state(masks_of(pruned), masks_of(model))
    with pytest.raises(ValueError, match="two different ones"):
        apply_masks_(twice(0), {"0.weight": torch.eye(4) > 0, "2.weight": torch.eye(4) < 1})


def test_masks_of_an_attention_are_loaded_into_one_that_was_not_prepared():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double().eval()
    other = copy.deepcopy(model)
    prepare_attention_(model)
    for weight in find_weights(model).values():
        curvature_unstructured(*weight, 0.5, torch.rand_like(current_parameter(*weight)))
    load_pruned_(other, model.state_dict())
    assert_same_state(masks_of(other), masks_of(model))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        for weight in pruned_weights(other).values():
            current_parameter(*weight).mul_(2)
        for weight in pruned_weights(model).values():
            current_parameter(*weight).mul_(2)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("amount", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_a_sparse_file_holds_the_masked_model(tmp_path, amount):
    model = pruned_network(amount=amount)
    size = save_sparse(model, tmp_path / "model")
    assert size == (tmp_path / "model").stat().st_size
    dense = load_sparse(tmp_path / "model")
    assert_same_state(dense, dense_state_dict(model))
    assert all(
        a.dtype == b.dtype
        for a, b in zip(dense.values(), dense_state_dict(model).values(), strict=True)
    )
    other = network(1)
    load_pruned_(other, load_sparse(tmp_path / "model", masks=True))
    assert_same_state(masks_of(other), masks_of(model))
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("made_permanent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_a_sparse_file_is_as_small_as_values_and_bits_or_indices(
    tmp_path, sparsity, dtype, made_permanent
):
    layer = nn.Linear(300, 200, bias=False).to(dtype)
    curvature_unstructured(layer, "weight", sparsity, torch.rand(200, 300))
    kept = int(layer.weight_mask.sum())
    expected = layer.weight.detach().clone()
    if made_permanent:
        prune.remove(layer, "weight")
    size = save_sparse(layer, tmp_path / "layer")
    needed = kept * dtype.itemsize + min(60000 // 8, kept * 4)  # 60,000 entries need int32
    assert needed < size < needed + 2500  # names, shapes and torch's own format
    assert torch.equal(load_sparse(tmp_path / "layer")["weight"], expected)


def test_tied_tensors_and_integers_are_stored_once_and_exactly(tmp_path):
    model = nn.ModuleList([nn.Linear(100, 100), nn.Linear(100, 100), nn.BatchNorm1d(3)])
    model[1].weight = model[0].weight
    model[2].num_batches_tracked.fill_(2**40 + 1)
    assert save_sparse(model, tmp_path / "model") < 1.2 * 40_000
    assert_same_state(load_sparse(tmp_path / "model"), model.state_dict())


def test_sparse_files_are_checked(tmp_path):
    path = tmp_path / "model"
    save_sparse(network(), path)
    old = path.read_bytes()
    path.write_bytes(old[:-200] + b"\0" * 200)
    with pytest.raises(ValueError, match="damaged"):
        load_sparse(path)
    torch.save({}, path)
    with pytest.raises(ValueError, match="not a file of this library"):
        load_sparse(path)
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "none")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    path.write_bytes(old)
    with pytest.raises(TypeError, match="got dict for '_extra_state'"):
        save_sparse(Extra(2, 2), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
