"""Embeddings whose gradients are none of the loss are named, with what mends them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator
from hesscurv.operators.checks.references import AsymmetryError

OPERATORS = [HessianOperator, GGNOperator, EmpiricalFisherOperator]
TASK = hesscurv.supervised(nn.CrossEntropyLoss())
BATCH = (torch.arange(18).view(6, 3) % 7, torch.tensor([0, 1, 2, 0, 1, 2]))


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4, **options), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.words(x)).flatten(1))


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(7, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.words(x)))


class Functional(nn.Module):
    """An embedding that is called as a function, with an attribute for its option."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(7, 4)), nn.Linear(12, 3)
        self.scale_grad_by_freq = True

    def forward(self, x):
        rows = F.embedding(x, self.table, scale_grad_by_freq=self.scale_grad_by_freq)
        return self.head(rows.flatten(1))


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_padding_row_that_is_used_is_named(kind):
    net = Words(padding_idx=1).double()
    with torch.no_grad():
        net.words.weight[1] = torch.randn(4).double()
    with pytest.warns(UserWarning, match=r"padding_idx=1 in module 'words' \(Embedding\)") as seen:
        kind(net, TASK, [BATCH])
    assert len(seen) == 1
    assert seen[0].filename == __file__
    net.words.padding_idx = None
    kind(net, TASK, [BATCH])  # without a warning, which would be an error


def test_a_padding_row_that_is_not_used_is_nothing_to_warn_of():
    tokens = BATCH[0].clamp(max=5)
    HessianOperator(Words(padding_idx=6).double(), TASK, [(tokens, BATCH[1])])


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("model", [Words, Bags])
def test_gradients_by_frequency_are_refused_by_name_and_the_remedy_works(model, kind):
    if (model, kind) == (Bags, HessianOperator):
        pytest.skip("bags have no second derivative")
    net = model(scale_grad_by_freq=True).double()
    with pytest.raises(AsymmetryError, match="scale_grad_by_freq=True in module 'words'") as caught:
        kind(net, TASK, [BATCH])
    assert "autograd.Function" not in str(caught.value)
    net.words.scale_grad_by_freq = False
    kind(net, TASK, [BATCH])


def test_a_call_of_the_function_is_found_too():
    net = Functional().double()
    match = r"scale_grad_by_freq=True in the model \(Functional\)"
    with pytest.raises(AsymmetryError, match=match):
        HessianOperator(net, TASK, [BATCH])


@pytest.mark.parametrize("kind", OPERATORS)
def test_rows_that_are_rescaled_are_named_and_the_remedy_works(kind):
    net = Words(max_norm=0.5).double()
    with pytest.warns(UserWarning, match=r"max_norm=0\.5 in module 'words'"):
        kind(net, TASK, [BATCH])
    with torch.no_grad():
        net(BATCH[0])  # rescales
    net.words.max_norm = None
    kind(net, TASK, [BATCH])


def test_a_bag_that_is_rescaled_is_refused_by_name():
    with pytest.raises(AsymmetryError, match=r"max_norm=0\.5 in module 'words' \(EmbeddingBag\)"):
        GGNOperator(Bags(max_norm=0.5).double(), TASK, [BATCH])
