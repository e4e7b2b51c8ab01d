"""Unusual parameters: complex ones stored as reals, sparse gradients, empty and renormed ones."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}
WAYS = [(kind, way) for kind, operator in KINDS.items() for way in operator.ways]
# Those that trace take a second each.
MARKED = [
    pytest.param(k, w, marks=[pytest.mark.slow] if w.startswith("linearized") else [])
    for k, w in WAYS
]


class Fourier(nn.Module):
    """A filter whose complex weights lie at an odd offset of the flat vector."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(1))
        self.filter = nn.Parameter(torch.randn(9, 2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        spectrum = torch.fft.rfft(x) * torch.view_as_complex(self.filter)
        return self.head(torch.tanh(torch.fft.irfft(spectrum, n=16)) * self.scale)


class Tokens(nn.Module):
    """A table that is looked up in one of several ways, and a head after it."""

    def __init__(self, look_up):
        super().__init__()
        self.table = nn.Parameter(0.4 * torch.randn(7, 4))
        self.look_up, self.head = look_up, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.look_up(x, self.table)))


class Layered(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x).mean(1)))


class WithEmpty(nn.Module):
    """Parameters of no entries: used, unused, and between others."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.empty(0))
        self.map = nn.Linear(4, 3)
        self.second = nn.Parameter(torch.empty(3, 0))

    def forward(self, x):
        return self.map(x) + self.second.sum() + (self.second @ self.second.T).sum()


def numbers(width=4):
    return [(torch.randn(5, width).double(), torch.arange(5) % 3)]


def tokens():
    return [(torch.randint(7, (6, 3)), torch.arange(6) % 3)]


def differences(model, batches, vectors, h=1e-5):
    """Central differences of the gradient along each column; sparse gradients made dense."""
    params = list(model.parameters())
    (x, y), columns = batches[0], []

    def gradient():
        loss = F.cross_entropy(model(x), y)
        found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        return torch.cat([g.to_dense().reshape(-1) for g in found])

    for v in vectors.T:
        pieces, ends = v.split([p.numel() for p in params]), []
        for step in (h, -2 * h, h):
            with torch.no_grad():
                for p, piece in zip(params, pieces, strict=True):
                    p += step * piece.view_as(p)
            ends.append(gradient())
        columns.append((ends[0] - ends[1]) / (2 * h))
    return torch.stack(columns, 1)


def jacobian(outputs, params):
    rows = []
    for entry in outputs.flatten():
        row = torch.autograd.grad(
            entry, params, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.to_dense().reshape(-1) for g in row]))
    return torch.stack(rows)


def expected(kind, model, batches, vectors):
    if kind == "hessian":
        return differences(model, batches, vectors)
    params = list(model.parameters())
    x, y = batches[0]
    z = model(x)
    if kind == "fisher":
        J = jacobian(F.cross_entropy(z, y, reduction="none"), params)
        return J.T @ (J @ vectors) / len(y)
    J = jacobian(z, params)
    C = torch.autograd.functional.hessian(
        lambda flat: F.cross_entropy(flat.view_as(z), y), z.detach().flatten()
    )
    return J.T @ C @ (J @ vectors)


def check(kind, way, model, batches):
    model = model.double()
    operator = KINDS[kind](model, TASK, batches, way=way)
    vectors = torch.randn(operator.shape[0], 3).double()
    right = expected(kind, model, batches, vectors)
    # 1e-6: the truncation of the differences is near 1e-9.
    torch.testing.assert_close(operator @ vectors, right, rtol=1e-6, atol=1e-8)
    alone = operator @ vectors[:, 1]
    torch.testing.assert_close(alone, right[:, 1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_complex_weights_at_odd_offsets(kind, way):
    check(kind, way, Fourier(), numbers(16))


def test_eigenpairs_and_pruning_of_complex_weights():
    model, batches = Fourier().double(), numbers(16)
    pairs = hesscurv.eigsh(HessianOperator(model, TASK, batches), k=4, tol=1e-6)
    assert pairs.converged.all()
    residual = differences(model, batches, pairs.eigenvectors) - (
        pairs.eigenvectors * pairs.eigenvalues
    )
    assert float(residual.norm()) < 1e-4 * float(pairs.eigenvalues.norm())
    hesscurv.pruning.prune_model(model, TASK, batches, sparsity=0.3, stages=1)


@pytest.mark.parametrize("vectorize", [True, False])
def test_newton_steps_on_complex_weights(vectorize):
    model, ((x, y),) = Fourier().double(), numbers(16)
    optimizer = hesscurv.optim.NewtonCG(
        model.parameters(), rank=3, options=hesscurv.optim.NewtonOptions(vectorize=vectorize)
    )
    losses = [float(optimizer.step(lambda: F.cross_entropy(model(x), y))) for _ in range(4)]
    assert losses[-1] < losses[0]


SPARSE = {
    "Embedding": lambda: Layered(nn.Embedding(7, 4, sparse=True)),
    "embedding": lambda: Tokens(lambda x, w: F.embedding(x, w, sparse=True).mean(1)),
    "torch.embedding": lambda: Tokens(lambda x, w: torch.embedding(w, x, sparse=True).mean(1)),
    "gather": lambda: Tokens(lambda x, w: w.gather(0, x[:, :1].expand(-1, 4), sparse_grad=True)),
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients(kind, name):
    check(kind, "auto", SPARSE[name](), tokens())


@pytest.mark.parametrize(("kind", "way"), MARKED)
def test_sparse_gradients_by_every_way(kind, way):
    check(kind, way, SPARSE["Embedding"](), tokens())


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_a_sparse_bag_needs_no_second_derivative(kind):
    check(kind, "auto", Tokens(lambda x, w: F.embedding_bag(x, w, sparse=True)), tokens())


@pytest.mark.parametrize("name", SPARSE)
def test_what_uses_sparse_gradients(name):
    model, batches = SPARSE[name](), tokens()
    H = HessianOperator(model, TASK, batches)
    expected_loss = F.cross_entropy(model(batches[0][0]), batches[0][1]).item()
    loss, gradient = hesscurv.operators.loss_gradient.loss_and_gradient(H)
    assert gradient.shape == (H.shape[0],)
    assert loss == pytest.approx(expected_loss)
    hesscurv.pruning.prune_model(model, TASK, batches, sparsity=0.3, stages=1)
    model = SPARSE[name]()
    optimizer = hesscurv.optim.NewtonCG(model.parameters(), rank=3)
    x, y = batches[0]
    losses = [float(optimizer.step(lambda: F.cross_entropy(model(x), y))) for _ in range(4)]
    assert losses[-1] < losses[0]
    for module in model.modules():
        assert getattr(module, "sparse", True)  # as found


RENORMED = {
    "Embedding": lambda: Layered(nn.Embedding(7, 4, max_norm=0.8)),
    "embedding": lambda: Tokens(lambda x, w: F.embedding(x, w, max_norm=0.8).mean(1)),
    "first norm": lambda: Tokens(lambda x, w: F.embedding(x, w, None, 0.8, 1.0).mean(1)),
}


@pytest.mark.parametrize("name", RENORMED)
@pytest.mark.parametrize("kind", KINDS)
def test_renormed_embeddings_are_left_as_found(kind, name):
    model, batches = RENORMED[name]().double(), tokens()
    found = [p.detach().clone() for p in model.parameters()]
    operator = KINDS[kind](model, TASK, batches, check=False)
    vectors = torch.randn(operator.shape[0], 3).double()
    products = operator @ vectors
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), found, strict=True))
    model(batches[0][0])  # rescales the rows; the products were those of the rescaled ones
    renormed = KINDS[kind](model, TASK, batches, check=False)
    assert not torch.equal(next(model.parameters()), found[0])
    torch.testing.assert_close(renormed @ vectors, products, rtol=1e-5, atol=1e-8)


def test_a_forward_that_writes_to_its_parameters_is_refused():
    def write(x, w):
        with torch.no_grad():
            w.mul_(0.99)
        return F.embedding(x, w).mean(1)

    model = Tokens(write)
    found = model.table.detach().clone()
    with pytest.raises(ValueError, match=r"writes to \['table'\] in place"):
        HessianOperator(model, TASK, tokens())
    assert torch.equal(model.table, found)


@pytest.mark.parametrize(("kind", "way"), MARKED)
def test_parameters_without_entries(kind, way):
    check(kind, way, WithEmpty(), numbers())


def test_what_uses_parameters_without_entries():
    model, batches = WithEmpty().double(), numbers()
    H = HessianOperator(model, TASK, batches)
    pairs = hesscurv.eigsh(H, k=3)
    assert pairs.converged.all()
    assert int(hesscurv.magnitude_mask(model, 5).sum()) == 5
    hesscurv.trace(H, num_matvecs=4)
    scores = hesscurv.pruning.saliency(model, pairs, kind="obd")
    assert sum(s.numel() for s in scores.values()) == 12
    hesscurv.pruning.prune_model(model, TASK, batches, sparsity=0.3, stages=1)
    monitor = hesscurv.hooks.CurvatureMonitor(WithEmpty(), TASK, _floats(batches), k=2)
    monitor.measure(0)
    model = WithEmpty()
    optimizer = hesscurv.optim.NewtonCG(model.parameters(), rank=2)
    x, y = _floats(batches)[0]
    losses = [float(optimizer.step(lambda: F.cross_entropy(model(x), y))) for _ in range(3)]
    assert losses[-1] < losses[0]


def _floats(batches):
    return [(x.float(), y) for x, y in batches]


@pytest.mark.parametrize("layer", [nn.Tanh, nn.ReLU])
def test_forward_over_reverse_of_a_squared_loss(layer):
    # torch's forward mode writes to a zero that it made itself, and refuses to.
    model = nn.Sequential(nn.Linear(4, 5), layer(), nn.Linear(5, 2)).double()
    batches = [(torch.randn(6, 4).double(), torch.randn(6, 2).double())]
    task = hesscurv.supervised(nn.MSELoss())
    V = torch.randn(37, 3).double()
    products = HessianOperator(model, task, batches, way="vmapped") @ V
    torch.testing.assert_close(products, HessianOperator(model, task, batches, way="retained") @ V)
