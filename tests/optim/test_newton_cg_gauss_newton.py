"""NewtonCG on sums of squares: Gauss-Newton products, Krylov models, the search for a damping."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from optim.newton_problems import closure_of, flat, net, oscillator_residuals
from planted import planted
from torch import nn

from hesscurv.optim import NewtonOptions
from hesscurv.optim.newton.closure_gauss_newton import ClosureGaussNewton
from hesscurv.optim.newton.closure_hessian import ClosureHessian
from hesscurv.optim.newton.closure_loss import ClosureLoss
from hesscurv.optim.newton.krylov_model import krylov_model, search_damping
from hesscurv.optim.newton.newton_cg import NewtonCG
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner

SEEDS = [0]


def fit(seed: int = 0):
    """A net, and its residuals on some points as two tensors of other shapes."""
    model = net(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = x.prod(dim=1, keepdim=True)

    def residuals():
        gap = (model(x) - y) / math.sqrt(20)
        return gap[:15].reshape(3, 5), gap[15:, 0]

    return model, residuals


def total(residuals):
    return sum(part.square().sum() for part in residuals())


def dense_jacobian(residuals, params):
    values = torch.cat([part.reshape(-1) for part in residuals()])
    rows = [torch.autograd.grad(value, params, retain_graph=True) for value in values]
    return torch.stack([flat(row) for row in rows])


# -- products ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_products_are_those_of_twice_the_squared_jacobian(seed, vectorize):
    model, residuals = fit(seed)
    params = list(model.parameters())
    graph = ClosureLoss(residuals, params, residuals=True).differentiate()
    J = dense_jacobian(residuals, params)
    G = ClosureGaussNewton(graph, vectorize=vectorize)
    torch.testing.assert_close(G.to_dense(), 2 * J.mT @ J, rtol=1e-12, atol=1e-12)


def test_loss_and_gradient_are_those_of_the_sum_of_squares():
    model, residuals = fit()
    params = list(model.parameters())
    graph = ClosureLoss(residuals, params, residuals=True).differentiate()
    assert graph.value == pytest.approx(float(total(residuals).detach()), rel=1e-14)
    assert graph.returned == pytest.approx(graph.value, rel=1e-14)
    expected = flat(torch.autograd.grad(total(residuals), params))
    torch.testing.assert_close(graph.gradient(), expected)
    loss = ClosureLoss(residuals, params, residuals=True)
    assert loss.evaluate() == pytest.approx(graph.value, rel=1e-14)


def test_parameters_that_no_residual_depends_on_are_left_alone():
    model, residuals = fit()
    spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = NewtonCG([spare, *model.parameters()], rank=3, curvature="gauss_newton")
    optimizer.step(residuals)
    assert torch.equal(spare.detach(), torch.ones(3, dtype=torch.float64))
    assert "basis" not in optimizer.state[spare]


# -- the model on a Krylov space --------------------------------------------------------------


def saddle(seed: int, rank: int, damping: float):
    """An indefinite H, a gradient, and the preconditioner of H's top pairs."""
    problem = planted([50.0, -20.0, 7.0, 2.0, -1.0, 0.5], 12, seed)
    H = problem.matrix
    g = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(H)
    top = values.abs().argsort(descending=True)[:rank]
    return H, g, LowRankPreconditioner.inverse(vectors[:, top], values[top], damping)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("mu", [1e-2, 10.0])
def test_the_whole_space_gives_the_step_of_the_dense_damped_system(seed, rank, mu):
    H, g, precondition = saddle(seed, rank, 0.1)
    found = krylov_model(H, g, 1e-3, precondition, tol=1e-13, max_iterations=12)
    root = torch.stack([precondition.root(e) for e in torch.eye(12, dtype=torch.float64)])
    torch.testing.assert_close(root @ root @ g, precondition(g))
    values, vectors = torch.linalg.eigh(root @ H @ root)
    # Directions that g does not reach are not in the space, and not in d.
    d = -root @ vectors @ ((vectors.mT @ (root @ g)) / (values.abs() + mu))
    torch.testing.assert_close(found.direction(mu), d, rtol=1e-8, atol=1e-9)
    promise = -float(g @ d + d @ H @ d / 2)
    assert found.decrease(mu) == pytest.approx(promise, rel=1e-8)
    half = -float(g @ d / 2 + d @ H @ d / 8)
    assert found.decrease(mu, 0.5) == pytest.approx(half, rel=1e-8)
    assert float(g @ d) < 0
    assert found.num_negative == 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tol", [0.3, 1e-3])
def test_the_space_grows_until_the_step_has_converged(seed, tol):
    H = planted(torch.logspace(3, -3, 60).tolist(), 60, seed).matrix
    g = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    precondition = LowRankPreconditioner.identity(g)
    found = krylov_model(H, g, 0.5, precondition, tol=tol, max_iterations=60)
    residual = H @ found.direction(0.5) + 0.5 * found.direction(0.5) + g
    assert found.converged
    assert float(residual.norm()) <= tol * float(g.norm()) * (1 + 1e-6)
    assert found.num_matvecs < 60
    few = krylov_model(H, g, 0.5, precondition, tol=1e-12, max_iterations=5)
    assert (few.num_matvecs, few.converged) == (5, False)


def test_a_matrix_of_zeros_gives_the_gradient():
    g = torch.arange(1.0, 5.0, dtype=torch.float64)
    precondition = LowRankPreconditioner.identity(g)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    found = krylov_model(zero, g, 0.0, precondition, tol=0.1, max_iterations=9)
    torch.testing.assert_close(found.direction(0.0), -g)


# -- the search for a damping -----------------------------------------------------------------


def search(losses, start=1.0, **changes):
    """Search where the loss after the step of a damping is given."""

    class Steps:
        def direction(self, damping):
            return torch.tensor([damping])

        def decrease(self, damping, length=1.0):
            return 0.1

    options = {
        "length": 1.0,
        "decrease": 0.1,
        "factor": 4.0,
        "max_evaluations": 21,
        "bounds": (1e-12, 1e6),
    } | changes
    tried = []

    def evaluate(direction, length):
        tried.append(float(direction))
        return losses(tried[-1])

    return search_damping(evaluate, 1.0, Steps(), start, **options), tried


def test_the_damping_goes_down_or_up_to_the_smallest_loss():
    def valley(best):
        return lambda mu: 0.5 + 0.01 * abs(math.log(mu / best, 4))

    for best, tries in ((1.0, 3), (1 / 16, 4), (16.0, 5)):
        found, tried = search(valley(best))
        assert (found.damping, found.loss) == (best, pytest.approx(0.5))
        assert len(tried) == tries


def test_the_damping_grows_until_the_loss_falls():
    found, tried = search(lambda mu: math.nan if mu < 100 else 0.5)
    assert tried[:4] == [1.0, 16.0, 256.0, 64.0]
    assert found.damping == 256.0


def test_no_damping_is_better_than_one_that_raises_the_loss():
    found, tried = search(lambda mu: 1.0 - 1e-9)  # less than a tenth of what is promised
    assert found is None
    assert max(tried) <= 1e6
    assert search(lambda mu: 2.0, max_evaluations=3)[1] == [1.0, 16.0, 256.0]


def test_a_constant_damping_is_tried_alone():
    found, tried = search(lambda mu: 0.5, bounds=(1.0, 1.0))
    assert (found.damping, tried) == (1.0, [1.0])


# -- the optimizer ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rank", [0, 4])
def test_one_step_solves_linear_least_squares(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    b = torch.randn(20, generator=generator, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    how = {"damping": 0.0, "cg_tol": 1e-13, "options": NewtonOptions(damping_bounds=(0.0, 1.0))}
    optimizer = NewtonCG([w], rank=rank, curvature="gauss_newton", generator=generator, **how)
    before = optimizer.step(lambda: A @ w - b)
    assert float(before) == pytest.approx(float(b @ b))
    torch.testing.assert_close(w.detach(), torch.linalg.lstsq(A, b).solution)


@pytest.mark.parametrize("start", [(-1.2, 1.0), (0.0, 5.0), (3.0, -2.0)])
def test_rosenbrock_is_minimised_from_its_residuals(start):
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = NewtonCG([w], curvature="gauss_newton")
    for _ in range(80):
        loss = optimizer.step(lambda: (1 - w[:1], 10 * (w[1:] - w[:1] ** 2)))
    assert loss < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_no_step_increases_the_loss(seed, curvature):
    model, residuals = fit(seed)
    options = {"curvature": curvature, "options": NewtonOptions(damping_search=True)}
    optimizer = NewtonCG(model.parameters(), rank=6, refresh_every=5, **options)
    closure = residuals if curvature == "gauss_newton" else lambda: total(residuals)
    losses = [float(optimizer.step(closure)) for _ in range(30)]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


def test_a_resumed_run_goes_on_with_the_same_bits():
    runs = []
    for stop in (None, 3):
        model, residuals = fit()
        options = {"rank": 4, "refresh_every": 2, "curvature": "gauss_newton"}
        optimizer = NewtonCG(model.parameters(), **options)
        for step in range(6):
            if step == stop:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = NewtonCG(model.parameters(), **options)
                optimizer.load_state_dict(state)
            optimizer.step(residuals)
        runs.append(flat(model.parameters()).detach())
    assert torch.equal(*runs)


def test_a_refused_step_leaves_the_weights_and_raises_the_damping():
    model, residuals = fit()
    before = flat(model.parameters()).detach().clone()
    calls = []

    def closure():  # the loss only rises
        calls.append(1)
        first, second = residuals()
        return first * len(calls), second * len(calls)

    optimizer = NewtonCG(model.parameters(), rank=2, damping=1e-3, curvature="gauss_newton")
    optimizer.step(closure)
    report = optimizer.diagnostics()
    assert torch.equal(flat(model.parameters()).detach(), before)
    assert (report["step_length"], report["num_refused"]) == (0.0, 1)
    assert report["damping"] == pytest.approx(1e-2)


def calls_backward(residuals):
    def closure():
        loss = total(residuals)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(
    ("wrap", "error", "words"),
    [
        (calls_backward, TypeError, "a call of backward"),
        (lambda residuals: lambda: None, TypeError, "got NoneType"),
        (lambda residuals: lambda: [1.0], TypeError, "got list"),
        (lambda residuals: lambda: residuals()[0].detach(), ValueError, "without"),
        (lambda residuals: lambda: residuals()[0] * math.nan, ValueError, "finite loss"),
    ],
)
def test_what_are_no_residuals_is_refused_and_nothing_changes(wrap, error, words):
    model, residuals = fit()
    before = flat(model.parameters()).detach().clone()
    optimizer = NewtonCG(model.parameters(), rank=2, curvature="gauss_newton")
    with pytest.raises(error, match=words):
        optimizer.step(wrap(residuals))
    assert torch.equal(flat(model.parameters()).detach(), before)
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="curvature"):
        NewtonCG(net().parameters(), curvature="fisher")
    with pytest.raises(TypeError, match="damping_search"):
        NewtonOptions(damping_search="yes")


def test_a_gauss_newton_product_needs_residuals():
    model, residuals = fit()
    graph = ClosureLoss(lambda: total(residuals), list(model.parameters())).differentiate()
    assert ClosureHessian(graph).shape == (21, 21)
    with pytest.raises(ValueError, match="closure that returns residuals"):
        ClosureGaussNewton(graph)


def test_a_physics_informed_network_goes_on_from_lbfgs():
    model, residuals = oscillator_residuals(0)
    lbfgs = torch.optim.LBFGS(
        model.parameters(),
        max_iter=300,
        max_eval=300,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )
    lbfgs.step(closure_of(lbfgs, lambda: total(residuals)))
    optimizer = NewtonCG(model.parameters(), rank=30, curvature="gauss_newton")
    losses = [float(optimizer.step(residuals)) for _ in range(25)]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    # Measured: a tenth. As L-BFGS would with as many gradients: so small a net is easy for it.
    assert losses[-1] < 0.3 * losses[0]
