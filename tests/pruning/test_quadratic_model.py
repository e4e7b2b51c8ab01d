"""The quadratic model against dense matrices: what it computes, and what its rows average to."""

import itertools

import cases
import oracles
import pytest
import torch

from hesscurv import ParameterLayout
from hesscurv.linalg.woodbury import DiagonalBlock, KroneckerBlock, LowRankPlusBlocks
from hesscurv.objective.objective import Objective
from hesscurv.pruning.curvature import quadratic_model
from hesscurv.pruning.curvature.layer_inputs import input_covariances
from hesscurv.pruning.curvature.quadratic_model import (
    Measuring,
    QuadraticModel,
    measure_quadratic_model,
)
from hesscurv.pruning.curvature.sample_weights import weigh
from hesscurv.pruning.weights import find_weights

SEEDS = (0, 1, 2)
NAMES = ("0.weight", "2.weight")
# float64, sums of some dozen terms.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def setting(name="mlp"):
    """A small problem, its objective and its weights."""
    p = cases.build(name)
    weights = find_weights(p.model)
    p.names = list(weights)
    objective = Objective(
        p.model, p.task, p.batches, list(weights), training=False, compute_dtype=None, budget=None
    )
    objective.refresh()
    return p, objective, weights


def measure(objective, weights, batches, how, params=None, dense=None, seed=0):
    dense = dense or dict(zip(weights, objective.parameters(), strict=True))
    generator = torch.Generator().manual_seed(seed)
    return measure_quadratic_model(
        objective, weights, params or dense, batches, how, generator, dense
    )


def flat(values):
    return torch.cat([t.flatten() for t in values])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_change_is_the_dense_quadratic_form(seed):
    torch.manual_seed(seed)
    rows = [torch.randn(6, 20).double(), torch.randn(6, 15).double()]
    a = torch.randn(4, 4).double()
    a, scale, d = a @ a.T, torch.rand(5).double(), torch.rand(15).double() + 0.1
    K = torch.block_diag(
        torch.kron(torch.diag(scale), a) + 0.2 * torch.eye(20).double(), torch.diag(d)
    )
    matrix = LowRankPlusBlocks(rows, [KroneckerBlock(a, scale, 0.2), DiagonalBlock(d)])
    layout, R = ParameterLayout(NAMES, ((5, 4), (3, 5))), torch.cat(rows, 1)
    delta, r, g = (torch.randn(n).double() for n in (35, 6, 35))
    half = float(delta @ (R.T @ R + 0.3 * K) @ delta) / 2
    assert QuadraticModel(layout, matrix, 0.3).change(delta) == pytest.approx(half, rel=1e-10)
    model = QuadraticModel(layout, matrix, 0.3, r, g)
    expected = half + float(r @ R @ delta) + float(g @ delta)
    assert model.change(delta) == pytest.approx(expected, rel=1e-10)
    assert model.num_rows == 6


# -- rows -------------------------------------------------------------------------------------


def dense_rows(p, objective, weights, batch):
    """For one sample J (c, D), and its loss's Hessian in the outputs, by plain autograd."""
    named = dict(p.model.named_parameters())
    z = p.outputs(p.model, batch)
    jacobian = torch.stack(
        [
            flat(torch.autograd.grad(e, [named[n] for n in weights], retain_graph=True))
            for e in z.flatten()
        ]
    )
    C = torch.autograd.functional.hessian(lambda o: p.output_loss(o, batch), z.detach())
    return jacobian, C.reshape(z.numel(), z.numel())


def one_sample(p):
    x, y = p.batches[0]
    return (x[:1], y[:1])


@pytest.mark.parametrize("floor", [1e-6, 5.0])
def test_over_all_signs_the_rows_average_to_the_gauss_newton_matrix_with_its_floor(
    monkeypatch, floor
):
    p, objective, weights = setting()
    batch = one_sample(p)
    total = count = 0
    for signs in itertools.product([-1.0, 1.0], repeat=3):
        e = torch.tensor(signs).double().view(1, 3, 1)
        monkeypatch.setattr(quadratic_model, "random_signs", lambda *_, e=e: e)
        model = measure(objective, weights, [batch], Measuring(root_floor=floor))
        assert model.num_rows == 1
        assert not bool(model.residual.any())  # at the dense weights
        row = torch.cat(model.matrix.rows, 1)
        total, count = total + row.T @ row, count + 1
    J, C = dense_rows(p, objective, weights, batch)
    C = C + floor * C.trace() / 3 * torch.eye(3).double()  # relative to the mean eigenvalue
    torch.testing.assert_close(total / count, J.T @ C @ J, **CLOSE)


@pytest.mark.parametrize("seed", SEEDS)
def test_over_many_draws_the_rows_of_all_samples_average_to_the_gauss_newton_matrix(seed):
    p, objective, weights = setting()
    G, draws = oracles.dense_ggn(p), 100
    how = Measuring(rest="isotropic", root_floor=1e-9)
    generator = torch.Generator().manual_seed(seed)
    dense = dict(zip(weights, objective.parameters(), strict=True))
    total = torch.zeros_like(G)
    for _ in range(draws):
        model = measure_quadratic_model(objective, weights, dense, p.batches, how, generator, dense)
        R = torch.cat(model.matrix.rows, 1)
        total += R.T @ R
    # 100 draws of 7 samples: a relative error of about 1/sqrt(100) = 10 %, and three times it.
    assert float((total / draws - G).norm() / G.norm()) < 0.3


def test_fisher_rows_are_the_gradients_of_the_losses_and_lead_to_less_loss():
    p, objective, weights = setting()
    model = measure(objective, weights, p.batches, Measuring(rows="fisher"))
    R = torch.cat(model.matrix.rows, 1)
    torch.testing.assert_close(R.T @ R, oracles.dense_fisher(p), **CLOSE)
    torch.testing.assert_close(R.T @ model.residual, loss_gradient(p, weights), **CLOSE)


def loss_gradient(p, weights):
    n = sum(len(b[0]) for b in p.batches)
    loss = sum(len(b[0]) / n * p.loss(p.model, b) for b in p.batches)
    named = dict(p.model.named_parameters())
    return flat(torch.autograd.grad(loss, [named[name] for name in weights]))


def test_over_all_signs_the_first_order_term_is_the_losss_own(monkeypatch):
    p, objective, weights = setting()
    batch = one_sample(p)
    p.batches, total = [batch], 0
    for signs in itertools.product([-1.0, 1.0], repeat=3):
        e = torch.tensor(signs).double().view(1, 3, 1)
        monkeypatch.setattr(quadratic_model, "random_signs", lambda *_, e=e: e)
        model = measure(objective, weights, [batch], Measuring(target="loss"))
        total = total + torch.cat(model.matrix.rows, 1).T @ model.residual / 8
    torch.testing.assert_close(total, loss_gradient(p, weights), **CLOSE)


def test_over_all_signs_the_first_order_term_leads_back_to_the_dense_outputs(monkeypatch):
    p, objective, weights = setting()
    batch = one_sample(p)
    dense = dict(zip(weights, objective.parameters(), strict=True))
    params = {n: 0.7 * t for n, t in dense.items()}
    there = p.outputs(p.model, batch).detach()
    with torch.no_grad():
        for name, w in weights.items():
            w.module.weight.copy_(params[name])
    J, _ = dense_rows(p, objective, weights, batch)
    here = p.outputs(p.model, batch).detach()
    C = torch.autograd.functional.hessian(lambda o: p.output_loss(o, batch), there).view(3, 3)
    C = C + 5 * C.trace() / 3 * torch.eye(3).double()
    total = 0
    for signs in itertools.product([-1.0, 1.0], repeat=3):
        e = torch.tensor(signs).double().view(1, 3, 1)
        monkeypatch.setattr(quadratic_model, "random_signs", lambda *_, e=e: e)
        model = measure(objective, weights, [batch], Measuring(), params, dense)
        total = total + torch.cat(model.matrix.rows, 1).T @ model.residual / 8
    torch.testing.assert_close(total, J.T @ C @ (here - there)[0], **CLOSE)


@pytest.mark.parametrize("rows", ["ggn", "fisher"])
def test_how_samples_are_batched_does_not_matter(monkeypatch, rows):
    p, objective, weights = setting()
    how = Measuring(rows=rows)
    whole = measure(objective, weights, p.batches, how)
    monkeypatch.setattr(quadratic_model, "_samples_at_once", lambda _: 2)
    parts = measure(objective, weights, p.batches, how)
    for a, b in zip(whole.matrix.rows, parts.matrix.rows, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_samples_that_are_all_given_twice_change_nothing(monkeypatch):
    p, objective, weights = setting()
    ones = lambda shape, like, _: torch.ones(shape).to(like)  # noqa: E731
    monkeypatch.setattr(quadratic_model, "random_signs", ones)
    matrices = []
    for batches in (p.batches, 2 * p.batches):
        model = measure(objective, weights, batches, Measuring(root_floor=5.0))
        R = torch.cat(model.matrix.rows, 1)
        matrices.append(R.T @ R)
    torch.testing.assert_close(*matrices, **CLOSE)


# -- both kinds of rows -----------------------------------------------------------------------


def both_and_its_halves(seed):
    """Rows of each kind and of both, of the same random signs, away from the dense weights."""
    p, objective, weights = setting()
    dense = dict(zip(weights, objective.parameters(), strict=True))
    params = {n: 0.8 * t for n, t in dense.items()}
    args = objective, weights, params, p.batches
    generator = torch.Generator().manual_seed(seed)
    ggn = measure_quadratic_model(*args, Measuring(rows="ggn"), generator, dense)
    # Eigenpairs draw after the signs of the samples' rows.
    top = measure_quadratic_model(*args, Measuring(rows="eigenspace", rank=5), generator, dense)
    generator.manual_seed(seed)
    both = measure_quadratic_model(*args, Measuring(rows="both", rank=5), generator, dense)
    return p, both, ggn, top


@pytest.mark.parametrize("seed", SEEDS)
def test_both_kinds_of_rows_count_one_half_each(seed):
    _, both, ggn, top = both_and_its_halves(seed)
    R, R_ggn, R_top = (torch.cat(m.matrix.rows, 1) for m in (both, ggn, top))
    torch.testing.assert_close(R.T @ R, (R_ggn.T @ R_ggn + R_top.T @ R_top) / 2, **CLOSE)
    assert float(R_ggn.norm()) > 0.1
    assert float(R_top.norm()) > 0.1
    # Eigenpairs have no first-order term.
    assert not bool(top.residual.any())
    assert bool(ggn.residual.any())
    torch.testing.assert_close(R.T @ both.residual, R_ggn.T @ ggn.residual / 2, **CLOSE)


def test_both_kinds_of_rows_cost_the_samples_and_two_gradients_a_product(monkeypatch):
    products = []
    rows_of = quadratic_model.eigenspace_rows

    def counted(*args):
        rows, count = rows_of(*args)
        products.append(count)
        return rows, count

    monkeypatch.setattr(quadratic_model, "eigenspace_rows", counted)
    p, both, ggn, top = both_and_its_halves(0)
    n = sum(len(x) for x, _ in p.batches)
    assert products[0] == products[1] >= 5
    assert (ggn.cost, top.cost) == (n, 2 * products[0] * n)
    assert both.cost == n + 2 * products[0] * n


# -- the rest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_kronecker_rest_has_the_rows_trace_by_layer_and_output(name, seed):
    p, objective, weights = setting(name)
    how = Measuring(damping=1e-2)
    model = measure(objective, weights, p.batches, how, seed=seed)
    covariances = input_covariances(
        objective,
        objective.parameters(),
        weigh(objective, p.batches),
        weights,
        how.largest_block,
    )
    for (w, block), rows in zip(
        zip(weights, model.matrix.blocks, strict=True), model.matrix.rows, strict=True
    ):
        squares, outputs = rows.square().sum(0), len(weights[w].module.weight)
        damping = how.damping * squares.mean()
        by_output = squares.view(outputs, -1).sum(1)
        expected = by_output.clamp(min=1e-2 * float(by_output.mean()))
        found = (block.diagonal() - damping).view(outputs, -1).sum(1)
        torch.testing.assert_close(found, expected, **CLOSE)
        # Within an output it is the inputs' covariance.
        unit = torch.randn(block.numel).double()
        dense = (
            torch.kron(
                torch.diag(expected / covariances[w].diagonal(dim1=1, dim2=2).sum()),
                covariances[w][0],
            )
            + damping * torch.eye(block.numel).double()
        )
        torch.testing.assert_close(block.multiply(unit), dense @ unit, **CLOSE)


def with_readers_at_zero(inputs):
    """The model of a net whose last layer does not read some outputs of the first."""
    p, objective, weights = setting()
    params = dict(zip(weights, objective.parameters(), strict=True))
    params["2.weight"] = params["2.weight"].clone()
    params["2.weight"][:, inputs] = 0
    model = measure(objective, weights, p.batches, Measuring(damping=0.1), params, params)
    return model.matrix.blocks[0], [part.square().sum(0) for part in model.matrix.rows]


def test_an_output_without_gradient_has_a_hundredth_of_the_mean_scale():
    block, (squares, _) = with_readers_at_zero([0])
    by_output = squares.view(5, 4).sum(1)
    assert float(by_output[0]) == 0
    found = (block.diagonal() - 0.1 * squares.mean()).view(5, 4).sum(1)
    expected = torch.cat([0.01 * by_output.mean()[None], by_output[1:]])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_layer_without_gradient_is_damped_by_a_thousandth_of_the_mean_of_all():
    block, squares = with_readers_at_zero(slice(None))
    assert not bool(squares[0].any())
    expected = 0.1 * 1e-3 * torch.cat(squares).mean()
    torch.testing.assert_close(block.diagonal(), expected.expand(20), **CLOSE)


def test_the_diagonal_rest_is_the_rows_mean_square_and_damping():
    p, objective, weights = setting()
    model = measure(objective, weights, p.batches, Measuring(rest="diagonal", damping=0.1))
    for block, rows in zip(model.matrix.blocks, model.matrix.rows, strict=True):
        squares = rows.square().sum(0)
        torch.testing.assert_close(block.diagonal(), squares + 0.1 * squares.mean(), **CLOSE)


def test_the_isotropic_rest_is_one_number():
    p, objective, weights = setting()
    model = measure(objective, weights, p.batches, Measuring(rest="isotropic"))
    mean = torch.cat(model.matrix.rows, 1).square().sum(0).mean()
    for block in model.matrix.blocks:
        torch.testing.assert_close(block.diagonal(), mean.expand(block.numel), **CLOSE)


def test_a_loss_that_does_not_depend_on_the_weights_is_refused():
    p, objective, weights = setting()
    zeros = {n: torch.zeros_like(t) for n, t in zip(weights, objective.parameters(), strict=True)}
    batches = [(torch.zeros_like(x), y) for x, y in p.batches]
    with torch.no_grad():
        p.model[0].bias.zero_()
    objective.refresh()
    with pytest.raises(ValueError, match="all gradients are zero"):
        measure(objective, weights, batches, Measuring(), zeros, zeros)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "hessian"}, "expected rows to be one of .*got 'hessian'"),
        ({"rest": "full"}, "expected rest to be one of"),
        ({"target": "labels"}, "expected target to be one of"),
        ({"damping": 0.0}, "expected a finite damping > 0, got 0.0"),
        ({"damping": float("nan")}, "expected a finite damping > 0, got nan"),
        ({"root_floor": -1.0}, "expected a finite root_floor > 0, got -1.0"),
        ({"root_floor": float("inf")}, "expected a finite root_floor > 0, got inf"),
        ({"largest_block": 0}, "expected largest_block >= 1, got 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Measuring(**options)
