"""Closures as people write them for L-BFGS work unchanged, and what cannot work says why."""

import gc
import math
import time
import weakref

import pytest
import torch
from optim.newton_problems import (
    closure_of,
    flat,
    gradient_of,
    net,
    quadratic,
    regression,
    take_steps,
)
from torch import distributed, nn

import hesscurv
from hesscurv.optim.newton.closure_loss import ClosureLoss
from hesscurv.optim.newton.newton_cg import NewtonCG


def weights_after(make_closure, steps=3, **options):
    """The weights after some steps with a closure made from (optimizer, model, loss)."""
    model = net()
    optimizer = NewtonCG(model.parameters(), rank=4, **options)
    closure = make_closure(optimizer, model, regression(model))
    for _ in range(steps):
        optimizer.step(closure)
    return flat(model.parameters()).detach()


# In torch 2.6 the function itself cannot be intercepted: an error says to call loss.backward().
INTERCEPTED = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch.autograd.backward is not open to modes"
)

# -- ways to write one ------------------------------------------------------------------------


def documented(optimizer, model, loss):
    return closure_of(optimizer, loss)


def only_returns(optimizer, model, loss):
    return loss


def returns_a_float(optimizer, model, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    return closure


def returns_nothing(optimizer, model, loss):
    def closure():
        model.zero_grad(set_to_none=False)
        loss().backward()

    return closure


def asks_whether_to_differentiate(optimizer, model, loss):
    def closure():
        if torch.is_grad_enabled():
            optimizer.zero_grad()
        value = loss()
        if value.requires_grad:
            value.backward()
        return value

    return closure


def calls_the_function(optimizer, model, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        torch.autograd.backward(value, retain_graph=True)
        return value

    return closure


def calls_the_function_with_several(optimizer, model, loss):
    def closure():
        value = loss()
        torch.autograd.backward((value / 4, 3 * value / 4))
        return value

    return closure


def accumulates(optimizer, model, loss):
    def closure():
        optimizer.zero_grad()
        for share in (0.25, 0.75):
            (share * loss()).backward()
        return math.nan  # what counts is what backward was called on

    return closure


def weighs(optimizer, model, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        torch.stack([value, value]).backward(torch.tensor([0.25, 0.75], dtype=value.dtype))
        return value

    return closure


def clips_and_reads_gradients(optimizer, model, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return value

    return closure


@pytest.mark.parametrize(
    "write",
    [
        only_returns,
        returns_a_float,
        returns_nothing,
        asks_whether_to_differentiate,
        calls_the_function,
        pytest.param(calls_the_function_with_several, marks=INTERCEPTED),
        accumulates,
        weighs,
        clips_and_reads_gradients,
    ],
)
def test_all_ways_to_write_a_closure_take_the_same_steps(write):
    torch.testing.assert_close(
        weights_after(write), weights_after(documented), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(
    "outside", [torch.no_grad, torch.enable_grad, lambda: torch.inference_mode(True)]
)
def test_the_grad_mode_outside_does_not_matter(outside):
    expected = weights_after(documented)

    def within(optimizer, model, loss):
        step, closure = optimizer.step, closure_of(optimizer, loss)

        def checking():
            assert torch.is_grad_enabled()
            return closure()

        def run(_):
            with outside():
                return step(checking)

        optimizer.step = run
        return None

    assert torch.equal(weights_after(within), expected)


def test_the_loss_before_the_step_is_returned_without_a_graph():
    model = net()
    loss = regression(model)
    optimizer = NewtonCG(model.parameters(), rank=4)
    before = loss().detach()
    got = optimizer.step(closure_of(optimizer, loss))
    assert torch.equal(got, before)
    assert not got.requires_grad
    assert optimizer.diagnostics()["loss"] == float(before)
    assert optimizer.step(lambda: ("anything", loss().backward()))[0] == "anything"


def test_gradients_are_filled_in_as_backward_does():
    model = net()
    params, loss = list(model.parameters()), regression(model)
    expected = gradient_of(loss, params)
    ClosureLoss(lambda: loss().backward(), params).differentiate()
    torch.testing.assert_close(flat([p.grad for p in params]), expected)
    held = [p.grad for p in params]
    ClosureLoss(lambda: loss().backward(), params).differentiate()  # added up without zero_grad
    torch.testing.assert_close(flat([p.grad for p in params]), 2 * expected)
    assert all(p.grad is g for p, g in zip(params, held, strict=True))


def test_after_a_step_gradients_are_those_it_started_from():
    model = net()
    optimizer = NewtonCG(model.parameters(), rank=4)
    loss = regression(model)
    expected = gradient_of(loss, list(model.parameters()))
    optimizer.step(closure_of(optimizer, loss))
    torch.testing.assert_close(flat([p.grad for p in model.parameters()]), expected)


def test_a_closure_without_backward_leaves_gradients_alone():
    model = net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = NewtonCG(model.parameters(), rank=4)
    optimizer.step(regression(model))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_a_derivative_inside_the_loss_may_come_from_backward_with_inputs():
    model = net()
    x = torch.randn(5, 3, dtype=torch.float64)

    def by_grad():
        t = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(t).sum(), t, create_graph=True)
        return slope.square().mean()

    def by_backward():
        t = x.clone().requires_grad_()
        model(t).sum().backward(inputs=[t], create_graph=True)
        return t.grad.square().mean()

    params = list(model.parameters())
    with pytest.warns(UserWarning, match="create_graph=True"):
        got = ClosureLoss(by_backward, params).differentiate()
    expected = ClosureLoss(by_grad, params).differentiate()
    torch.testing.assert_close(got.gradient(), expected.gradient())


# -- what stays the same within a step --------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dropout_and_random_points_stay_the_same_within_a_step(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    optimizer = NewtonCG(model.parameters(), rank=4)
    drawn, first_of_steps = [], []

    def loss():
        x = torch.randn(16, 3, dtype=torch.float64)
        drawn.append(x)
        return (model(x) - x.prod(1, keepdim=True)).square().mean()

    for _ in range(6):
        begin = torch.get_rng_state()
        optimizer.step(closure_of(optimizer, loss))
        end = torch.get_rng_state()
        assert len(drawn) > 1
        assert all(torch.equal(x, drawn[0]) for x in drawn)
        assert optimizer.diagnostics()["step_length"] > 0
        torch.set_rng_state(begin)
        loss()  # as many random numbers as one evaluation takes
        assert torch.equal(torch.get_rng_state(), end)
        first_of_steps.append(float(drawn[0][0, 0]))
        drawn.clear()
    assert len(set(first_of_steps)) == 6


def test_running_statistics_move_once_an_evaluation():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = NewtonCG(model.parameters(), rank=4)
    take_steps(optimizer, regression(model), 3)
    evaluations = optimizer.diagnostics()["num_evaluations"]
    assert int(model[1].num_batches_tracked) == evaluations + 1  # take_steps adds one


# -- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [documented, only_returns])
def test_the_graph_is_gone_after_a_step_without_the_garbage_collector(write):
    model = net()
    optimizer = NewtonCG(model.parameters(), rank=4)
    loss, alive = regression(model), []

    class Mark:
        """Lives as long as the graph that it is attached to."""

    def attach(module, inputs, output):
        # Nor does one outlive the direction that it was for: the line search builds others.
        assert all(ref() is None for ref in alive)
        output.grad_fn.metadata["mark"] = mark = Mark()
        alive.append(weakref.ref(mark))

    model[1].register_forward_hook(attach)
    closure = write(optimizer, model, loss)
    gc.collect()
    gc.disable()
    try:
        held = loss()
        assert alive.pop()() is not None
        returned = [optimizer.step(closure) for _ in range(3)]
        assert len(alive) >= 6
        assert [ref() for ref in alive] == [None] * len(alive)
        del held, returned
    finally:
        gc.enable()


def test_the_number_of_tensors_does_not_grow():
    model = net()
    optimizer = NewtonCG(model.parameters(), rank=4, refresh_every=2)
    closure = closure_of(optimizer, regression(model))

    def count():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def counted_after(steps):
        for _ in range(steps):
            optimizer.step(closure)
        return count()

    assert counted_after(2) == counted_after(6)


# -- what cannot work -------------------------------------------------------------------------


def other_loss():
    return nn.Linear(2, 1)(torch.ones(2)).sum()


def call(method, *args, **kwargs):
    """A closure that ends in a call on the loss."""
    return lambda model, loss: lambda: getattr(loss(), method)(*args, **kwargs)


def freed(model, loss):
    def closure():
        value = loss()
        torch.autograd.grad(value, list(model.parameters()))
        return value

    return closure


def spoiled(model, loss):
    """A finite loss whose gradient is not: the square root at zero."""
    return lambda: loss() + (model[0].weight * 0).sum().sqrt()


def bent(model, loss):
    """A finite loss and gradient with a second derivative that is not."""
    return lambda: loss() + (model[0].weight * 0).abs().pow(1.5).sum()


WRONG = {
    "a float": (lambda m, f: lambda: float(f().detach()), TypeError, "return loss, not"),
    "None": (lambda m, f: lambda: None, TypeError, "call loss.backward()"),
    "no closure": (lambda m, f: 3, TypeError, "expected a closure"),
    "detached": (lambda m, f: lambda: f().detach(), ValueError, "with a graph"),
    "without grad": (lambda m, f: torch.no_grad()(f), ValueError, "with a graph"),
    "a vector": (lambda m, f: lambda: m(torch.ones(2, 3).double()), ValueError, "scalar loss"),
    "backward on a vector": (
        lambda m, f: lambda: m(torch.ones(2, 3).double()).backward(),
        ValueError,
        "scalar loss",
    ),
    "another model": (lambda m, f: other_loss, ValueError, "depends on the optimizer"),
    "backward on another model": (
        lambda m, f: lambda: other_loss().backward(),
        ValueError,
        "depends on the optimizer",
    ),
    "some inputs": (
        lambda m, f: lambda: f().backward(inputs=[m[0].weight]),
        ValueError,
        "leave `inputs` out",
    ),
    "create_graph": (call("backward", create_graph=True), ValueError, "torch.autograd.grad"),
    "freed": (freed, ValueError, "was freed"),
    "NaN": (lambda m, f: lambda: f() * math.nan, ValueError, "finite loss, got nan"),
    "inf": (lambda m, f: lambda: (f() * math.inf).backward(), ValueError, "finite loss, got inf"),
    "gradient": (spoiled, ValueError, "finite gradient"),
    "curvature": (bent, ValueError, "NaN or inf"),
}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_work_says_why_and_leaves_everything_as_it_was(kind, rank):
    make, error, words = WRONG[kind]
    model = net()
    loss = regression(model)
    optimizer = NewtonCG(model.parameters(), rank=rank)
    optimizer.step(closure_of(optimizer, loss))
    model[0].bias.grad = None
    grads = [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in grads]
    weights, state = flat(model.parameters()).detach(), repr(optimizer.state_dict())
    random = torch.get_rng_state()
    closure = make(model, loss)

    def disturbing():
        torch.rand(3)
        model.zero_grad(set_to_none=False)
        model[2].weight.requires_grad_(True)
        return closure()

    with pytest.raises(error, match=words):
        optimizer.step(disturbing if callable(closure) else closure)
    assert torch.equal(flat(model.parameters()), weights)
    for p, g, value in zip(model.parameters(), grads, values, strict=True):
        assert p.grad is g
        assert g is None or torch.equal(g, value)
    assert repr(optimizer.state_dict()) == state
    assert torch.equal(torch.get_rng_state(), random)


def test_an_error_in_the_line_search_leaves_everything_as_it_was():
    model = net()
    loss, calls = regression(model), []
    optimizer = NewtonCG(model.parameters(), rank=4)
    weights = flat(model.parameters()).detach().clone()

    def closure():
        calls.append(1)
        if len(calls) == 2:
            model[0].weight.requires_grad_(False)
            raise KeyboardInterrupt
        return closure_of(optimizer, loss)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), weights)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_on_the_way_shortens_the_step(bad):
    params, _, loss = quadratic([3.0] * 12)
    calls = []
    optimizer = NewtonCG(params, rank=0, damping=0.0)

    def closure():
        calls.append(1)
        return loss() * bad if len(calls) == 2 else loss()

    before = float(loss().detach())
    optimizer.step(closure)
    assert optimizer.diagnostics()["step_length"] == 0.5
    assert float(loss().detach()) < before


def test_a_step_without_decrease_is_refused_and_shows():
    params, _, loss = quadratic([3.0] * 12)
    optimizer = NewtonCG(params, rank=2, damping=0.5)
    best = loss().detach()

    def closure():  # no other point is as good
        value = loss()
        return value if torch.equal(value.detach(), best) else value + 1e6

    before = flat(params).detach().clone()
    for refused in (1, 2):
        assert torch.equal(optimizer.step(closure), best)
        assert torch.equal(flat(params), before)
        report = optimizer.diagnostics()
        assert (report["step_length"], report["num_refused"]) == (0.0, refused)
        assert report["damping"] == 0.5 * 10**refused
    optimizer.step(loss)
    assert optimizer.diagnostics()["step_length"] == 1.0


def test_sparse_embeddings_take_the_steps_of_dense_ones():
    index, found = torch.arange(4), []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 1))
        optimizer = NewtonCG(model.parameters(), rank=3)
        for _ in range(3):
            optimizer.step(lambda model=model: model(index).square().mean())
        found.append([p.detach() for p in model.parameters()])
        assert model[0].sparse == sparse
    for p, q in zip(*found, strict=True):
        assert torch.equal(p, q)


def test_other_sparse_gradients_are_refused():
    weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match="sparse=False"):
        NewtonCG([weight]).step(lambda: _SparseGradient.apply(weight).square().sum())


class _SparseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope.to_sparse()


def test_a_model_in_ddp_is_refused():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net())
        optimizer = NewtonCG(model.parameters(), rank=4)
        loss = regression(model)
        with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
            optimizer.step(closure_of(optimizer, loss))
        plain = net()
        optimizer = NewtonCG(plain.parameters(), rank=4)
        losses = take_steps(optimizer, regression(plain), 2)
        assert losses[-1] < losses[0]
    finally:
        time.sleep(0.1)  # gloo's threads need the GIL once more, which the group's end would hold
        distributed.destroy_process_group()


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.bag(x).tanh())


@pytest.mark.filterwarnings("ignore:there is little to gain")
@pytest.mark.parametrize("name", ["hardsigmoid", "embedding_bag"])
def test_the_wrapper_trains_what_has_no_second_derivative(name):
    if name == "embedding_bag":
        model, x = Bag(), torch.randint(7, (6, 3))
    else:
        model, x = nn.Sequential(nn.Linear(4, 3), nn.Hardsigmoid()), torch.randn(6, 4)
    y, task = torch.rand(6, 3), hesscurv.supervised(nn.MSELoss())
    optimizer = hesscurv.optim.PreconditionedOptimizer(
        torch.optim.SGD(model.parameters(), 0.01), model, task, [(x, y)], rank=3, curvature="ggn"
    )
    task(model, (x, y)).backward()
    optimizer.step()
    assert len(optimizer.report().eigenvalues) == 4  # the last is what gains are measured against
