"""Simplified and in-place traces give the products of plain ones, and leave no state behind."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from hesscurv.operators.ways.simplification import (
    ZEROS,
    accumulate_in_place,
    find_written,
    simplify,
)
from hesscurv.operators.ways.tracing import mean_numel, trace_derivative, vectorize

CLASSES = torch.tensor([0, 1, 2, 0])
aten = torch.ops.aten


def loss_of(net, data):
    names = [name for name, _ in net.named_parameters()]

    def loss(*params):
        outputs = functional_call(net, dict(zip(names, params, strict=True)), (data,))
        return F.cross_entropy(outputs, CLASSES)

    return loss


def dense():
    net = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 3, bias=False)
    )
    return net, torch.randn(4, 5)


def convolutional():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.Flatten()
    )
    return nn.Sequential(net, nn.Linear(8, 3)), torch.randn(4, 1, 8, 8)


def normalised():
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))
    return net, torch.randn(4, 5)


NETS = {"dense": dense, "convolutional": convolutional, "normalised": normalised}


@pytest.fixture(params=NETS)
def problem(request):
    net, data = NETS[request.param]()
    net, data = net.double(), data.double()
    params = tuple(p.detach() for p in net.parameters())
    loss = loss_of(net, data)
    return loss, params, grad(loss, argnums=tuple(range(len(params))))


def tangents_like(params, count=None):
    shape = () if count is None else (count,)
    return tuple(torch.randn(*shape, *p.shape, dtype=p.dtype) for p in params)


def reference(loss, params, v):
    return torch.autograd.functional.hvp(loss, params, v)[1]


def test_a_trace_in_place_is_right_at_every_call_and_leaves_its_inputs(problem):
    loss, params, gradient = problem
    traced = trace_derivative(gradient, params, in_place=True)
    for _ in range(3):
        v = tangents_like(params)
        before = [piece.clone() for piece in v]
        expected = reference(loss, params, v)
        for _ in range(2):  # the same again: no constant was written to
            torch.testing.assert_close(traced(*v), expected, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(v, tuple(before), rtol=0, atol=0)


def test_a_vectorised_trace_is_the_trace_for_every_vector(problem):
    loss, params, gradient = problem
    traced = trace_derivative(gradient, params)
    vectorised = vectorize(traced, tangents_like(params, 5))
    for _ in range(2):
        block = tangents_like(params, 5)
        before = [piece.clone() for piece in block]
        got = vectorised(*block)
        for j in range(5):
            expected = reference(loss, params, tuple(piece[j] for piece in block))
            torch.testing.assert_close(
                tuple(piece[j] for piece in got), expected, rtol=1e-10, atol=1e-14
            )
        many = vmap(lambda *v: traced(*v))(*block)
        torch.testing.assert_close(tuple(got), tuple(many), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(block, tuple(before), rtol=0, atol=0)


def test_neither_copies_of_inputs_nor_zeros_remain(problem):
    _, params, gradient = problem
    targets = {node.target for node in trace_derivative(gradient, params).graph.nodes}
    assert aten.copy_.default not in targets
    assert not targets & set(ZEROS)


def test_sums_are_computed_in_place(problem):
    _, params, gradient = problem

    def count(in_place, *targets):
        graph = trace_derivative(gradient, params, in_place=in_place).graph
        return sum(node.target in targets for node in graph.nodes)

    plain, in_place = (count(flag, aten.add.Tensor) for flag in (False, True))
    assert in_place < plain
    into = (aten.addmm_.default, aten.addcmul_.default, aten.add_.Tensor)
    assert count(True, *into) == plain - in_place
    assert count(False, *into) == 0


def test_a_sum_with_a_constant_does_not_change_the_constant():
    c = torch.randn(3, 3, dtype=torch.float64)

    def fn(x):
        # The derivative adds to c @ c, which is computed once.
        return (c @ c) * x + x @ (c @ c)

    x = torch.randn(3, 3, dtype=torch.float64)
    traced = trace_derivative(fn, (x,), in_place=True)
    for _ in range(3):
        v = torch.randn_like(x)
        torch.testing.assert_close(traced(v), (c @ c) * v + v @ (c @ c))


def test_what_is_used_twice_is_not_overwritten():
    def fn(x):
        y = x @ x
        return y * 2.0 + y.sin(), y

    x = torch.randn(3, 3, dtype=torch.float64)
    traced = trace_derivative(fn, (x,), in_place=True)
    for _ in range(2):
        v = torch.randn_like(x)
        expected = torch.func.jvp(fn, (x,), (v,))[1]
        torch.testing.assert_close(tuple(traced(v)), tuple(expected))


def reads_before_a_write(x, y):
    s = x.sin()
    t = s * y
    s.mul_(2.0)
    return x @ y + t, s


def reads_a_view_before_a_write(x, y):
    s = x.sin()
    view = s.t()
    t = view * y
    s.mul_(2.0)
    return x @ y + t, s


def copies_a_view_before_a_write(x, y):
    s = x.sin()
    view = s.t()
    t = view + torch.zeros_like(view)
    s.mul_(2.0)
    return t @ y


@pytest.mark.parametrize(
    "fn", [reads_before_a_write, reads_a_view_before_a_write, copies_a_view_before_a_write]
)
def test_nothing_is_read_after_a_write_that_was_read_before(fn):
    x, y = torch.randn(2, 3, 3, dtype=torch.float64)
    graph = make_fx(fn)(x, y)
    written = find_written(graph.graph)
    simplify(graph.graph, written)
    accumulate_in_place(graph.graph, written)
    graph.recompile()
    torch.testing.assert_close(graph(x, y), fn(x, y))


def test_the_mean_size_is_that_of_the_intermediate_results():
    x = torch.randn(10, 10)
    traced = trace_derivative(lambda z: (z.sin() @ z).sum(), (x,))
    assert 1 < mean_numel(traced) <= 100
