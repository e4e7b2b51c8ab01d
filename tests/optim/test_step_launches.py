"""A preconditioned step adds few operations to the base's, whatever the number of parameters.

On a GPU each operation is a kernel launch, which takes longer than the arithmetic of a small one.
"""

from collections import Counter

import pytest
import torch
from optim.training import TASK, precondition, quietly
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hesscurv.optim.flat_parameters import FlatParameters
from hesscurv.optim.preconditioner.damped_steps import DampedUpdate, damp_gradient
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner

MOST = 12
# Views, and memory that nothing is written to.
NO_LAUNCH = {
    *("detach", "view", "_unsafe_view", "_reshape_alias", "alias", "as_strided", "t", "transpose"),
    *("permute", "slice", "select", "split", "split_with_sizes", "squeeze", "unsqueeze", "expand"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


class Launches(TorchDispatchMode):
    """Counts the kernels that operations would launch on a GPU.

    Of a `_foreach_` operation it is one where CUDA takes the whole list (each list of one dtype,
    and pairs of the same strides), else one a tensor.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if func.namespace == "aten" and name not in NO_LAUNCH:
            self.counts[name] += self.of_lists(args) if name.startswith("_foreach_") else 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def of_lists(args):
        lists = [a for a in args if isinstance(a, (list, tuple)) and isinstance(a[0], torch.Tensor)]
        one_dtype = all(len({t.dtype for t in each}) == 1 for each in lists)
        alike = all(len({t.stride() for t in group}) == 1 for group in zip(*lists, strict=True))
        return 1 if one_dtype and alike else len(lists[0])


def chain(count, dtype):
    """A net of so many parameters, two a layer."""
    torch.manual_seed(0)
    layers = [part for _ in range(count // 2) for part in (nn.Linear(4, 4), nn.Tanh())]
    return nn.Sequential(*layers).to(dtype)


def launches_of_a_step(count, base, mode, dtype=torch.float32, frozen=()):
    """What a step between refreshes launches in all, and the base's own; counts by operation."""
    model = chain(count, dtype)
    batch = torch.randn(8, 4, dtype=dtype), torch.randn(8, 4, dtype=dtype)
    inner = BASES[base](model.parameters())
    options = {"rank": 2, "refresh_every": 1000, "mode": mode}
    optimizer = precondition(inner, model, batches=[batch], **options)

    def gradient():
        optimizer.zero_grad()
        TASK(model, batch).backward()
        for i in frozen:
            list(model.parameters())[i].grad = None

    for _ in range(2):  # the first looks for copies of the weights
        gradient()
        quietly(optimizer.step)
    assert optimizer.report().gains
    gradient()
    with Launches() as preconditioned:
        optimizer.step()
    gradient()
    with Launches() as own:
        inner.step()
    return preconditioned.counts, own.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["gradient", "update"])
@pytest.mark.parametrize("base", BASES)
def test_a_step_adds_a_dozen_launches_whatever_the_number_of_parameters(base, mode, dtype):
    added = []
    for count in (4, 60):
        preconditioned, own = launches_of_a_step(count, base, mode, dtype)
        added.append(preconditioned - own)
    assert added[0] == added[1]
    assert 5 <= added[0].total() <= MOST, added[0]


@pytest.mark.parametrize("mode", ["gradient", "update"])
def test_parameters_without_a_gradient_add_one_launch_together(mode):
    frozen = range(0, 20, 3)
    without, own = launches_of_a_step(20, "sgd", mode, frozen=frozen)
    everywhere, own_everywhere = launches_of_a_step(20, "sgd", mode)
    assert (without - own).total() == (everywhere - own_everywhere).total() + 1 <= MOST


# -- the same steps, by the formula -----------------------------------------------------------


def parameters(kinds):
    """Parameters of several dtypes and memory formats, float64 copies, gradients and a P of both.

    Args:
        kinds: For each parameter its shape, dtype and memory format.
    """
    generator = torch.Generator().manual_seed(1)
    found = []
    for shape, dtype, memory_format in kinds:
        values = torch.randn(shape, generator=generator).to(dtype=dtype)
        p = nn.Parameter(values.to(memory_format=memory_format))
        p.grad = torch.randn(shape, generator=generator).to(p).to(memory_format=memory_format)
        found.append(p)
    flat = FlatParameters(found)
    basis = torch.linalg.qr(torch.randn(flat.numel, 3, generator=generator)).Q.mT.contiguous()
    values = torch.tensor([30.0, -8.0, 1.0], dtype=torch.float64)
    return found, flat, LowRankPreconditioner(basis, values, torch.zeros(3), 2)


def damped(P, tensors):
    """P times some tensors in float64, by the formula."""
    x = torch.cat([t.double().reshape(-1) for t in tensors])
    U = P.basis_mD[:2].double().mT
    x = x + U @ ((torch.tensor(P.gains, dtype=torch.float64) - 1) * (U.mT @ x))
    parts = x.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


PLAIN, LAST = torch.contiguous_format, torch.channels_last
CONVOLUTIONS = [((4, 3, 3, 3), torch.float32, LAST), ((4,), torch.float32, PLAIN)]
KINDS = {
    "float32": [((4, 3), torch.float32, PLAIN), ((5,), torch.float32, PLAIN)],
    "bfloat16": [((4, 3), torch.bfloat16, PLAIN), ((5,), torch.bfloat16, PLAIN)],
    "mixed": [((4, 3), torch.bfloat16, PLAIN), ((5,), torch.float32, PLAIN)],
    "channels last": CONVOLUTIONS,
    "both": [*CONVOLUTIONS, ((6,), torch.bfloat16, PLAIN), ((4, 2, 3, 3), torch.bfloat16, LAST)],
    "large": [((100, 90), torch.float32, PLAIN), ((9000,), torch.float32, PLAIN)],
}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # a few times eps, relative to values of 1


def assert_close(got, expected):
    tolerance = ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_damped_in_their_own_dtype_and_memory_format(kind):
    found, flat, P = parameters(KINDS[kind])
    gradients = [p.grad for p in found]
    seen = []
    damp_gradient(flat, P, lambda: seen.extend(p.grad for p in found))
    for g, before, expected in zip(seen, gradients, damped(P, gradients), strict=True):
        assert (g.dtype, g.stride()) == (before.dtype, before.stride())
        assert_close(g, expected)
    assert all(p.grad is g for p, g in zip(found, gradients, strict=True))


@pytest.mark.parametrize("absent", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_damped_in_any_dtype_and_memory_format(kind, absent):
    found, flat, P = parameters(KINDS[kind])
    if absent is not None:
        found[absent].grad = None
    before = [p.detach().clone() for p in found]
    strides = [p.stride() for p in found]
    update = DampedUpdate(flat)
    with torch.no_grad():
        for p in found:
            if p.grad is not None:
                p.sub_(p.grad)
        moved = [p.detach().double() - w.double() for p, w in zip(found, before, strict=True)]
        update.finish(P)
    for i, (p, w, d) in enumerate(zip(found, before, damped(P, moved), strict=True)):
        if i == absent:
            assert torch.equal(p, w)
        else:
            assert_close(p.detach(), w.double() + d)
    assert [p.stride() for p in found] == strides


@pytest.mark.parametrize("kind", ["float32", "mixed", "large"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_stays_where_it_is(bad, kind):
    found, flat, P = parameters(KINDS[kind])
    found[0].grad[0] = bad
    gradients = [p.grad for p in found]
    seen = []
    damp_gradient(flat, P, lambda: seen.extend(p.grad.clone() for p in found))
    for g, expected in zip(seen, gradients, strict=True):
        torch.testing.assert_close(g, expected, rtol=0, atol=0, equal_nan=True)
    update = DampedUpdate(flat)
    with torch.no_grad():
        for p in found:
            p.sub_(p.grad)
        stepped = [p.detach().clone() for p in found]
        update.finish(P)
    for p, expected in zip(found, stepped, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0, equal_nan=True)


def test_large_finite_gradients_are_damped_though_their_sum_overflows():
    found, flat, P = parameters(KINDS["float32"])
    U = P.basis_mD[:2]
    flat_gradient = 3e38 * (U[0] + U[1])  # the products with U are 3e38 each
    for p, part in zip(found, flat.split(flat_gradient), strict=True):
        p.grad = part.clone()
    seen = []
    damp_gradient(flat, P, lambda: seen.extend(p.grad for p in found))
    expected = 3e38 * (P.gains[0] * U[0].double() + P.gains[1] * U[1].double())
    got = torch.cat([g.reshape(-1) for g in seen])
    torch.testing.assert_close(got.double() / 3e38, expected / 3e38, rtol=1e-5, atol=1e-5)
