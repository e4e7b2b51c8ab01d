"""The learning rate as a share of the largest stable one, on problems where that is known."""

import copy

import pytest
import torch
from optim.training import (
    DIM,
    EXACT,
    SPECTRA,
    Quadratic,
    dense_preconditioner,
    net,
    precondition,
    quadratic_data,
    quadratic_loss,
    set_gradients,
    train,
    weights,
)

from hesscurv.optim.automatic_rate import AutomaticRate, multiplied_rates
from hesscurv.optim.group_settings import FACTOR, INITIAL

# The largest Ritz value is below the eigenvalue, by at most its residual, 5% of it.
LANCZOS = 0.06
# A second batch whose top eigenspace is another one than the first's, of a smaller scale.
SECOND = [70.0, -60.0, 20.0, 10.0, 3.0, 1.0]


class Recording(torch.optim.SGD):
    """SGD that notes the rates of its groups in each step."""

    seen: list

    def step(self, closure=None):
        self.__dict__.setdefault("seen", []).append([g["lr"] for g in self.param_groups])
        return super().step(closure)


def stepped(steps=1, lr=0.001, spectra=(SPECTRA["positive"], SECOND), seed=0, **options):
    """An optimizer after some steps on a quadratic, a sample a batch."""
    model = Quadratic(seed=seed)
    of_sgd = {k: options.pop(k) for k in ("momentum", "nesterov") if k in options}
    base = Recording(model.parameters(), lr=lr, **of_sgd)
    options = {"learning_rate": "auto", "samples": 1, "tol": EXACT} | options
    options["generator"] = torch.Generator().manual_seed(seed)
    optimizer = precondition(
        base, model, quadratic_loss, quadratic_data(*spectra, seed=seed), **options
    )
    for _ in range(steps):
        set_gradients(
            model, torch.zeros(DIM, dtype=torch.float64).index_fill_(0, torch.tensor(0), 1e-9)
        )
        optimizer.step()
    return optimizer


def largest_left(seed, index):
    """The largest |eigenvalue| of P H', P of the first batch and H' of the one of this index."""
    first, other = (H[0] for H in quadratic_data(SPECTRA["positive"], SECOND, seed=seed))
    P = dense_preconditioner(first, 3)
    return float(torch.linalg.eigvals(P @ (first, other)[index]).real.abs().max())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_the_rate_is_a_share_of_the_stable_one_on_the_second_batch(seed, fraction):
    optimizer = stepped(seed=seed, rate_fraction=fraction)
    expected = fraction * 2 / largest_left(seed, 1)
    (rate,) = optimizer.base.seen[0]
    assert expected * (1 - 1e-9) <= rate <= expected * (1 + LANCZOS)
    # On the first batch it would have been another one, by more than the tolerance.
    assert abs(fraction * 2 / largest_left(seed, 0) / expected - 1) > 0.3


@pytest.mark.parametrize(
    ("descent", "stable"),
    [
        ({"momentum": 0.8}, 2 * 1.8),
        ({"momentum": 0.8, "nesterov": True}, 2 * 1.8 / 2.6),
    ],
)
def test_momentum_counts(descent, stable):
    optimizer = stepped(**descent)
    expected = 0.5 * stable / largest_left(0, 1)
    assert expected <= optimizer.base.seen[0][0] <= expected * (1 + LANCZOS)


def test_one_batch_alone_serves_for_both():
    optimizer = stepped(spectra=[SPECTRA["positive"]], max_growth=1000.0)
    expected = 0.5 * 2 / largest_left(0, 0)
    assert expected <= optimizer.base.seen[0][0] <= expected * (1 + LANCZOS)


def test_all_samples_serve_for_both_where_all_are_asked_for():
    optimizer = stepped(samples=None)
    H = torch.cat(quadratic_data(SPECTRA["positive"], SECOND)).mean(0)
    left = torch.linalg.eigvals(dense_preconditioner(H, 3) @ H).real.abs().max()
    assert 1 / left <= optimizer.base.seen[0][0] <= 1 / left * (1 + LANCZOS)


def test_the_rate_grows_by_no_more_than_allowed():
    optimizer = stepped(lr=1e-6, max_growth=7.0)
    assert optimizer.base.seen[0][0] == pytest.approx(7e-6, rel=1e-12)
    assert optimizer.report().rate_factor == 7.0
    assert "multiplied by 7" in str(optimizer.report())


def test_the_rate_shrinks_where_it_is_too_large():
    optimizer = stepped(lr=50.0)
    assert optimizer.base.seen[0][0] < 1
    assert optimizer.report().rate_factor < 0.02


def test_a_rate_from_nothing_stays_nothing():
    optimizer = stepped(lr=0.0)
    assert optimizer.base.seen[0] == [0.0]
    assert optimizer.report().failures == 0


def test_the_groups_own_rate_is_as_before_after_each_step():
    optimizer = stepped(3, lr=0.003)
    assert optimizer.param_groups[0]["lr"] == 0.003
    assert all(rate != 0.003 for (rate,) in optimizer.base.seen)


def test_the_groups_own_rate_is_as_before_after_a_step_that_failed():
    optimizer = stepped(lr=0.003)

    def fail(*_):
        raise ZeroDivisionError

    optimizer.base.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.003


@pytest.mark.parametrize("lr", [0.003, torch.tensor(0.003, dtype=torch.float64)])
def test_a_schedulers_changes_scale_it(lr):
    optimizer = stepped(lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    first = float(optimizer.base.seen[0][0])
    for _ in range(4):  # a refresh among them, whose Lanczos run has another start
        optimizer.step()
        scheduler.step()
    rates = [float(rate) for (rate,) in optimizer.base.seen[1:]]
    assert rates == pytest.approx([first * 0.5**i for i in range(4)], rel=LANCZOS)
    assert rates[1] == pytest.approx(0.5 * rates[0], rel=1e-12)  # without a refresh in between
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.003 / 16)


def test_a_scheduler_that_the_base_had_counts_from_its_first_rate():
    model = Quadratic()
    base = Recording(model.parameters(), lr=0.003)
    torch.optim.lr_scheduler.LinearLR(base, start_factor=0.1)  # now at .0003
    optimizer = precondition(
        base,
        model,
        quadratic_loss,
        quadratic_data(SPECTRA["positive"]),
        learning_rate="auto",
        tol=EXACT,
    )
    set_gradients(model, weights(model))
    optimizer.step()
    expected = 0.1 * 0.5 * 2 / largest_left(0, 0)
    assert expected <= base.seen[0][0] <= expected * (1 + LANCZOS)


def test_the_first_group_to_become_unstable_decides():
    rate = AutomaticRate(0.5, 1000.0)
    groups = [{"lr": 1.0, INITIAL: 0.1}, {"lr": 1.0, INITIAL: 0.2, "momentum": 0.9}, {"lr": 1.0}]
    # 2 / 4 = .5 for the first, 3.8 / 4 = .95 for the second; half of them, by the own rates.
    assert rate.factor(4.0, groups) == pytest.approx(min(0.25 / 0.1, 0.475 / 0.2))
    assert rate.factor(0.0, groups) == 1000.0
    assert rate.factor(4.0, [{"lr": 1.0, INITIAL: 0.0}]) == 1000.0


def test_rates_are_multiplied_for_a_while():
    shared = torch.tensor(2.0)
    groups = [{"lr": 1.0}, {"lr": shared}, {}]
    with multiplied_rates(groups, 3.0):
        assert [float(g["lr"]) for g in groups[:2]] == [3.0, 6.0]
    assert groups[0] == {"lr": 1.0}
    assert groups[1]["lr"] is shared
    assert float(shared) == 2.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_at_the_automatic_rate_is_stable_and_faster(seed):
    """Where a thousandth of the largest eigenvalue decides how long it takes."""
    spectrum = [1000.0, 400.0, 100.0] + [1.0 + 0.1 * i for i in range(DIM - 3)]

    def loss_after(steps, **options):
        model = Quadratic(seed=seed)
        H = quadratic_data(spectrum, seed=seed)
        base = torch.optim.SGD(model.parameters(), lr=1e-3)  # half the stable rate
        optimizer = base
        if options:
            optimizer = precondition(base, model, quadratic_loss, H, refresh_every=50, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            quadratic_loss(model, H[0]).backward()
            optimizer.step()
        return float(quadratic_loss(model, H[0]).detach())

    # Rates of 1e-3 and, the largest curvature left being 110, .9e-2: (1 - 1e-3)^400 against
    # (1 - .9e-2)^400 in the weights, in the loss the square.
    plain, automatic = loss_after(400), loss_after(400, learning_rate="auto")
    assert automatic < 0.01 * plain


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"mode": "gradient"}),
        (torch.optim.RMSprop, {"mode": "gradient"}),
        (torch.optim.SGD, {"mode": "update"}),
    ],
)
def test_bases_whose_stable_rate_is_another_are_refused(kind, options):
    model = net()
    base = kind(model.parameters(), lr=0.01)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="expected a base like SGD for learning_rate='auto', got"):
        precondition(base, model, learning_rate="auto", **options)
    assert base.state_dict() == before


def test_a_third_partys_descent_is_taken_at_its_word():
    class Descent(torch.optim.Optimizer):
        def __init__(self, params, **defaults):
            super().__init__(params, defaults)

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)

    model = net()
    with pytest.raises(ValueError, match="expected a base like SGD"):
        precondition(Descent(model.parameters(), lr=0.1), model, learning_rate="auto")
    with pytest.raises(ValueError, match="expected a base with 'lr' in its groups"):
        precondition(
            Descent(model.parameters(), rate=0.1), model, mode="gradient", learning_rate="auto"
        )
    base = Descent(model.parameters(), lr=0.1)
    optimizer = precondition(base, model, mode="gradient", learning_rate="auto", samples=8)
    train(model, optimizer, 4)
    assert optimizer.param_groups[0][FACTOR] == optimizer.report().rate_factor != 1.0
    assert optimizer.report().failures == 0
