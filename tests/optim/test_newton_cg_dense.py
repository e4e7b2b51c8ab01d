"""NewtonCG by the rows of the Jacobian: rows, exact damped steps, and when there are none."""

from __future__ import annotations

import copy

import pytest
import torch
from optim.newton_problems import flat, oscillator_residuals
from torch import nn

from hesscurv.optim import NewtonCG, NewtonOptions
from hesscurv.optim.newton.closure_loss import ClosureLoss
from hesscurv.optim.newton.dense_model import DenseModel

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def points(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_jacobian(residuals, params):
    found = residuals()
    parts = found if isinstance(found, (tuple, list)) else (found,)
    values = torch.cat([part.reshape(-1) for part in parts])
    rows = [
        torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True)
        for value in values
    ]
    return values.detach(), torch.stack([flat(row) for row in rows])


def tanh_net(inputs=2, outputs=1, bias=True):
    torch.manual_seed(0)
    layers = nn.Linear(inputs, 7, bias=bias), nn.Tanh(), nn.Linear(7, 6), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(6, outputs)).double()


def equation():
    """Two derivatives inside, the boundaries by calls of their own, one residual of two points."""
    model, inner, ends = tanh_net(), points(9, 2), points(4, 2, seed=1)

    def residuals():
        x = inner.clone().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
        return second[:, 0] + u[:, 0] ** 2, model(ends)[:, 0] - model(ends + 1)[:, 0], slope[:3, 1]

    return model, residuals


def several_outputs():
    model, x = tanh_net(3, 2, bias=False), points(8, 3)
    return model, lambda: model(x) - x[:, :2]


def sequences():
    """A layer on (samples, places, features), summed over places."""
    model, x = tanh_net(3), points(6, 4, 3)
    return model, lambda: [model(x).sum((1, 2)) - 1, x.new_ones(2)]


def reused():
    model, x = tanh_net(2, 2), points(5, 2)
    return model, lambda: model(model(x)).prod(1)


@pytest.mark.parametrize("make", [equation, several_outputs, sequences, reused])
def test_rows_are_those_of_the_jacobian(make):
    model, residuals = make()
    params = list(model.parameters())
    values, expected = dense_jacobian(residuals, params)
    loss = ClosureLoss(residuals, params, residuals=True)
    graph = loss.differentiate(rows=True)
    assert loss.num_evaluations == 1
    torch.testing.assert_close(graph.residuals.rows, expected, **CLOSE)
    torch.testing.assert_close(graph.gradient(), 2 * expected.mT @ values, **CLOSE)
    assert graph.value == pytest.approx(float(values @ values), rel=1e-14)
    # With other weights the places are known, and rows are right again.
    with torch.no_grad():
        for p in params:
            p += 0.1 * torch.randn_like(p)
    values, expected = dense_jacobian(residuals, params)
    again = ClosureLoss(residuals, params, residuals=True).differentiate(
        rows=True, places=graph.residuals.places
    )
    assert again.residuals.places is graph.residuals.places
    torch.testing.assert_close(again.residuals.rows, expected, **CLOSE)


def test_other_points_have_other_places():
    model, x = tanh_net(), points(6, 2)
    order = [torch.arange(6), torch.arange(5, -1, -1)]
    params, places = list(model.parameters()), None
    for index in order:
        residuals = lambda i=index: model(x)[i, 0] - 1  # noqa: E731
        graph = ClosureLoss(residuals, params, residuals=True).differentiate(
            rows=True, places=places
        )
        places = graph.residuals.places
        expected = dense_jacobian(residuals, params)[1]
        torch.testing.assert_close(graph.residuals.rows, expected, **CLOSE)


def coupled():
    model, x = tanh_net(), points(6, 2)
    return model, lambda: model(x)[:, 0] - model(x)[:, 0].mean()


def used_elsewhere():
    model, x = tanh_net(), points(6, 2)
    return model, lambda: [model(x)[:, 0], model[0].weight.flatten() * 0.1]


def convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1)).double()
    x = points(5, 1, 6)
    return model, lambda: model(x)[:, 0]


@pytest.mark.parametrize("make", [coupled, used_elsewhere, convolution])
def test_without_rows_products_take_their_place(make):
    model, residuals = make()
    twin, twins = make()
    params = list(model.parameters())
    assert (
        ClosureLoss(residuals, params, residuals=True).differentiate(rows=True).residuals.rows
        is None
    )
    optimizer = NewtonCG(params, rank=3, curvature="gauss_newton")
    plain = NewtonCG(
        twin.parameters(), rank=3, curvature="gauss_newton", options=NewtonOptions(solver="krylov")
    )
    for _ in range(3):
        optimizer.step(residuals)
        plain.step(twins)
    assert optimizer.diagnostics()["num_matvecs"] > 0
    for p, q in zip(params, twin.parameters(), strict=True):
        assert torch.equal(p, q)
    before = copy.deepcopy(model.state_dict())
    asked = NewtonCG(params, curvature="gauss_newton", options=NewtonOptions(solver="dense"))
    with pytest.raises(ValueError, match="for solver='dense'; use solver='auto' or 'krylov'"):
        asked.step(residuals)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("damping", [1e-12, 0.3, 50.0])
def test_a_step_solves_the_damped_normal_equations(shape, damping):
    J, r = points(*shape), points(shape[0], seed=1)
    model = DenseModel(J, r)
    H, g = 2 * J.mT @ J, 2 * J.mT @ r
    step = model.direction(damping)
    residual = H @ step + damping * step + g
    # The least damping leaves what a singular matrix makes of rounding.
    assert float(residual.norm()) <= (1e-6 if damping < 1e-6 else 1e-11) * float(g.norm())
    for length in (1.0, 0.4):
        s = length * step
        expected = -float(g @ s + s @ H @ s / 2)
        assert model.decrease(damping, length) == pytest.approx(expected, rel=1e-9)


def test_residuals_without_full_rank_have_a_step():
    J = torch.ones(4, 6, dtype=torch.float64)
    step = DenseModel(J, torch.ones(4, dtype=torch.float64)).direction(0.0)
    torch.testing.assert_close(J @ step, -torch.ones(4, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_a_resumed_run_goes_on_with_the_same_bits():
    model, residuals = oscillator_residuals(0)
    optimizer = NewtonCG(model.parameters(), curvature="gauss_newton")
    for _ in range(3):
        optimizer.step(residuals)
    twin, twins = oscillator_residuals(1)
    twin.load_state_dict(model.state_dict())
    resumed = NewtonCG(twin.parameters(), curvature="gauss_newton")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        assert float(optimizer.step(residuals)) == float(resumed.step(twins))
    assert optimizer.diagnostics()["num_matvecs"] == 0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
