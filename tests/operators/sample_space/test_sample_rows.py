"""Rows by sample: their products and Gram matrix are those of the dense matrix, for every model."""

import cases
import oracles
import pytest
import torch
from torch import nn

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator
from hesscurv.operators.sample_space.output_rows import NoRowsError, root_columns
from hesscurv.operators.sample_space.parameter_rows import OuterRows
from hesscurv.operators.sample_space.sample_rows import SampleRows

KINDS = {"ggn": GGNOperator, "fisher": EmpiricalFisherOperator}
# Batch statistics couple samples.
COUPLED = {"conv_bn_train"}
ALL = [
    (name, kind)
    for name in cases.CASES
    for kind in cases.kinds(name)
    if kind in KINDS and name not in COUPLED
]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # sums of some hundred terms in float64


def products_of(rows, dim, dtype=torch.float64):
    """R V of the identity, and the matrix R^T R that it makes."""
    R_nD = rows.apply(torch.eye(dim, dtype=dtype))
    return R_nD, R_nD.mT @ R_nD


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_the_rows_make_the_dense_matrix(name, kind):
    operator = cases.build(name).operator(KINDS[kind])
    expected = oracles.dense(name, kind)
    rows = SampleRows(operator)
    R_nD, matrix = products_of(rows, len(expected))
    scale = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(matrix / scale, expected / scale, **CLOSE)
    torch.testing.assert_close(rows.gram() / scale, R_nD @ R_nD.mT / scale, **CLOSE)
    weights_nk = torch.randn(len(R_nD), 3, dtype=torch.float64)
    torch.testing.assert_close(rows.combine(weights_nk), weights_nk.mT @ R_nD, **CLOSE)
    index = torch.randperm(len(expected))[:5]
    torch.testing.assert_close(rows.at(index), R_nD[:, index].clone(), **CLOSE)
    mask = torch.rand(len(expected)) < 0.5
    torch.testing.assert_close(rows.gram(mask), R_nD[:, mask] @ R_nD[:, mask].mT, **CLOSE)


@pytest.mark.parametrize("name", ["conv_bn", "tied_weights", "resnet"])
def test_little_memory_takes_layers_in_turn(name):
    operator = cases.build(name).operator(GGNOperator)
    whole = SampleRows(operator)
    assert whole._kept
    largest = max(whole._bytes.values())
    operator.products.local.micro_batches.plan = _with_budget(operator, int(largest))
    parts = SampleRows(operator)
    assert not parts._kept
    torch.testing.assert_close(parts.gram(), whole.gram(), **CLOSE)
    operator.products.local.micro_batches.plan = _with_budget(operator, int(largest) - 1)
    with pytest.raises(NoRowsError, match="expected rows of each parameter within"):
        SampleRows(operator)


def _with_budget(operator, budget):
    from dataclasses import replace

    return replace(operator.memory_plan, budget=budget)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(4, 1, 3, 2, 5), (4, 3, 1, 2, 5), (2, 2, 40, 3, 4)])
def test_factors_multiply_out(shape, is_transposed, monkeypatch):
    n, c, places, i, o = shape
    pieces = [
        (torch.randn(m, places, i).double(), torch.randn(m, c, places, o).double())
        for m in (n, n + 1)
    ]
    rows = OuterRows(*map(list, zip(*pieces, strict=True)), is_transposed=is_transposed)
    equation = "nti,ncto->ncio" if is_transposed else "nti,ncto->ncoi"
    R_nP = torch.cat([torch.einsum(equation, *p).flatten(2).flatten(0, 1) for p in pieces])
    for entries in (2**25, 7):  # all at once, and a few columns after others
        monkeypatch.setattr("hesscurv.operators.sample_space.parameter_rows._CHUNK", entries)
        monkeypatch.setattr("hesscurv.operators.sample_space.parameter_rows._PAIRS", entries)
        torch.testing.assert_close(torch.cat([r for _, r in rows.chunks()], 1), R_nP, **CLOSE)
        for pairs in (False, True):
            monkeypatch.setattr(OuterRows, "_pairs_are_cheaper", lambda self, p=pairs: p)
            gram = torch.zeros(len(R_nP), len(R_nP), dtype=torch.float64)
            rows.add_gram(gram)
            torch.testing.assert_close(gram, R_nP @ R_nP.mT, **CLOSE)
        V_kP = torch.randn(3, R_nP.shape[1], dtype=torch.float64)
        W_nk = torch.randn(len(R_nP), 3, dtype=torch.float64)
        for out in (False, True):
            monkeypatch.setattr(OuterRows, "_multiplying_out_is_cheaper", lambda self, o=out: o)
            product = torch.zeros(len(R_nP), 3, dtype=torch.float64)
            rows.add_products(product, V_kP)
            torch.testing.assert_close(product, R_nP @ V_kP.mT, **CLOSE)
            combined = torch.empty(3, R_nP.shape[1], dtype=torch.float64)
            rows.combine_into(combined, W_nk)
            torch.testing.assert_close(combined, W_nk.mT @ R_nP, **CLOSE)


# -- layers ---------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A layer used twice, an embedding tied to the output layer, a write in place."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(7, 6), nn.Embedding(3, 6)
        self.norm, self.layer = nn.LayerNorm(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(3).expand(ids.shape))
        x = x + torch.relu_(self.layer(self.norm(x)))
        x = self.layer(x).cumsum(1)  # tokens depend on each other
        return self.head(x).transpose(1, 2)


def token_problem():
    torch.manual_seed(0)
    ids, targets = torch.randint(0, 7, (4, 3)), torch.randint(0, 7, (4, 3))
    targets[0, 1] = -100
    return Shared().double(), nn.CrossEntropyLoss(), (ids, targets)


def image_problem():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, stride=2, dilation=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding="same", groups=2),  # no rule: sample by sample
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return (
        net.double(),
        nn.CrossEntropyLoss(),
        (torch.randn(5, 1, 8, 8).double(), torch.arange(5) % 3),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [token_problem, image_problem])
def test_layers_of_every_kind(make, kind):
    model, loss, batch = make()
    operator = KINDS[kind](model, hesscurv.supervised(loss), [batch])
    dense = operator.to_dense()
    _, matrix = products_of(SampleRows(operator), len(dense))
    torch.testing.assert_close(matrix, dense, **CLOSE)


def test_what_a_layer_hides_is_found_and_taken_sample_by_sample():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            # The layer's weight is used beside its call as well.
            return self.out(torch.tanh(self.layer(x)) * self.layer.weight.sum())

    torch.manual_seed(0)
    batch = (torch.randn(5, 3).double(), torch.randn(5, 2).double())
    operator = GGNOperator(Scaled().double(), hesscurv.supervised(nn.MSELoss()), [batch])
    rows = SampleRows(operator)
    assert not isinstance(rows._kept["layer.weight"], OuterRows)
    assert isinstance(rows._kept["out.weight"], OuterRows)
    torch.testing.assert_close(
        products_of(rows, operator.shape[0])[1], operator.to_dense(), **CLOSE
    )


def test_class_weights_and_ignored_targets_weigh_the_rows():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    batches = [
        (torch.randn(n, 4).double(), torch.tensor(([0, 1, 2, -100] * 3)[:n])) for n in (7, 3, 4)
    ]
    for kind in KINDS.values():
        operator = kind(net, hesscurv.supervised(loss), batches)
        _, matrix = products_of(SampleRows(operator), operator.shape[0])
        torch.testing.assert_close(matrix, operator.to_dense(), **CLOSE)


def test_nothing_of_the_model_is_changed():
    model, loss, batch = image_problem()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    operator = GGNOperator(model, hesscurv.supervised(loss), [batch])
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    SampleRows(operator).gram()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


# -- roots of the curvature in the outputs --------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 4, 3)])
def test_a_root_reproduces_a_block_diagonal_curvature(shape):
    torch.manual_seed(0)
    n, dim = shape[0], torch.Size(shape[1:]).numel()
    half = torch.randn(n, dim, 2, dtype=torch.float64)
    blocks = half @ half.mT

    def curvature(block):
        return (blocks @ block.reshape(len(block), n, dim, 1)).view(block.shape)

    columns = root_columns(curvature, torch.zeros(shape, dtype=torch.float64))
    assert len(columns) == 2  # its rank
    flat = columns.reshape(len(columns), n, dim)
    torch.testing.assert_close(torch.einsum("cnp,cnq->npq", flat, flat), blocks, **CLOSE)


def test_a_confident_classifier_has_rows():
    # In float32 the curvature of its outputs is rounding, with eigenvalues of both signs.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
    with torch.no_grad():
        net[2].weight *= 30
    x = torch.randn(40, 6)
    batch = (torch.cat([x, 1e-2 * x]), net(torch.cat([x, x])).argmax(1))
    operator = GGNOperator(net, hesscurv.supervised(nn.CrossEntropyLoss()), [batch])
    dense = operator.to_dense().double()
    matrix = products_of(SampleRows(operator), len(dense), torch.float32)[1]
    assert float((matrix - dense).norm() / dense.norm()) < 1e-5


def test_curvature_without_rows_is_refused():
    matrix = torch.ones(6, 6, dtype=torch.float64)  # couples samples
    z = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(NoRowsError, match="couples samples"):
        root_columns(lambda u: (u.reshape(len(u), 6) @ matrix).view(u.shape), z)
    with pytest.raises(NoRowsError, match="negative"):
        root_columns(lambda u: -u, z)
    problem = cases.build("mlp")
    with pytest.raises(NoRowsError, match="expected a GGNOperator or an EmpiricalFisherOperator"):
        SampleRows(problem.operator(HessianOperator))


def test_subclasses_with_a_forward_of_their_own_have_no_rule():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    net = nn.Sequential(Doubled(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = (torch.randn(5, 3).double(), torch.randn(5, 2).double())
    operator = GGNOperator(net, hesscurv.supervised(nn.MSELoss()), [batch])
    rows = SampleRows(operator)
    assert not isinstance(rows._kept["0.weight"], OuterRows)
    torch.testing.assert_close(
        products_of(rows, operator.shape[0])[1], operator.to_dense(), **CLOSE
    )
