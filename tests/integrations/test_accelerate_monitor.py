"""Accelerate: a monitor in a plain loop over a prepared model, optimizer and loader."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hesscurv
from hesscurv.hooks import CurvatureMonitor, every

accelerate = pytest.importorskip("accelerate")

TASK = hesscurv.supervised(nn.CrossEntropyLoss())


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its state in classes, from one test to the next."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def train(watch, precision="no"):
    """Weights and records of ten batches, two of which make a step."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=precision
    )
    torch.manual_seed(1)
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    monitor, step, records = None, 0, []
    if watch:
        monitor = CurvatureMonitor(
            model, TASK, loader, k=2, samples=16, schedule=every(2), optimizer=optimizer
        )
        records = monitor.records
    for _ in range(2):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                if monitor is not None:
                    monitor.step(step)
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), records, (x, y), model


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_has_the_same_bits_with_a_monitor(precision):
    expected = train(False, precision)[0]
    found, records, _, _ = train(True, precision)
    assert torch.equal(found, expected)
    assert [(r["step"], r["status"]) for r in records] == [(2, "ok"), (4, "ok"), (6, "ok")]
    assert {r["learning_rate"] for r in records} == {0.1}


def test_products_are_in_full_precision_whatever_accelerates_is():
    _, _, data, model = train(False, "bf16")
    wrapped = hesscurv.HessianOperator(model, TASK, [data])
    v = torch.randn(wrapped.shape[0])
    exact = hesscurv.HessianOperator(model, TASK, [data], compute_dtype=torch.float64) @ v.double()
    # Rounding to bfloat16 in the forward pass would show from 1e-3 on.
    torch.testing.assert_close((wrapped @ v).double(), exact, rtol=1e-4, atol=1e-6)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(wrapped @ v, hesscurv.HessianOperator(plain, TASK, [data]) @ v)
    # And the training goes on as accelerate has it.
    assert "autocast" in str(model.forward.__func__.__code__.co_varnames) or hasattr(
        model, "_original_forward"
    )
