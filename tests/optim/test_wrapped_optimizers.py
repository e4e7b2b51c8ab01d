"""Around optimizers of third parties: those around others, with keys or passes of their own."""

import copy
import io
import warnings

import pytest
import torch
from optim.training import (
    DIM,
    EXACT,
    SPECTRA,
    TASK,
    Quadratic,
    data,
    dense_preconditioner,
    net,
    precondition,
    quadratic_data,
    quadratic_loss,
    set_gradients,
    train,
    weights,
)
from optim.wrapping_optimizers import SAM, Lookahead, LowRankAdam, ScheduleFree, StepByLoss

import hesscurv
from hesscurv.optim import CurvatureWarning

CLOSE = {"rtol": 1e-7, "atol": 1e-7}  # as in test_preconditioner_rules.py
H = quadratic_data(SPECTRA["positive"])[0][0]
SGD = {"lr": 0.01, "momentum": 0.9}


def quadratic(base, model, **options):
    options = {"tol": EXACT, "refresh_every": 1} | options
    return precondition(base, model, quadratic_loss, [H[None]], **options)


def descend(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        quadratic_loss(model, H[None]).backward()
        optimizer.step()
    return weights(model)


# -- around others ----------------------------------------------------------------------------


def test_around_lookahead_it_is_lookahead_around_it():
    outer, inner = Quadratic(), Quadratic()
    wrapped = quadratic(Lookahead(torch.optim.SGD(outer.parameters(), **SGD)), outer)
    other = Lookahead(quadratic(torch.optim.SGD(inner.parameters(), **SGD), inner))
    assert wrapped.mode == "gradient"
    assert torch.equal(descend(outer, wrapped, 5), descend(inner, other, 5))


def test_a_schedule_free_base_averages_the_preconditioned_iterates():
    lr, beta, model = 0.01, 0.9, Quadratic()
    optimizer = quadratic(ScheduleFree(torch.optim.SGD(model.parameters(), lr=lr), beta), model)
    assert optimizer.mode == "gradient"
    P = dense_preconditioner(H, 3)
    x = z = weights(model)
    optimizer.train()
    y = x
    for k in range(1, 5):
        set_gradients(model, H @ y)
        optimizer.step()
        z = z - lr * P @ (H @ y)
        x = x + (z - x) / k
        y = (1 - beta) * z + beta * x
        torch.testing.assert_close(weights(model), y, **CLOSE)
    optimizer.eval()
    torch.testing.assert_close(weights(model), x, **CLOSE)


KEEP_WEIGHTS = {
    "Lookahead": lambda p: Lookahead(torch.optim.Adam(p)),
    "ScheduleFree": lambda p: ScheduleFree(torch.optim.SGD(p, lr=0.1)),
    "ASGD": lambda p: torch.optim.ASGD(p),
}


@pytest.mark.parametrize("name", KEEP_WEIGHTS)
def test_an_update_is_not_changed_behind_the_back_of_weights_kept_beside_it(name):
    model = net()
    with pytest.raises(ValueError, match=f"mode='gradient' with {name}, got 'update'.*Lookahead"):
        precondition(KEEP_WEIGHTS[name](model.parameters()), model, mode="update")
    assert precondition(KEEP_WEIGHTS[name](model.parameters()), model).mode == "gradient"


def test_an_unknown_base_that_keeps_a_copy_is_told_of_once():
    class Pulled(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                start = self.state[p].setdefault("start", p.detach().clone())
                p.sub_(p.grad, alpha=0.01).lerp_(start, 0.1)

    model = net()
    optimizer = precondition(Pulled(model.parameters(), {}), model)
    with pytest.warns(CurvatureWarning, match=r"copies of the weights in its state \(start\)"):
        train(model, optimizer, 1)
    train(model, optimizer, 2)  # warnings are errors


def test_the_average_of_asgd_is_of_the_weights_that_the_model_had():
    model = Quadratic()
    optimizer = quadratic(torch.optim.ASGD(model.parameters(), lr=0.01, t0=2), model)
    seen = [descend(model, optimizer, 1) for _ in range(6)]
    average = torch.cat([optimizer.state[p]["ax"].reshape(-1) for p in model.parameters()])
    # Each step averages with the weight that the step before it chose, 1 / max(1, step - t0), kept
    # in float32.
    torch.testing.assert_close(average, torch.stack(seen[3:]).mean(0), **CLOSE)


# -- keys of its own --------------------------------------------------------------------------


def test_groups_with_a_rank_of_their_own_keep_it_and_others_get_none():
    model = Quadratic(shapes=[(2, 3), (6,)])
    alone = copy.deepcopy(model)

    def build(m):
        return LowRankAdam([{"params": [m.parts[0]], "rank": 1}, {"params": [m.parts[1]]}])

    optimizer, plain = quadratic(build(model), model), build(alone)
    assert [group.get("rank") for group in optimizer.param_groups] == [1, None]
    w, g = weights(model), torch.randn(DIM, dtype=torch.float64)
    for m, o in ((model, optimizer), (alone, plain)):
        set_gradients(m, g)
        o.step()
    P = dense_preconditioner(H, 3)
    torch.testing.assert_close(weights(model) - w, P @ (weights(alone) - w), **CLOSE)


def test_all_keys_of_ours_have_a_prefix():
    model = net()
    base = torch.optim.SGD(model.parameters(), **SGD)
    before = set(base.param_groups[0])
    optimizer = precondition(base, model)
    train(model, optimizer, 2)
    added = set(optimizer.param_groups[0]) - before
    assert added
    assert all(key.startswith("curvature_") for key in added)
    assert all(key.startswith("curvature_") for key in set(optimizer.defaults) - set(base.defaults))


def test_a_state_dict_from_before_the_prefix_is_read():
    model = net()
    optimizer = precondition(torch.optim.SGD(model.parameters(), **SGD), model, rank=2)
    train(model, optimizer, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for key in ("rank", "damping", "refresh_every"):
            group[key] = group.pop(f"curvature_{key}")
    other = copy.deepcopy(model)
    again = precondition(torch.optim.SGD(other.parameters(), **SGD), other, rank=5, damping=1.0)
    again.load_state_dict(old)
    assert again.param_groups[0]["curvature_rank"] == 2
    assert "rank" not in again.param_groups[0]
    assert torch.equal(train(model, optimizer, 4, first=2), train(other, again, 4, first=2))


# -- closures ---------------------------------------------------------------------------------


def closure_of(model, optimizer, calls, batch=None):
    def closure():
        optimizer.zero_grad()
        loss = TASK(model, data()[0] if batch is None else batch)
        loss.backward()
        calls.append(loss.detach())
        return loss

    return closure


@pytest.mark.parametrize("halves", [False, True], ids=["a closure", "two steps"])
@pytest.mark.parametrize("options", [{"lr": 0.01}, SGD], ids=["plain", "momentum"])
def test_of_a_sharpness_aware_base_the_whole_update_is_multiplied(halves, options):
    model = Quadratic()
    optimizer = quadratic(SAM(model.parameters(), torch.optim.SGD, **options), model)
    assert optimizer.mode == "update"
    P, w, velocity = dense_preconditioner(H, 3), weights(model), 0

    def closure():
        optimizer.zero_grad()
        loss = quadratic_loss(model, H[None])
        loss.backward()
        return loss

    for _ in range(3):
        closure()
        if halves:
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
            assert all(p.grad is None for p in model.parameters())
        else:
            optimizer.step(closure)
        g = H @ w
        velocity = options.get("momentum", 0) * velocity + H @ (w + 0.05 * g / g.norm())
        w = w - options["lr"] * P @ velocity
        torch.testing.assert_close(weights(model), w, **CLOSE)
    report = optimizer.report()
    assert (report.steps, report.refreshes, report.failures) == (3, 3, 0)


def test_a_sharpness_aware_bases_gradient_cannot_be_reached():
    model = net()
    base = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="expected mode='update' with SAM, got 'gradient'"):
        precondition(base, model, mode="gradient")
    plain = precondition(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert not hasattr(plain, "first_step")


@pytest.mark.parametrize("mode", ["gradient", "update"])
def test_a_base_that_wants_the_loss_gets_it_without_another_pass(mode):
    model, calls = net(), []
    optimizer = precondition(StepByLoss(model.parameters()), model, mode=mode)
    closure = closure_of(model, optimizer, calls)
    for step in range(3):
        assert torch.equal(optimizer.step(closure).detach(), calls[-1])
        assert len(calls) == step + 1
    assert calls[2] < calls[0]


class Twice(torch.optim.SGD):
    """Evaluates its closure before its step and after it."""

    def step(self, closure=None):
        super().step(closure)
        return None if closure is None else torch.enable_grad()(closure)()


def test_a_base_that_calls_its_closure_again_has_it_evaluated_or_is_refused():
    model, calls = net(), []
    optimizer = precondition(Twice(model.parameters(), lr=0.01), model, mode="update")
    optimizer.step(closure_of(model, optimizer, calls))
    assert len(calls) == 2
    optimizer = precondition(Twice(model.parameters(), lr=0.01), model, mode="gradient")
    with pytest.raises(ValueError, match=r"once a step in mode='gradient'.*mode='update'"):
        optimizer.step(closure_of(model, optimizer, calls))


def test_newton_steps_are_no_base():
    model = net()
    with pytest.raises(ValueError, match="got NewtonCG, which evaluates its closure many times"):
        precondition(hesscurv.optim.NewtonCG(model.parameters()), model)
    with pytest.raises(ValueError, match="got LBFGS, which evaluates its closure many times"):
        precondition(Lookahead(torch.optim.LBFGS(model.parameters())), model)


# -- what is no optimizer of torch's ------------------------------------------------------------


def test_what_an_optimizer_lacks_is_named():
    model = net()
    base = ScheduleFree(torch.optim.SGD(model.parameters(), lr=0.1))

    class Partial:
        param_groups = base.param_groups
        step = zero_grad = state_dict = load_state_dict = staticmethod(lambda: None)

    with pytest.raises(TypeError, match=r"torch.optim.Optimizer, got Partial without add_param"):
        precondition(Partial(), model)
    with pytest.raises(TypeError, match=r"got list without param_groups, step"):
        precondition([1], model)


# -- state dicts ------------------------------------------------------------------------------

RESUMED = {
    "Lookahead": lambda m: Lookahead(torch.optim.SGD(m.parameters(), **SGD)),
    "Lookahead, Adam": lambda m: Lookahead(torch.optim.Adam(m.parameters(), lr=0.01)),
    "ScheduleFree": lambda m: ScheduleFree(torch.optim.SGD(m.parameters(), lr=0.01)),
    "SAM": lambda m: SAM(m.parameters(), torch.optim.SGD, **SGD),
}


def steps_of(model, optimizer, count, first=0):
    """Train as each kind of base wants it; return the weights."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(first, first + count):
        closure = closure_of(model, optimizer, [], data()[step % 4])
        closure()
        optimizer.step(closure if hasattr(optimizer, "first_step") else None)
    return weights(model)


@pytest.mark.parametrize("name", RESUMED)
def test_a_state_dict_of_any_form_resumes_with_the_same_bits(name):
    model = net()
    optimizer = precondition(RESUMED[name](model), model)
    before = optimizer.state_dict()  # as soon as the base has one
    assert before["param_groups"][0]["curvature_step"] == 0
    steps_of(model, optimizer, 4)
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # what a file is to have
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = net(seed=7)
    resumed = precondition(RESUMED[name](other), other, rank=5, refresh_every=50)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.report().gains == optimizer.report().gains
    assert resumed.param_groups is resumed.base.param_groups
    expected = steps_of(model, optimizer, 5, first=4)
    assert torch.equal(steps_of(other, resumed, 5, first=4), expected)


@pytest.mark.parametrize("name", RESUMED)
def test_a_state_dict_of_the_base_alone_begins_with_a_refresh(name):
    alone = net()
    plain = RESUMED[name](alone)
    steps_of(alone, plain, 3)
    model = net(seed=5)
    optimizer = precondition(RESUMED[name](model), model, rank=2)
    model.load_state_dict(alone.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.param_groups[0]["curvature_rank"] == 2
    steps_of(model, optimizer, 1, first=3)
    assert optimizer.report().refreshes == 1


def test_a_base_that_has_been_trained_is_in_the_state_dict_at_once():
    model = net()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, base, 3)
    state = precondition(base, model).state_dict()["state"]
    for number, p in enumerate(model.parameters()):
        assert torch.equal(state[number]["exp_avg"], base.state[p]["exp_avg"])


def test_what_is_written_to_a_parameters_state_is_the_bases():
    model = net()
    optimizer = precondition(torch.optim.SGD(model.parameters(), **SGD), model)
    train(model, optimizer, 2)
    p = model[0].weight
    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    assert not optimizer.base.state[p]["momentum_buffer"].any()
    assert "curvature_basis" not in optimizer.base.state[p]


# -- the packages themselves ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Lookahead", "ScheduleFreeSGD", "SAM", "SOAP", "Ranger"])
def test_those_of_pytorch_optimizer_resume_with_the_same_bits(name):
    package = pytest.importorskip("pytorch_optimizer")

    def build(m):
        if name == "Lookahead":
            return package.Lookahead(torch.optim.SGD(m.parameters(), **SGD))
        if name == "SAM":
            return package.SAM(m.parameters(), torch.optim.SGD, **SGD)
        return getattr(package, name)(m.parameters(), lr=0.01)

    model, other = net(), net(seed=7)
    optimizer = precondition(build(model), model, rank=1)
    quietly_steps(model, optimizer, 4)
    resumed = precondition(build(other), other)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.report().refreshes == 2
    assert max(optimizer.report().gains) < 1
    expected = quietly_steps(model, optimizer, 4, first=4)
    assert torch.equal(quietly_steps(other, resumed, 4, first=4), expected)


def quietly_steps(model, optimizer, count, first=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own, and of copies in Ranger's state
        return steps_of(model, optimizer, count, first)
