"""Each sample's own gradient against a loop, and the Gauss-Newton matrix from its rows."""

import itertools
from math import prod

import cases
import oracles
import pytest
import torch
from torch import nn

import hesscurv
from hesscurv.objective.objective import Objective
from hesscurv.operators.sample_space import sample_gradients
from hesscurv.operators.sample_space.sample_gradients import (
    SampleGradients,
    one_by_one,
    output_roots,
    random_signs,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64
# Convolutions with batch norm, attention, dict batches and weights that sit out among them.
NETS = ("mlp", "relu_mlp", "conv_bn", "resnet", "dict_batches", "unused", "pruned")


def objective_of(p):
    objective = Objective(
        p.model, p.task, p.batches, p.params, training=False, compute_dtype=None, budget=None
    )
    objective.refresh()
    return objective


def values_of(objective):
    return dict(zip(objective.layout.names, objective.parameters(), strict=True))


def flat(values, objective):
    return torch.cat([values[name].flatten(1) for name in objective.layout.names], 1)


def by_loop(p, batch, scalar):
    """One backward pass a sample, through the model itself."""
    model = p.model.eval()
    params = [dict(model.named_parameters())[name] for name in p.selected()]
    rows = []
    for i in range(oracles._size(batch)):
        sample = oracles._sample(batch, i)
        value = scalar(p.outputs(model, sample), sample, i)
        slopes = torch.autograd.grad(value, params, allow_unused=True)
        rows.append(oracles._flat(slopes, params))
    return torch.stack(rows)


@pytest.mark.parametrize("name", NETS)
def test_rows_of_the_fisher_are_the_samples_own_gradients(name):
    p = cases.build(name)
    objective = objective_of(p)
    gradients = SampleGradients(objective)
    for batch in p.batches:
        with objective.environment():
            found = flat(gradients(values_of(objective), batch, None), objective)
        expected = by_loop(p, batch, lambda out, sample, i: p.output_loss(out, sample))
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", NETS)
def test_directions_combine_the_gradients_of_the_outputs(name):
    p = cases.build(name)
    objective = objective_of(p)
    batch = p.batches[0]
    with torch.no_grad():
        out = p.outputs(p.model.eval(), batch)
    directions = torch.randn(len(out), prod(out.shape[1:])).double()
    with objective.environment():
        found = SampleGradients(objective)(values_of(objective), batch, directions)
    expected = by_loop(p, batch, lambda out, sample, i: out.flatten() @ directions[i])
    torch.testing.assert_close(flat(found, objective), expected, **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
def test_the_mean_over_all_signs_of_the_rows_products_is_the_gauss_newton_matrix(name):
    p = cases.build(name)
    objective = objective_of(p)
    gradients = SampleGradients(objective)
    total, n = 0, sum(map(oracles._size, p.batches))
    with objective.environment():
        for batch in p.batches:
            with torch.no_grad():
                out = objective.outputs(objective.parameters(), batch)
            roots = output_roots(p.task, out, batch)
            for e in itertools.product((-1.0, 1.0), repeat=3):
                directions = roots @ torch.tensor(e).double()
                rows = flat(gradients(values_of(objective), batch, directions), objective)
                total = total + rows.T @ rows / 2**3 / n
    torch.testing.assert_close(total, oracles.dense(name, "ggn"), **CLOSE)


def test_gradients_are_taken_at_the_given_values_of_some_parameters():
    p = cases.build("mlp")
    objective = objective_of(p)
    moved = {"2.weight": values_of(objective)["2.weight"] + 0.5}
    with objective.environment():
        found = SampleGradients(objective)(moved, p.batches[0], None)
    assert list(found) == ["2.weight"]
    with torch.no_grad():
        p.model[2].weight += 0.5
    expected = by_loop(p, p.batches[0], lambda out, sample, i: p.output_loss(out, sample))
    part = objective.layout.slices()["2.weight"]
    torch.testing.assert_close(found["2.weight"].flatten(1), expected[:, part], **CLOSE)


@pytest.mark.parametrize("directed", [False, True])
def test_samples_taken_singly_give_the_same(directed):
    p = cases.build("dict_batches")
    objective = objective_of(p)
    batch = p.batches[0]
    directions = torch.randn(3, 4).double() if directed else None
    gradients, singly = SampleGradients(objective), SampleGradients(objective)
    singly._by_sample = one_by_one
    with objective.environment():
        expected = gradients(values_of(objective), batch, directions)
        found = singly(values_of(objective), batch, directions)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


class Branching(nn.Module):
    """A step that depends on the values of its input, which vmap refuses."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) * (1 + float(x.detach().sum() > 0))


def test_what_vmap_refuses_is_taken_singly_from_then_on(monkeypatch):
    batch = (torch.randn(4, 3).double(), torch.randint(3, (4,)))
    p = cases.supervised(Branching().double(), [batch])
    objective = objective_of(p)
    gradients = SampleGradients(objective)
    tried = []
    real = sample_gradients.vmapped
    gradients._by_sample = lambda *args: (tried.append(1), real(*args))[1]
    expected = by_loop(p, batch, lambda out, sample, i: p.output_loss(out, sample))
    with objective.environment():
        for _ in range(2):
            found = gradients(values_of(objective), batch, None)
            torch.testing.assert_close(flat(found, objective), expected, **CLOSE)
    assert len(tried) == 1


@pytest.mark.parametrize("floor", [0.0, 0.7])
def test_roots_square_to_the_losses_hessian_in_the_outputs_plus_the_floor(floor):
    outputs, targets = torch.randn(5, 3).double(), torch.randint(3, (5,))
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    found = output_roots(task, outputs, (outputs, targets), floor)
    probabilities = outputs.softmax(1)
    expected = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
    expected = expected + floor * torch.eye(3).double()
    torch.testing.assert_close(found @ found.mT, expected, **CLOSE)


def test_negative_curvature_of_the_loss_has_no_root():
    task = hesscurv.supervised(lambda z, y: (z**3).sum())
    z = torch.tensor([[1.0, -2.0]]).double()
    found = output_roots(task, z, (z, z))
    torch.testing.assert_close(
        found @ found.mT, torch.diag(torch.tensor([6.0, 0.0]))[None].double()
    )


def test_too_many_outputs_are_refused():
    z = torch.zeros(1, 33, 32)
    with pytest.raises(ValueError, match="at most 1024 outputs"):
        output_roots(hesscurv.supervised(nn.MSELoss()), z, (z, z))


def test_a_task_that_gives_no_loss_a_sample_is_refused():
    class Summed(hesscurv.Task):
        def outputs(self, model, batch):
            return model(batch[0])

        def loss(self, outputs, batch):
            return outputs.square().mean()

        def sample_losses(self, outputs, batch):
            return outputs.square()

    p = cases.build("mlp")
    p.task = Summed()
    objective = objective_of(p)
    with objective.environment(), pytest.raises(ValueError, match=r"shape \(1,\) for one sample"):
        SampleGradients(objective)(values_of(objective), p.batches[0], None)


def test_signs_are_the_same_for_any_dtype_and_fair():
    drawn = [
        random_signs((50, 20), torch.empty(0, dtype=dtype), torch.Generator().manual_seed(3))
        for dtype in (torch.float32, torch.float64)
    ]
    assert drawn[0].dtype == torch.float32
    assert torch.equal(drawn[0].double(), drawn[1])
    assert set(drawn[1].flatten().tolist()) == {-1.0, 1.0}
    # 1000 fair signs: a mean beyond four standard deviations comes once in 16,000.
    assert abs(float(drawn[1].mean())) < 4 / 1000**0.5


def test_a_loss_that_looks_at_its_values_has_rows_too():
    # GaussianNLLLoss branches on its variances, which vmap does not take.
    task = hesscurv.supervised(lambda z, t: nn.GaussianNLLLoss()(z, t, z.exp()))
    z, t = torch.randn(4, 2).double(), torch.randn(4, 2).double()
    roots = output_roots(task, z, (z, t))
    for i in range(len(z)):
        hessian = torch.autograd.functional.hessian(
            lambda row, i=i: nn.GaussianNLLLoss()(row[None], t[i : i + 1], row.exp()[None]), z[i]
        )
        values, vectors = torch.linalg.eigh(hessian)
        positive = (vectors * values.clamp(min=0)) @ vectors.T
        torch.testing.assert_close(roots[i] @ roots[i].T, positive)


def test_a_loss_without_second_derivative_asks_for_rows_of_the_fisher():
    task = hesscurv.supervised(nn.MultiMarginLoss())
    z, t = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="rows='fisher'"):
        output_roots(task, z, (z, t))


class Doubled(torch.autograd.Function):
    """Twice its input, and under vmap three times, as a wrong batching rule has it."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, slope):
        return 2 * slope

    @staticmethod
    def vmap(info, in_dims, x):
        return 3 * x, in_dims[0]


class Sometimes(nn.Module):
    """Goes wrong under vmap on long batches alone."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        h = self.fc(x[:, :3])
        return torch.tanh(Doubled.apply(h) if x.shape[1] > 3 else 2 * h)


@pytest.mark.parametrize("combined", [False, True])
def test_batches_that_vmap_gets_wrong_are_taken_one_by_one(combined, caplog):
    good = (torch.randn(4, 3).double(), torch.randint(3, (4,)))
    wrong = (torch.randn(4, 5).double(), torch.randint(3, (4,)))
    p = cases.supervised(Sometimes().double(), [good, wrong])
    objective = objective_of(p)
    gradients = SampleGradients(objective)
    directions = torch.randn(4, 3).double() if combined else None

    def scalar(out, sample, i):
        return (out.flatten() * directions[i]).sum() if combined else p.output_loss(out, sample)

    for batch, lines in ((good, 0), (wrong, 1), (good, 1)):
        with objective.environment(), caplog.at_level("INFO", "hesscurv.operators"):
            found = gradients(values_of(objective), batch, directions)
        torch.testing.assert_close(flat(found, objective), by_loop(p, batch, scalar), **CLOSE)
        said = [r for r in caplog.records if "differs" in r.getMessage()]
        assert len(said) == lines
