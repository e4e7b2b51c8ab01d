"""Pruning a model in one call: what it leaves alone, and what stays afterwards."""

import copy
import importlib

import pytest
import torch
from prunable import METHODS, SEEDS, TASK, data, flat_mask, loss_of, network, run
from torch.nn.utils import prune

from hesscurv.pruning.masks.state_dicts import masks_of
from hesscurv.pruning.run.prune_model import prune_model


def bits(net):
    """All there is to compare: tensors and their order, modes, hooks, gradients."""
    tensors = {n: t.detach().clone() for n, t in net.state_dict().items()}
    modules = [
        (m.training, len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m)))
        for m in net.modules()
    ]
    needs = [(n, p.requires_grad) for n, p in net.named_parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    plain = [(m.weight.detach().clone()) for m in net.modules() if hasattr(m, "weight")]
    return tensors, modules, needs, grads, plain


def assert_same_bits(net, before):
    after = bits(net)
    assert list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][n], t) for n, t in before[0].items())
    assert after[1:3] == before[1:3]
    for new, old in zip(after[3] + after[4], before[3] + before[4], strict=True):
        assert new is old is None or torch.equal(new, old)


# -- models that are pruned already -----------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", ["l1_unstructured", "prune_model"])
def test_a_pruned_model_is_pruned_further(first, seed):
    net = network(seed)
    if first == "prune_model":
        run(net, sparsity=0.4)
    else:
        with torch.no_grad():  # else the module cannot be copied
            prune.l1_unstructured(net[0], "weight", 0.5)
            prune.l1_unstructured(net[6], "weight", 0.3)
    before = masks_of(net)
    report = run(net, sparsity=0.8)
    masks = masks_of(net)
    assert all(not bool((masks[n] & ~m).any()) for n, m in before.items())
    assert int(flat_mask(net).sum()) == 356 - round(0.8 * 356) == report.kept
    assert report.loss == pytest.approx(loss_of(net), rel=1e-10)
    assert all(len(net[i]._forward_pre_hooks) == 1 for i in (0, 3, 6))
    # The sparsity rises from what there was.
    assert report.stages[0].sparsity > 1 - sum(int(m.sum()) for m in before.values()) / 356 - 0.5


def test_less_sparsity_than_there_is_is_an_error():
    net = network()
    run(net, sparsity=0.6)
    before = bits(net)
    with pytest.raises(ValueError, match=r"at least the present one, 0\.6.* of all weights"):
        run(net, sparsity=0.5)
    with pytest.raises(ValueError, match=r"at least the present one, .* of 0, got 0\.01"):
        run(net, scope={"0": 0.01})
    assert_same_bits(net, before)


# -- what it leaves alone ---------------------------------------------------------------------


def prepared(pruned=False):
    """In a mixture of modes, with gradients and a frozen bias."""
    net = network()
    if pruned:
        run(net, sparsity=0.3)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    net.train()[3].eval()
    net[0].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_step_leaves_the_model_bitwise_as_it_was(error, pruned):
    net = prepared(pruned)
    before, random, parameters = bits(net), torch.get_rng_state(), list(net.parameters())

    def stop(step, weights):
        if step.gradients > 16:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        run(net, on_step=stop)
    assert_same_bits(net, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))


def test_an_error_at_the_very_end_leaves_the_model_bitwise_as_it_was(monkeypatch):
    net = prepared()
    before = bits(net)

    def fail(model, *_):
        model[1].running_mean.zero_()
        raise RuntimeError("no more memory")

    monkeypatch.setattr(importlib.import_module(prune_model.__module__), "recalibrate_", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        run(net, recalibrate_batch_norm=True)
    assert_same_bits(net, before)


@pytest.mark.parametrize("method", METHODS)
def test_all_but_the_selected_weights_is_as_before(method):
    net = prepared()
    others = {n: t.clone() for n, t in net.state_dict().items() if n != "3.weight"}
    modes, random = [m.training for m in net.modules()], torch.get_rng_state()
    parameters, grads = dict(net.named_parameters()), [p.grad.clone() for p in net.parameters()]
    run(net, weights="3", method=method)
    state = net.state_dict()
    assert all(torch.equal(state[n], t) for n, t in others.items())
    assert set(state) == {*others, "3.weight_orig", "3.weight_mask"}
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    after = {n.removesuffix("_orig"): p for n, p in net.named_parameters()}
    assert all(after[n] is p for n, p in parameters.items())
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters.values(), grads, strict=True))
    assert not net[0].bias.requires_grad


class Noisy(torch.utils.data.Dataset):
    """Samples that are another each time, drawn by torch's generator."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return torch.randn(3, 4, 4).double(), i % 3


def test_loaders_that_shuffle_and_augment_work_and_leave_the_random_state():
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=16, shuffle=True)
    net, random = network(), torch.get_rng_state()
    report = run(net, loader, stages=3, gradients_per_stage=24, recalibrate_batch_norm=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert report.gradients == 72
    again = network()
    torch.set_rng_state(random)
    run(again, loader, stages=3, gradients_per_stage=24, recalibrate_batch_norm=True)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("method", ["obs", "obd"])
def test_one_seed_gives_one_result_bit_for_bit(method):
    found = []
    for seed in (3, 3, 4):
        net = network()
        run(net, method=method, generator=torch.Generator().manual_seed(seed))
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        torch.rand(5)  # torch's own generator does not matter
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# -- afterwards -------------------------------------------------------------------------------


def test_batch_statistics_measured_anew_are_reported_apart():
    net, plain = network().train(), network()
    run(plain)
    momentum = net[1].momentum
    report = run(net, recalibrate_batch_norm=True)
    with torch.no_grad():
        ys = [net[0](x) for x, _ in data()]
    mean = torch.stack([y.mean((0, 2, 3)) for y in ys]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in ys]).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(net[1].running_var, var, rtol=1e-10, atol=1e-12)
    assert report.loss == pytest.approx(loss_of(plain), rel=1e-10)
    assert report.recalibrated_loss == pytest.approx(loss_of(net), rel=1e-10)
    assert net[1].momentum == momentum
    assert all(m.training for m in net.modules())


def test_masks_stay_through_training_and_become_permanent():
    net = network()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    run(net)
    copied, masks = copy.deepcopy(net), masks_of(net)
    assert loss_of(copied) == loss_of(net)
    before = net[3].weight_orig.detach().clone()
    for _ in range(2):
        optimiser.zero_grad()
        TASK(net, data()[0]).backward()
        optimiser.step()
    assert not torch.equal(net[3].weight_orig, before)
    for name in masks:
        module = net[int(name[0])]
        prune.remove(module, "weight")
        assert not bool(module.weight[~masks[name]].any())
    assert not masks_of(net)


def test_a_frozen_rest_is_no_hindrance():
    net = network().requires_grad_(False)
    net[3].weight.requires_grad_(True)
    report = run(net, recalibrate_batch_norm=True)
    assert report.recalibrated_loss == pytest.approx(loss_of(net), rel=1e-10)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["3.weight_orig"]
