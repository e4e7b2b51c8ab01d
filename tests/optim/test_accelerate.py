"""Hugging Face Accelerate: prepared as any optimizer, with the same training and checkpoints."""

import pytest
import torch
from optim.training import TASK, data, net, precondition, weights
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its state in classes, from one test to the next."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def loader():
    inputs, targets = (torch.cat(parts) for parts in zip(*data(5), strict=True))
    return DataLoader(TensorDataset(inputs, targets), 8)


def build(base, batches=None, seed=1):
    model = net(seed=seed)
    # Of a loader with more samples than that, which is left in the midst of an epoch.
    optimizer = precondition(BASES[base](model.parameters()), model, TASK, batches, samples=16)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


def epoch(model, optimizer, batches, scheduler, accelerator=None):
    for batch in batches:
        optimizer.zero_grad()
        loss = TASK(model, batch)
        accelerator.backward(loss) if accelerator else loss.backward()
        optimizer.step()
        scheduler.step()


def prepared(base, **options):
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model, optimizer, scheduler = build(base)
    return accelerator, model, accelerator.prepare(model, optimizer, loader(), scheduler)


@pytest.mark.parametrize("base", BASES)
def test_training_is_as_without(base):
    model, optimizer, scheduler = build(base)
    epoch(model, optimizer, loader(), scheduler)
    accelerator, other, (wrapped, accelerated, batches, rates) = prepared(base)
    epoch(wrapped, accelerated, batches, rates, accelerator)
    assert torch.equal(weights(other), weights(model))
    assert accelerated.optimizer.report().refreshes == optimizer.report().refreshes == 2
    assert accelerated.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("base", BASES)
def test_a_saved_state_resumes_with_the_same_bits(base, tmp_path):
    accelerator, model, (wrapped, optimizer, batches, scheduler) = prepared(base)
    epoch(wrapped, optimizer, batches, scheduler, accelerator)
    accelerator.save_state(str(tmp_path))
    epoch(wrapped, optimizer, batches, scheduler, accelerator)
    expected = weights(model)
    # The same objects, taken back; and those of another process.
    accelerator.load_state(str(tmp_path))
    epoch(wrapped, optimizer, batches, scheduler, accelerator)
    assert torch.equal(weights(model), expected)
    accelerate.state.AcceleratorState._reset_state(True)
    again = accelerate.Accelerator(cpu=True)
    other, another, rates = build(base, seed=9)
    parts = again.prepare(other, another, loader(), rates)
    again.load_state(str(tmp_path))
    epoch(*parts, again)
    assert torch.equal(weights(other), expected)


def test_gradients_are_accumulated_over_steps():
    accelerator, model, (wrapped, optimizer, batches, _) = prepared(
        "SGD", gradient_accumulation_steps=2
    )
    for batch in batches:
        with accelerator.accumulate(wrapped):
            optimizer.zero_grad()
            accelerator.backward(TASK(wrapped, batch))
            optimizer.step()
    assert optimizer.optimizer.report().steps == 3  # of five batches, the last by itself
    assert torch.isfinite(weights(model)).all()


def test_curvature_on_a_prepared_loader_does_not_disturb_the_accelerator():
    def steps_of(prepare_both):
        """After which batches a step was taken, as the accelerator's own counting has it."""
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        batches, other = loader(), loader()
        if prepare_both:
            batches, other = accelerator.prepare(batches, other)
        model, optimizer, _ = build("SGD", other)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        batches = batches if prepare_both else accelerator.prepare(batches)
        found = []
        for i, batch in enumerate(batches):
            with accelerator.accumulate(wrapped):
                accelerator.backward(TASK(wrapped, batch))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                found.append(i)
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
        return found, weights(model)

    (found, got), (expected, plain) = steps_of(True), steps_of(False)
    assert found == expected == [1, 3, 4]
    assert torch.equal(got, plain)
