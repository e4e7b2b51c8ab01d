"""What a preconditioned step is, against the formula in dense linear algebra."""

import copy
import math

import pytest
import torch
from optim.training import (
    DIM,
    EXACT,
    SPECTRA,
    Quadratic,
    dense_preconditioner,
    precondition,
    quadratic_data,
    quadratic_loss,
    quietly,
    set_gradients,
    set_weights,
    weights,
)
from planted import planted

from hesscurv.optim import LowRankPreconditioner
from hesscurv.optim.flat_parameters import FlatParameters
from hesscurv.optim.preconditioner.damped_steps import DampedUpdate

# Eigenvectors within EXACT of the true ones enter twice, times gradients of norm 1e2 to 1e3.
CLOSE = 1e-7


def close(got, expected, tolerance=CLOSE):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def wrapped(base, model, spectrum, seed=0, **options):
    options = {"tol": EXACT, "refresh_every": 1} | options
    return precondition(base, model, quadratic_loss, quadratic_data(spectrum, seed=seed), **options)


def a_preconditioner(values, rank, damping=None, residuals=None):
    values = torch.tensor(values, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(DIM, len(values), dtype=torch.float64)).Q.mT.contiguous()
    residuals = torch.zeros(len(values)) if residuals is None else torch.tensor(residuals)
    return LowRankPreconditioner(basis, values, residuals, rank, damping)


def test_an_update_taken_within_a_step_leaves_parameters_without_a_gradient_alone():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (5, DIM - 5)]
    P = a_preconditioner([9.0, 4.0, 1.0], rank=2)
    before, moved = [p.detach().clone() for p in params], torch.randn(5, dtype=torch.float64)
    update = DampedUpdate(FlatParameters(params), within=True)
    params[0].grad = torch.ones_like(params[0])  # the step computes it; the other one is not used
    with torch.no_grad():
        params[0] += moved
        update.finish(P)
    full = torch.cat([moved, torch.zeros(DIM - 5, dtype=torch.float64)])
    close(params[0].detach(), (before[0] + P.multiply_(full.clone())[:5]))
    assert torch.equal(params[1].detach(), before[1])


# -- a step of SGD ----------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [None, 0.0, 3.0])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_of_sgd_is_along_the_damped_gradient(spectrum, seed, rank, damping):
    model, lr = Quadratic(seed=seed), 0.01
    H = quadratic_data(SPECTRA[spectrum], seed=seed)[0][0]
    base = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer = wrapped(base, model, SPECTRA[spectrum], seed, rank=rank, damping=damping)
    w = weights(model)
    quadratic_loss(model, H[None]).backward()
    optimizer.step()
    close(weights(model), w - lr * dense_preconditioner(H, rank, damping) @ (H @ w))


def test_weight_decay_and_momentum_of_sgd_are_its_own():
    H, lr, beta, decay = quadratic_data(SPECTRA["indefinite"])[0][0], 0.01, 0.9, 0.3
    model = Quadratic()
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=beta, weight_decay=decay)
    optimizer = wrapped(base, model, SPECTRA["indefinite"])
    P, w, velocity = dense_preconditioner(H, 3), weights(model), 0
    for _ in range(4):
        optimizer.zero_grad()
        quadratic_loss(model, H[None]).backward()
        optimizer.step()
        velocity = beta * velocity + (P @ H @ w + decay * w)
        w = w - lr * velocity
    close(weights(model), w)


def test_of_a_matrix_of_lower_rank_all_of_its_range_is_damped_and_nothing_else():
    H = quadratic_data(SPECTRA["rank 3"])[0][0]
    model = Quadratic()
    optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=1.0), model, SPECTRA["rank 3"])
    optimizer.param_groups[0]["curvature_rank"] = 6
    w, g = weights(model), torch.randn(DIM, dtype=torch.float64)
    set_gradients(model, g)
    optimizer.step()
    close(w - weights(model), dense_preconditioner(H, 3) @ g)


def test_the_parameters_order_in_groups_and_model_may_differ():
    H = quadratic_data(SPECTRA["positive"])[0][0]
    model = Quadratic()
    first, second, third = model.parts
    base = torch.optim.SGD([{"params": [third]}, {"params": [second, first], "lr": 0.5}], lr=1.0)
    optimizer = wrapped(base, model, SPECTRA["positive"])
    w, g = weights(model), torch.randn(DIM, dtype=torch.float64)
    set_gradients(model, g)
    optimizer.step()
    rates = torch.tensor([0.5] * 10 + [1.0] * 2, dtype=torch.float64)
    close(w - weights(model), rates * (dense_preconditioner(H, 3) @ g))


def test_one_parameter_alone_is_stepped_by_the_same_rule():
    H = quadratic_data(SPECTRA["indefinite"])[0][0]
    model = Quadratic(shapes=[(DIM,)])
    optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=1.0), model, SPECTRA["indefinite"])
    w, g = weights(model), torch.randn(DIM, dtype=torch.float64)
    set_gradients(model, g)
    optimizer.step()
    close(w - weights(model), dense_preconditioner(H, 3) @ g)
    assert torch.equal(model.parts[0].grad, g)


# -- gains ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [None, 0.0, 1e-9, 5.0, 1e9])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_direction_is_amplified_or_projected_out(spectrum, damping):
    P = a_preconditioner(SPECTRA[spectrum][:3], 3, damping)
    assert all(0 < gain <= 1 for gain in P.gains)
    assert P.gains[-1] == pytest.approx(1.0, abs=1e-15)  # of all pairs the last is the measure
    # Larger curvature, smaller gain, whatever the sign.
    assert P.gains == sorted(P.gains)


def test_the_gain_outside_the_eigenspace_is_one():
    P = a_preconditioner([30.0, -8.0, 2.0], 3)
    x = torch.randn(DIM, dtype=torch.float64)
    x -= P.basis_mD.mT @ (P.basis_mD @ x)
    close(P(x), x, 1e-14)
    for gain, u in zip(P.gains, P.basis_mD, strict=True):
        close(P(u), gain * u, 1e-14)
    assert torch.equal(P(x), P.multiply_(x.clone()))
    whole = P.add_(torch.zeros_like(x), P.coefficients(x))
    close(whole, P(x) - x, 1e-14)


def test_parts_of_a_vector_take_their_entries_of_the_product():
    P = a_preconditioner([30.0, -8.0, 2.0, 1.0], 3)
    U, x = P.basis_mD[:3].mT, torch.randn(DIM, dtype=torch.float64)
    inside = (torch.tensor(P.gains, dtype=torch.float64) - 1) * (U.mT @ x)
    close(P.coefficients(x), inside, 1e-14)
    parts = [
        P.add_(part.clone(), inside, a) for part, a in zip(x.split(5), (0, 5, 10), strict=True)
    ]
    close(torch.cat(parts), x + U @ inside, 1e-14)
    close(P(x), x + U @ inside, 1e-14)


def test_damping_is_a_tenth_of_the_last_eigenvalue_and_never_below_a_residual():
    values = [30.0, -8.0, 2.0, 1.0]
    assert a_preconditioner(values, 3).damping == pytest.approx(0.2)
    assert a_preconditioner(values, 2).damping == pytest.approx(0.8)
    assert a_preconditioner(values, 3, 0.05).damping == 0.05
    # Of the pairs that are damped; the one beyond is not trusted with anything.
    residuals = [0.5, 1.5, 0.1, 7.0]
    assert a_preconditioner(values, 3, residuals=residuals).damping == 1.5
    assert a_preconditioner(values, 3, 0.05, residuals).damping == 1.5
    assert a_preconditioner(values, 3, 2.0, residuals).damping == 2.0


def test_eigenvalues_that_rounding_alone_made_are_none():
    P = a_preconditioner([10.0, 5.0, 1e-9, -1e-10], 4, residuals=[0.0, 0.0, 3.0, 3.0])
    # Nothing is left to measure by, and the damping alone is what gains are measured against.
    assert P.damping == 0.5
    assert P.gains == [pytest.approx(0.5 / 10.5), pytest.approx(0.5 / 5.5), 1.0, 1.0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_did_not_converge_raises_the_damping(seed):
    """300 eigenvalues close to each other, which a few dozen products do not tell apart."""
    H = planted(torch.linspace(-10, 10, 300), 300, seed).matrix
    model = Quadratic(shapes=[(300,)], seed=seed)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"rank": 2, "tol": 1e-6, "damping": 1e-6}
    options["generator"] = torch.Generator().manual_seed(seed)
    optimizer = precondition(base, model, quadratic_loss, [H[None]], **options)
    set_gradients(model, weights(model))
    quietly(optimizer.step)  # there is little to gain, but no word of convergence
    P = optimizer._tracked.current
    U, values = P.basis_mD[:2].mT, torch.tensor(P.eigenvalues[:2])
    residuals = (H @ U - U * values).norm(dim=0)
    # Residuals are estimates, to rounding where products are exact.
    assert optimizer.report().damping >= (1 - 1e-6) * float(residuals.max()) > 1e-3


def test_a_preconditioner_of_nothing_is_the_identity():
    P = a_preconditioner([0.0, 0.0], 1)
    assert P.is_identity
    x = torch.randn(DIM, dtype=torch.float64)
    assert torch.equal(P(x), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eigenvalues": torch.ones(2)}, r"expected eigenvalues of shape \(3,\), got \(2,\)"),
        ({"residuals": torch.ones(3, 1)}, r"expected residuals of shape \(3,\)"),
        ({"rank": 4}, "expected 1 <= rank <= 3, got 4"),
        ({"rank": 0}, "expected 1 <= rank <= 3, got 0"),
        ({"eigenvalues": torch.tensor([1.0, math.nan, 1.0])}, "NaN or inf"),
        ({"residuals": torch.tensor([1.0, math.inf, 1.0])}, "NaN or inf"),
    ],
)
def test_a_preconditioner_refuses_what_does_not_fit(change, message):
    given = {"eigenvalues": torch.ones(3), "residuals": torch.zeros(3), "rank": 3} | change
    with pytest.raises(ValueError, match=message):
        LowRankPreconditioner(torch.eye(3), **given)


# -- other optimizers -------------------------------------------------------------------------


class SignDescent(torch.optim.Optimizer):
    """A third party's: decoupled decay, a step by the gradient's sign, state of its own."""

    def __init__(self, params, lr=0.01, decay=0.1):
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 0.5)
                p.mul_(1 - group["lr"] * group["decay"]).sub_(mean.sign(), alpha=group["lr"])


BASES = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "a third party's": SignDescent,
}


@pytest.mark.parametrize("name", BASES)
def test_the_update_of_any_other_base_is_multiplied(name):
    if name == "Muon" and not hasattr(torch.optim, name):
        pytest.skip("this torch has no Muon yet")
    model = Quadratic(shapes=[(2, 3), (3, 2)])
    alone = copy.deepcopy(model)
    optimizer = wrapped(BASES[name](model.parameters()), model, SPECTRA["indefinite"])
    base = BASES[name](alone.parameters())
    assert optimizer.mode == "update"
    P = dense_preconditioner(quadratic_data(SPECTRA["indefinite"])[0][0], 3)
    for step in range(3):
        g = torch.randn(DIM, dtype=torch.float64)
        set_gradients(model, g)
        set_gradients(alone, g)
        w = weights(model)
        set_weights(alone, w)  # the base's own state goes on
        base.step()
        optimizer.step()
        close(weights(model) - w, P @ (weights(alone) - w))
        assert torch.equal(torch.cat([p.grad.reshape(-1) for p in model.parts]), g), step


@pytest.mark.parametrize("mode", ["gradient", "update"])
def test_the_order_of_a_parameter_in_memory_does_not_matter(mode):
    moved = []
    for transposed in (False, True):
        model = Quadratic(shapes=[(2, 3), (3, 2)])
        if transposed:
            first = model.parts[0]
            first.data = first.data.t().contiguous().t()
            assert not first.is_contiguous()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = wrapped(base, model, SPECTRA["indefinite"], mode=mode)
        w = weights(model)
        set_gradients(model, torch.arange(DIM, dtype=torch.float64))
        optimizer.step()
        moved.append(weights(model) - w)
    # By another way of adding, with other roundings.
    close(*moved, 1e-13)


def test_either_mode_may_be_asked_for():
    P = dense_preconditioner(quadratic_data(SPECTRA["positive"])[0][0], 3)
    g = torch.randn(DIM, dtype=torch.float64)
    moved = {}
    for mode in ("gradient", "update"):
        for kind in (torch.optim.SGD, torch.optim.Adam):
            model = Quadratic()
            w = weights(model)
            optimizer = wrapped(
                kind(model.parameters(), lr=0.1), model, SPECTRA["positive"], mode=mode
            )
            set_gradients(model, g)
            optimizer.step()
            moved[mode, kind.__name__] = weights(model) - w
    close(moved["gradient", "SGD"], moved["update", "SGD"])
    close(moved["gradient", "Adam"], -0.1 * (P @ g).sign())  # what Adam's first step is
    close(moved["update", "Adam"], -0.1 * P @ g.sign())


# -- what is stable ---------------------------------------------------------------------------

DESCENTS = {
    "plain": {},
    "heavy ball": {"momentum": 0.8},
    "dampened": {"momentum": 0.8, "dampening": 0.5},
    "Nesterov": {"momentum": 0.8, "nesterov": True},
}


@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize("preconditioned", [False, True], ids=["alone", "preconditioned"])
def test_descent_is_stable_just_below_the_reported_rate_and_not_just_above(descent, preconditioned):
    def final(factor):
        """The weights' norm after 400 steps at a multiple of the reported rate."""
        model = Quadratic()
        base = torch.optim.SGD(model.parameters(), lr=1.0, **DESCENTS[descent])
        optimizer = wrapped(base, model, SPECTRA["positive"], refresh_every=1000)
        H = quadratic_data(SPECTRA["positive"])[0]
        start = weights(model)
        set_gradients(model, start)
        optimizer.step()
        report = optimizer.report()
        rate = report.stable_rate_after if preconditioned else report.stable_rate
        set_weights(model, start)
        base.state.clear()
        base.param_groups[0]["lr"] = factor * rate
        for _ in range(400):
            optimizer.zero_grad()
            quadratic_loss(model, H).backward()
            (optimizer if preconditioned else base).step()
        return float(weights(model).norm())

    # Just above, a direction grows by about 1 + .04 (1 - beta) a step at least: by 20 in 400 steps
    # with momentum .8. Just below, none grows; the flattest have hardly moved.
    assert final(1.02) > 10 > 5 > final(0.98)


def test_the_stable_rate_after_is_that_of_the_largest_curvature_left():
    for spectrum, largest in (
        # |lambda_4| = 6; damped ones are at (6 + 1.6) x / (x + 1.6) < 7.6.
        (SPECTRA["positive"], 7.6 * 100 / 101.6),
        ([100.0, 40.0, 16.0, 15.99], 17.59 * 100 / 101.6),
    ):
        model = Quadratic()
        optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=0.1), model, spectrum)
        set_gradients(model, weights(model))
        optimizer.step()
        report = optimizer.report()
        assert report.stable_rate == pytest.approx(2 / 100, rel=1e-9)
        assert report.stable_rate_after == pytest.approx(2 / largest, rel=1e-9)
        assert report.eigenvalues == pytest.approx(spectrum[:4], rel=1e-9)
        left = spectrum[3] + 1.6
        expected = [left / 101.6, left / 41.6, left / 17.6]
        assert report.gains == pytest.approx(expected, rel=1e-9)


def test_a_report_tells_in_words_what_it_has_in_numbers():
    model = Quadratic()
    optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=0.1), model, SPECTRA["positive"])
    before = str(optimizer.report())
    assert "0 steps" in before
    assert "steps are the base's own" in before
    set_gradients(model, weights(model))
    optimizer.step()
    text = str(optimizer.report())
    for part in ("1 steps", "1 refreshes", "|lambda_1| = 100", "|lambda_4| = 6", "damping 1.6"):
        assert part in text
    assert "stable learning rate 0.02 -> 0.267" in text


# -- one formula for both uses ----------------------------------------------------------------


def test_the_root_applied_twice_is_the_product_for_vectors_and_columns():
    P = a_preconditioner([30.0, -8.0, 2.0, 1.0], 3)
    X = torch.randn(DIM, 2, dtype=torch.float64)
    close(P.root(P.root(X)), torch.stack([P(x) for x in X.unbind(1)], dim=1), 1e-14)
    close(P.root(X[:, 0]), P.root(X)[:, 0], 1e-14)


@pytest.mark.parametrize("next_eigenvalue", [-1.0, 0.0])
def test_an_approximate_inverse_has_the_gains_of_the_pairs_with_their_next_one(next_eigenvalue):
    values = torch.tensor([30.0, -8.0, 2.0, next_eigenvalue], dtype=torch.float64)
    basis = torch.eye(DIM, dtype=torch.float64)[:4]
    wrapper = LowRankPreconditioner(basis, values, None, 3, damping=0.5)
    newton = LowRankPreconditioner.inverse(basis[:3].mT, values[:3], 0.5, next_eigenvalue)
    assert newton.gains == wrapper.gains
    assert newton.bulk == abs(next_eigenvalue) + 0.5


# -- one pair ---------------------------------------------------------------------------------


def test_one_pair_is_damped_against_the_next_one():
    P = a_preconditioner([100.0, -4.0], 1)
    assert P.damping == pytest.approx(10.0)  # a tenth of the last eigenvalue that is damped
    assert P.gains == pytest.approx([(4 + 10) / (100 + 10)])
    assert P.largest_after == pytest.approx(100 * 14 / 110)
    P.set_damping(0.0)
    assert P.gains == pytest.approx([0.04])
    assert P.largest_after == pytest.approx(4.0)


@pytest.mark.parametrize("damping", [None, 0.0])
def test_one_pair_of_a_matrix_of_rank_one_is_damped_and_not_projected_out(damping):
    P = a_preconditioner([50.0, 1e-9], 1, damping)
    assert P.damping == pytest.approx(5.0)
    assert P.gains == pytest.approx([5 / 55])


def test_gains_are_continuous_where_the_next_eigenvalue_vanishes():
    gains = [a_preconditioner([50.0, 20.0, left], 2).gains for left in (1e-4, 1e-12)]
    torch.testing.assert_close(*map(torch.tensor, gains), rtol=1e-4, atol=0)


def test_a_single_number_to_train_has_nothing_to_compare_with():
    model = Quadratic(shapes=[(1,)])
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    matrix = torch.full((1, 1, 1), 3.0, dtype=torch.float64)
    optimizer = precondition(base, model, quadratic_loss, [matrix], rank=1)
    w = weights(model)
    set_gradients(model, 3.0 * w)
    optimizer.step()
    close(weights(model), 0.7 * w, 1e-14)


@pytest.mark.parametrize("rank", [1, 2, 5, 11, 12, 40])
def test_any_rank_makes_steps_stable_at_the_reported_rate(rank):
    model = Quadratic()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = wrapped(base, model, SPECTRA["indefinite"], rank=rank)
    set_gradients(model, weights(model))
    optimizer.step()
    P, report = optimizer._tracked.current, optimizer.report()
    assert len(report.gains) == min(rank, DIM)
    H = quadratic_data(SPECTRA["indefinite"])[0][0]
    dense = torch.stack([P(column) for column in H], dim=1)
    largest = float(torch.linalg.eigvals(dense).abs().max())
    assert largest * report.stable_rate_after == pytest.approx(2, rel=1e-9)
    assert report.stable_rate_after > 1.5 * report.stable_rate
