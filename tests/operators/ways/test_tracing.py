"""A traced derivative is the function's own at every call, whatever is written to in place."""

import pytest
import torch
from support.forks import run_source
from torch.func import grad
from torch.nn import functional as F

from hesscurv.objective.running.environment import differentiable
from hesscurv.operators.ways.tracing import trace_derivative

TARGETS = torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)
LABELS = torch.tensor([0, 1] * 3)


def into_zeros(z):
    out = torch.zeros_like(z)
    out[:, 0] = z[:, 0].sin()
    out[:, 1] += z[:, 0] * z[:, 1]
    return out.pow(2).sum()


def into_a_copy(z):
    return (F.relu_(z * 1.5) + torch.ones_like(z).mul_(z).add_(z.sin())).pow(3).sum()


def by_index(z):
    wide = torch.zeros(6, 4, dtype=z.dtype)
    return (
        wide.index_copy(1, torch.tensor([0, 2]), z)
        .index_add(0, LABELS, z.repeat(1, 2))
        .pow(3)
        .sum()
    )


def accumulating(z):
    total = torch.zeros((), dtype=z.dtype)
    for row in z:
        total += row.prod()
    return total**2


FUNCTIONS = {
    "squares": lambda z: F.mse_loss(z, TARGETS),
    "sum of squares": lambda z: F.mse_loss(z, TARGETS, reduction="sum"),
    "smooth l1": lambda z: F.smooth_l1_loss(2 * z, TARGETS),
    "cross entropy": lambda z: F.cross_entropy(z, LABELS),
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, TARGETS.sigmoid()),
    "divergence": lambda z: F.kl_div(z.log_softmax(1), TARGETS.softmax(1), reduction="batchmean"),
    "layer norm": lambda z: F.layer_norm(z, (2,)).pow(3).sum(),
    "convolution": lambda z: F.conv1d(z[None], z.reshape(1, 6, 2)).pow(3).sum(),
    "attention": lambda z: F.scaled_dot_product_attention(z[None], z[None], z[None]).pow(2).sum(),
    "sorting": lambda z: (z.sort(0).values * TARGETS).pow(2).sum(),
    "cosine": lambda z: F.cosine_similarity(z, TARGETS).pow(2).sum(),
    "linear": lambda z: (z * TARGETS).sum(),
    "into zeros": into_zeros,
    "into a copy": into_a_copy,
    "by index": by_index,
    "accumulating": accumulating,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_traced_hessian_product_is_right_at_every_call(name):
    fn = FUNCTIONS[name]
    point = torch.randn(6, 2, dtype=torch.float64)
    with differentiable(point.device):  # fused attention has no forward mode
        traced = trace_derivative(grad(fn), (point,))
    for _ in range(3):
        v = torch.randn_like(point)
        with differentiable(point.device):
            expected = torch.autograd.functional.hvp(fn, point, v)[1]
        torch.testing.assert_close(traced(v), expected, rtol=1e-10, atol=1e-12)


def test_the_function_does_not_run_again():
    calls = []

    def fn(x, y):
        calls.append(1)
        return x.sin() * y

    x, y = torch.randn(2, 3, dtype=torch.float64)
    traced = trace_derivative(fn, (x, y))
    count = len(calls)
    v, w = torch.randn(2, 3, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(traced(v, w), x.cos() * v * y + x.sin() * w)
    assert len(calls) == count


def test_what_the_tangents_do_not_change_is_computed_once():
    x = torch.randn(4, 4, dtype=torch.float64)
    traced = trace_derivative(lambda z: (x @ x @ x).sin() @ z, (torch.randn_like(x),))
    products = [n for n in traced.graph.nodes if "mm" in str(n.target)]
    assert len(products) == 1
    v = torch.randn_like(x)
    torch.testing.assert_close(traced(v), (x @ x @ x).sin() @ v)


def test_a_function_that_writes_to_a_constant_is_refused_or_right():
    state = torch.zeros(3, dtype=torch.float64)

    def fn(x):
        return (state.copy_(x) * x).sum()

    x = torch.randn(3, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        trace_derivative(grad(fn), (x,))


def test_a_squared_loss_does_not_end_the_process(tmp_path):
    # Without care torch 2.13 ends it with a segmentation fault, so it gets a process of its own.
    code = (
        "import torch\n"
        "from hesscurv.operators.ways.tracing import trace_derivative\n"
        "loss = lambda z: torch.nn.functional.mse_loss(z, torch.zeros(3))\n"
        "print(trace_derivative(torch.func.grad(loss), (torch.ones(3),))(torch.ones(3)).tolist())\n"
    )
    assert run_source(code, cwd=tmp_path).startswith("[0.66666")
