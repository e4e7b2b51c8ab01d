"""Recurrent layers by their formulas: the values and derivatives of torch's own."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from hesscurv.objective.running.unfused_cells import UnfusedCells, has_cells
from hesscurv.operators.ways.tracing import load_forward_rules

OPTIONS = {
    "one layer": {},
    "batch first": {"batch_first": True},
    "two layers, both ways": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
}


class Net(nn.Module):
    def __init__(self, kind, packed=False, **options):
        super().__init__()
        self.rnn, self.packed = kind(3, 4, **options), packed

    def forward(self, x):
        if self.packed:
            first = self.rnn.batch_first
            x = pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=first)
            return self.rnn(x)[0].data
        return self.rnn(x)[0]


class Cells(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cell = kind(3, 4, **options)

    def forward(self, x):
        state = None
        for step in x:
            state = self.cell(step, state)
        return torch.stack(state) if isinstance(state, tuple) else state


def build(what, kind, options):
    torch.manual_seed(0)
    if what == "cells":
        return Cells(kind, bias=options.get("bias", True)).double(), torch.randn(3, 2, 3).double()
    first = options.get("batch_first", False)
    shape = (2, 4, 3) if first else (4, 2, 3)
    return Net(kind, what == "packed", **options).double(), torch.randn(shape).double()


CASES = [
    (what, kind, name)
    for what, kinds in {
        "padded": (nn.LSTM, nn.GRU),
        "packed": (nn.LSTM, nn.GRU),
        "cells": (nn.LSTMCell, nn.GRUCell),
    }.items()
    for kind in kinds
    for name in (OPTIONS if what != "cells" else ("one layer", "without bias"))
]


@pytest.fixture(autouse=True)
def rules():
    load_forward_rules()  # with torch's warnings of its own code


def skip_if_fused_anyway(kind):
    if kind is nn.LSTM and torch.__version__ < "2.7":
        pytest.skip("the decomposition takes oneDNN's layer, which is of CPUs alone")


@pytest.mark.parametrize(("what", "kind", "name"), CASES)
def test_values_and_second_derivatives_are_those_of_torch(what, kind, name):
    skip_if_fused_anyway(kind)
    model, x = build(what, kind, OPTIONS[name])
    params = dict(model.named_parameters())
    direction = {n: torch.randn_like(p) for n, p in params.items()}

    def loss(values):
        return torch.func.functional_call(model, values, x).tanh().square().sum()

    def by_backward():
        slopes = torch.autograd.grad(loss(params), list(params.values()), create_graph=True)
        product = torch.autograd.grad(slopes, list(params.values()), list(direction.values()))
        return slopes, product

    expected = by_backward()
    with UnfusedCells():
        torch.testing.assert_close(by_backward(), expected, rtol=1e-11, atol=1e-13)
        if what != "packed":  # whose sizes are data, which functions of functions cannot read
            got = torch.func.jvp(torch.func.grad(loss), (params,), (direction,))
            torch.testing.assert_close(
                tuple(tuple(part.values()) for part in got), expected, rtol=1e-11, atol=1e-13
            )


@pytest.mark.parametrize(("what", "kind"), [("padded", nn.LSTM), ("cells", nn.GRUCell)])
def test_no_fused_operation_is_left(what, kind):
    skip_if_fused_anyway(kind)
    model, x = build(what, kind, {})
    seen = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with UnfusedCells(), Names():
        model(x)
    assert any("sigmoid" in name for name in seen)
    assert not any("lstm" in name or "gru" in name for name in seen)


def test_which_modules_have_cells():
    assert has_cells(nn.LSTM(2, 2))
    assert not has_cells(nn.RNN(2, 2))
