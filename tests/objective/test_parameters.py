"""Parameters are selected in the model's order, tied ones once, and lie where the layout says."""

import pytest
import torch
from torch import nn

from hesscurv import ParameterLayout
from hesscurv.objective.parameters import layout_of, unwrap
from hesscurv.operators import select_parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        self.head = nn.Linear(2, 3)
        self.head.weight = self.embedding.weight


ALL = ["embedding.weight", "body.0.weight", "body.0.bias", "body.1.weight", "head.bias"]


def test_all_that_require_grad_are_selected_in_order_and_tied_ones_once():
    model = Tied()
    assert list(select_parameters(model)) == ALL
    model.body[0].bias.requires_grad_(False)
    assert list(select_parameters(model)) == [name for name in ALL if name != "body.0.bias"]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("body", ["body.0.weight", "body.0.bias", "body.1.weight"]),
        ("body.", ["body.0.weight", "body.0.bias", "body.1.weight"]),
        (["head.bias", "body.0.weight"], ["body.0.weight", "head.bias"]),
        (("body.1", "body.1.weight"), ["body.1.weight"]),
        ("head.weight", ["embedding.weight"]),
        ("head", ["embedding.weight", "head.bias"]),
        (lambda name, p: p.ndim == 1, ["body.0.bias", "head.bias"]),
        (lambda name, p: name.startswith("head"), ["head.bias"]),
    ],
)
def test_a_selection_by_name_is_in_the_models_order_and_under_first_names(params, expected):
    assert list(select_parameters(Tied(), params)) == expected


def test_a_selection_by_parameter_is_in_the_models_order():
    model = Tied()
    params = [model.head.bias, model.head.weight, model.body[0].bias]
    assert list(select_parameters(model, params)) == [
        "embedding.weight",
        "body.0.bias",
        "head.bias",
    ]
    assert list(select_parameters(model, model.body[1].parameters())) == ["body.1.weight"]
    assert list(select_parameters(model, model.head.bias)) == ["head.bias"]


def test_a_name_is_not_taken_for_the_beginning_of_another():
    model = nn.ModuleDict({"fc": nn.Linear(1, 1), "fc2": nn.Linear(1, 1)})
    assert list(select_parameters(model, "fc")) == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ("tail", ValueError, r"no parameter or submodule 'tail'; it has \['embedding.weight'"),
        ([], ValueError, "at least one name or parameter"),
        (nn.Linear(2, 2).weight, ValueError, "not one of the model's; pass names"),
        (lambda name, p: False, ValueError, r"selected none.*asked about \['embedding.weight'"),
        (3, TypeError, "names, parameters or a predicate.*got int"),
        ([3], TypeError, "names or parameters in `params`, got a int"),
        (nn.Linear(2, 2), TypeError, "names, parameters or a predicate"),
        (Tied().body, TypeError, "got a Linear"),
    ],
)
def test_what_is_no_selection_is_refused_with_a_remedy(params, error, message):
    with pytest.raises(error, match=message):
        select_parameters(Tied(), params)


def test_a_frozen_parameter_is_refused_where_it_is_asked_for():
    model = Tied()
    model.body[0].bias.requires_grad_(False)
    for params in ("body", ["body.0.bias"], [model.body[0].bias]):
        with pytest.raises(ValueError, match=r"got frozen \['body.0.bias'\]; call requires_grad_"):
            select_parameters(model, params)
    assert "body.0.bias" not in select_parameters(model, lambda name, p: True)


def test_a_model_that_is_all_frozen_is_refused_with_its_names_shortened():
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(10)]).requires_grad_(False)
    with pytest.raises(ValueError, match=r"'3.bias', ... \(20 in all\)\] are frozen"):
        select_parameters(model)


def test_complex_parameters_are_refused():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"real floating dtype, got torch.complex64"):
        select_parameters(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_parameters_without_entries_are_refused():
    with pytest.raises(ValueError, match="have no entries"):
        select_parameters(nn.Linear(0, 3, bias=False))


def test_wrappers_are_looked_through():
    model = Tied()
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    assert unwrap(wrapped) is model
    assert list(select_parameters(wrapped)) == ALL


# -- the layout -------------------------------------------------------------------------------


@pytest.fixture
def layout():
    return ParameterLayout(("a", "b", "c"), ((2, 3), (), (4,)))


def test_slices_follow_each_other(layout):
    assert layout.numel == 11
    assert layout.slices() == {"a": slice(0, 6), "b": slice(6, 7), "c": slice(7, 11)}


def test_splitting_and_flattening_are_inverses(layout):
    vector = torch.arange(11.0)
    pieces = layout.split(vector)
    assert [tuple(p.shape) for p in pieces.values()] == [(2, 3), (), (4,)]
    assert torch.equal(layout.flatten(pieces), vector)
    assert torch.equal(layout.flatten(dict(reversed(pieces.items()))), vector)


def test_splitting_a_vector_gives_views(layout):
    vector = torch.zeros(11)
    layout.split(vector)["b"].fill_(7)
    assert vector[6] == 7


def test_a_block_is_split_along_its_rows(layout):
    block = torch.arange(22.0).view(11, 2)
    pieces = layout.split(block)
    assert pieces["a"].shape == (2, 3, 2)
    assert torch.equal(pieces["a"][..., 1], layout.split(block[:, 1])["a"])


def test_the_vector_is_that_of_torchs_own_order():
    model = Tied()
    layout = layout_of(select_parameters(model))
    flat = nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(layout.flatten(dict(model.named_parameters())), flat)


def test_a_layout_survives_as_plain_data(layout):
    assert ParameterLayout.from_dict(layout.to_dict()) == layout
    assert layout.to_dict() == {"names": ["a", "b", "c"], "shapes": [[2, 3], [], [4]]}


def test_what_does_not_fit_the_layout_is_refused(layout):
    with pytest.raises(ValueError, match=r"shape \(11,\) or \(11, b\).*got \(12,\)"):
        layout.split(torch.ones(12))
    with pytest.raises(ValueError, match="a piece for parameter 'c'"):
        layout.flatten({"a": torch.ones(2, 3), "b": torch.ones(())})
    with pytest.raises(ValueError, match=r"shape \(2, 3\) for parameter 'a', got \(3, 2\)"):
        layout.flatten({"a": torch.ones(3, 2), "b": torch.ones(()), "c": torch.ones(4)})
    with pytest.raises(ValueError, match="2 names and 1 shapes"):
        ParameterLayout(("a", "b"), ((1,),))
    with pytest.raises(ValueError, match="distinct parameter names"):
        ParameterLayout(("a", "a"), ((1,), (1,)))
