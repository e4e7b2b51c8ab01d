"""Where a derivative is missing, the error names operation, module and a remedy that works."""

import re

import pytest
import torch
from networks import Once
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator
from hesscurv.operators.checks.missing_derivatives import MissingDerivativeError

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


class Bag(nn.Module):
    """Two bags, one within a module within another."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"bag": nn.EmbeddingBag(7, 4)})
        self.other = nn.EmbeddingBag(7, 4, mode="max")
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner["bag"](x) + self.other(x)))


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.centres = nn.Parameter(torch.randn(5, 4))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.cdist(torch.tanh(self.before(x)), self.centres))


class Fused(nn.Module):
    """Attention in a fused kernel that the model itself insists on."""

    def __init__(self):
        super().__init__()
        self.before, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.before(x).view(len(x), 1, 2, 8)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.head(F.scaled_dot_product_attention(h, h, h).flatten(1))


class Flex(nn.Module):
    """Flex attention, which has no backward pass at all on CPUs."""

    def __init__(self):
        super().__init__()
        self.before, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.before(x).view(len(x), 1, 1, 16)
        return self.head(flex_attention(h, h, h).flatten(1))


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(Once.apply(self.before(x)))


def tokens():
    return [(torch.arange(24).view(6, 4) % 7, TARGETS)]


def numbers():
    return [(torch.randn(6, 4), TARGETS)]


CASES = [
    (Bag, tokens, "embedding_bag in module 'inner.bag' (EmbeddingBag)", ["head"]),
    pytest.param(
        *(Distances, numbers, "cdist in the model (Distances)", ["head"]),
        marks=pytest.mark.skipif(torch.__version__ >= "2.14", reason="has the derivative"),
    ),
    (Fused, numbers, "scaled_dot_product_attention", ["head"]),
    (Custom, numbers, "Once in the model (Custom)", ["head"]),
]


@pytest.mark.parametrize(("model", "batches", "place", "kept"), CASES)
def test_the_error_names_operation_module_and_remedies_that_work(model, batches, place, kept):
    net, data = model(), batches()
    with pytest.raises(MissingDerivativeError) as caught:
        HessianOperator(net, TASK, data)
    text = str(caught.value)
    # Either bag is the first whose derivative is taken.
    assert place in text or (model is Bag and "embedding_bag in module 'other'" in text)
    assert f"params={kept}" in text
    assert "GGNOperator" in text
    assert caught.value.__cause__ is not None
    small = HessianOperator(net, TASK, data, params=kept)
    assert torch.isfinite(small @ torch.ones(small.shape[0])).all()
    for other in (GGNOperator, EmpiricalFisherOperator):
        full = other(net, TASK, data)
        assert torch.isfinite(full @ torch.ones(full.shape[0])).all()


def test_without_checks_the_first_product_explains_itself():
    operator = HessianOperator(Bag(), TASK, tokens(), check=False)
    with pytest.raises(
        MissingDerivativeError, match=r"embedding_bag in module .*params=\['head'\]"
    ):
        operator @ torch.ones(operator.shape[0])


@pytest.mark.skipif(torch.__version__ < "2.7", reason="attention of another name in its graph")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
def test_an_operation_without_any_derivative_leaves_the_parameters_after_it(kind):
    net, data = Flex(), numbers()
    with pytest.raises(
        MissingDerivativeError, match=r"no derivative .*params=\['head'\]"
    ) as caught:
        kind(net, TASK, data)
    assert "flex" in str(caught.value).lower()
    assert kind(net, TASK, data, params=["head"]).shape[0] == 51


def test_a_plain_callable_is_told_of_tasks_in_two_parts():
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(MissingDerivativeError, match=r"hesscurv.supervised\(loss\).*GGNOperator"):
        HessianOperator(Bag(), loss, tokens())


def test_a_loss_without_second_derivative_leaves_the_fisher():
    task = hesscurv.supervised(nn.MultiMarginLoss())
    net, data = nn.Linear(4, 3), numbers()
    for kind in (HessianOperator, GGNOperator):
        with pytest.raises(MissingDerivativeError) as caught:
            kind(net, task, data)
        assert "multi_margin_loss in the loss" in str(caught.value)
        assert "EmpiricalFisherOperator" in str(caught.value)
        assert "GGNOperator or" not in str(caught.value)
    assert EmpiricalFisherOperator(net, task, data).shape == (15, 15)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 8, 8) / 3)
        self.before, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        ends = torch.tensor([2, len(x)], dtype=torch.int32)
        h = torch._grouped_mm(self.before(x), self.experts, offs=ends)
        return self.head(torch.tanh(h))


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="a kernel of newer versions")
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_a_kernel_that_does_not_take_float64_asks_for_another_dtype(kind):
    net, data = Grouped(), numbers()
    with pytest.raises(ValueError, match="grouped_mm in the model") as caught:
        kind(net, TASK, data, compute_dtype=torch.float64)
    assert "compute_dtype=torch.float32" in str(caught.value)
    assert kind(net.double(), TASK, data, compute_dtype=torch.float32).dtype == torch.float32


def test_many_parameters_are_named_by_what_is_left_out():
    layers = [nn.Linear(4, 4) for _ in range(8)]
    net = nn.Sequential(nn.Sequential(nn.EmbeddingBag(7, 4), *layers), nn.Linear(4, 3))
    with pytest.raises(MissingDerivativeError) as caught:
        HessianOperator(net, TASK, tokens())
    shown = re.search(r"params=(lambda name, _: name not in \(.*?\))", str(caught.value))
    assert shown is not None, str(caught.value)
    operator = HessianOperator(net, TASK, tokens(), params=eval(shown[1]))
    assert "0.0.weight" not in operator.layout.names
    assert len(operator.layout.names) == 18


def test_the_model_is_as_before_after_an_error():
    net = Bag().train()
    net.zero_grad()
    with pytest.raises(MissingDerivativeError):
        HessianOperator(net, TASK, tokens())
    for module in net.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None for p in net.parameters())


def test_other_errors_of_a_model_stay_as_they_are():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(5, 3)

        def forward(self, x):
            return self.map(x)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        HessianOperator(Broken(), TASK, numbers())
    assert not isinstance(caught.value, MissingDerivativeError)


class Letters(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(x).log_softmax(-1)


def ctc(out, targets):
    lengths = torch.full((len(out),), out.shape[1]), torch.full((len(out),), targets.shape[1])
    return F.ctc_loss(out.transpose(0, 1), targets, *lengths)


@pytest.mark.parametrize(
    "task", [hesscurv.supervised(ctc), lambda model, b: ctc(model(b[0]), b[1])]
)
def test_a_loss_without_second_derivative_leaves_the_fisher_alone(task):
    data = [(torch.randn(3, 8, 4), torch.randint(1, 5, (3, 3)))]
    with pytest.raises(MissingDerivativeError, match="ctc_loss in the loss") as caught:
        HessianOperator(Letters(), task, data)
    assert "EmpiricalFisherOperator" in str(caught.value)
    assert "GGNOperator" not in str(caught.value)
    full = EmpiricalFisherOperator(Letters(), hesscurv.supervised(ctc), data)
    assert torch.isfinite(full @ torch.ones(full.shape[0])).all()
