import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hesscurv.pruning.attention import prepare_attention_
from hesscurv.pruning.masks.methods import curvature_nm
from hesscurv.pruning.masks.semi_structured import is_semi_structured, to_semi_structured_
from hesscurv.pruning.weights import find_weights, pruned_weights


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (1, 8)])
@pytest.mark.parametrize("layer", [nn.Linear(16, 3), nn.Conv2d(16, 3, 3)], ids=["Linear", "Conv2d"])
def test_what_is_pruned_n_of_m_is_semi_structured(layer, n, m):
    layer = type(layer)(*((16, 3) if isinstance(layer, nn.Linear) else (16, 3, 3)))
    curvature_nm(layer, "weight", n, m, torch.rand_like(layer.weight))
    assert is_semi_structured(layer.weight_mask, n, m)
    assert is_semi_structured(layer.weight, n, m)
    one_more = layer.weight_mask.clone()
    one_more[:, :m] = 1
    assert not is_semi_structured(one_more, n, m)


def test_the_check_knows_groups_dimensions_and_remainders():
    rows = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1]])
    assert is_semi_structured(rows)
    assert is_semi_structured(rows.bool().mT, dim=0)
    assert not is_semi_structured(rows.roll(1, 1).roll(1, 1)[:, :6])  # 6 entries are no fours
    assert not is_semi_structured(torch.tensor([[1, 1, 1, 0]]))
    # Three in a row across two groups are fine: groups do not overlap.
    assert is_semi_structured(torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0]]))
    with pytest.raises(ValueError, match="dim=1"):
        is_semi_structured(torch.ones(4))
    with pytest.raises(ValueError, match="n=4 and m=2"):
        is_semi_structured(rows, 4, 2)


def masked_model(dtype=torch.float16):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    curvature_nm(model[0], "weight", 2, 4, torch.rand(64, 64))
    return model


def test_a_model_elsewhere_than_on_cuda_is_refused_and_left_alone():
    model = masked_model()
    mask = model[0].weight_mask.clone()
    with pytest.raises(RuntimeError, match=r"CUDA device, got '0.weight' on cpu"):
        to_semi_structured_(model)
    assert torch.equal(model[0].weight_mask, mask)
    assert prune.is_pruned(model)


def test_a_model_without_semi_structured_masks_is_refused():
    with pytest.raises(ValueError, match=r"2:4 masks, found none"):
        to_semi_structured_(nn.Linear(8, 8))
    dense = prune.l1_unstructured(nn.Linear(8, 8), "weight", 1)
    with pytest.raises(ValueError, match=r"2:4 masks, found none"):
        to_semi_structured_(dense)


def stand_in_for_the_gpu(monkeypatch, convert):
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    monkeypatch.setattr(
        "hesscurv.pruning.masks.semi_structured._check_support", lambda name, p: None
    )


def test_masked_linear_layers_alone_are_converted_and_frozen(monkeypatch):
    stand_in_for_the_gpu(monkeypatch, torch.clone)
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(8, 4),
            "conv": nn.Conv2d(4, 4, 1),
            "odd": nn.Linear(8, 4),
            "mha": nn.MultiheadAttention(8, 2),
        }
    )
    prepare_attention_(model)
    for weight in find_weights(model, ["fc", "conv", "mha"]).values():
        curvature_nm(*weight, 2, 4, torch.rand_like(weight.module._parameters[weight.name]))
    prune.l1_unstructured(model["odd"], "weight", 1)
    masked = model["fc"].weight.clone()
    assert to_semi_structured_(model) == ["fc.weight"]
    assert torch.equal(model["fc"].weight, masked)
    assert dict(model["fc"].named_parameters())["weight"].requires_grad is False
    others = ["conv.weight", "odd.weight", "mha.in_proj_weight", "mha.out_proj.weight"]
    assert list(pruned_weights(model)) == others


def test_a_layer_that_cannot_be_converted_leaves_all_as_they_were(monkeypatch):
    def refuse_small(weight):
        if len(weight) < 8:
            raise RuntimeError("too small")
        return weight

    stand_in_for_the_gpu(monkeypatch, refuse_small)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    for layer in model:
        curvature_nm(layer, "weight", 2, 4, torch.rand_like(layer.weight))
    with pytest.raises(ValueError, match=r"'1.weight' of shape \(4, 8\).*too small"):
        to_semi_structured_(model)
    assert list(pruned_weights(model)) == ["0.weight", "1.weight"]


needs_sparse_cores = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs an NVIDIA GPU of compute capability 8.0 or later",
)


@pytest.mark.gpu
@needs_sparse_cores
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
def test_the_converted_model_computes_the_same():
    model = masked_model().cuda()
    x = torch.randn(64, 64, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        expected = model(x)
        assert to_semi_structured_(model) == ["0.weight"]
        # float16 products of 64 terms, summed in another order
        torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
    assert not prune.is_pruned(model)


@pytest.mark.gpu
@needs_sparse_cores
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
def test_dtypes_and_shapes_that_the_format_does_not_take_change_nothing():
    model = masked_model(torch.float64).cuda()
    with pytest.raises(TypeError, match="float64"):
        to_semi_structured_(model)
    small = curvature_nm(nn.Linear(4, 3).half().cuda(), "weight", 2, 4, torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        to_semi_structured_(small)
    assert prune.is_pruned(model)
    assert prune.is_pruned(small)
