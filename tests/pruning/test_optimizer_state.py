"""Running averages of pruned weights are zero, and all others as they were."""

import copy

import pytest
import torch
from optim.wrapping_optimizers import SAM, Lookahead
from prunable import TASK, data, network
from torch.nn.utils import prune

from hesscurv.optim import PreconditionedOptimizer
from hesscurv.pruning import find_weights, mask_optimizer_state_

OPTIMIZERS = {
    "momentum": lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, 0.01),
    "AMSGrad": lambda ps: torch.optim.Adam(ps, 0.01, amsgrad=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 0.01, momentum=0.5, centered=True),
}


def trained(make):
    model = network()
    optimizer = make(model.parameters())
    for batch in data():
        optimizer.zero_grad()
        TASK(model, batch).backward()
        optimizer.step()
    return model, optimizer


def pruned(model):
    """Prune half of all weights at random; return the masks by the parameters that are kept."""
    masks = {}
    for module, name in find_weights(model).values():
        prune.random_unstructured(module, name, 0.5)
        masks[getattr(module, f"{name}_orig")] = getattr(module, f"{name}_mask") != 0
    return masks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_entries_are_zero_and_others_bitwise_as_before(name):
    model, optimizer = trained(OPTIMIZERS[name])
    masks = pruned(model)
    before = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    count = mask_optimizer_state_(optimizer, model)
    seen = 0
    for p, state in optimizer.state.items():
        mask = masks.get(p, torch.ones_like(p, dtype=torch.bool))
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                assert torch.equal(value, before[p][key].where(mask, torch.zeros_like(value)))
                assert bool((before[p][key] != 0).any())
                seen += p in masks
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, before[p][key])
    assert seen == count > 0


@pytest.mark.parametrize("told", [True, False])
def test_pruned_weights_stand_still_under_their_masks_if_it_is_told(told):
    model, optimizer = trained(OPTIMIZERS["momentum"])
    pruned(model)
    if told:
        mask_optimizer_state_(optimizer, model)
    stored, mask = model[0].weight_orig, model[0].weight_mask != 0
    before = stored.detach().clone()
    optimizer.zero_grad()
    TASK(model, data()[0]).backward()
    optimizer.step()
    assert torch.equal(stored[~mask], before[~mask]) is told
    assert not torch.equal(stored[mask], before[mask])


def test_infinite_averages_of_pruned_weights_become_zero():
    model, optimizer = trained(OPTIMIZERS["momentum"])
    pruned(model)
    buffer = optimizer.state[model[0].weight_orig]["momentum_buffer"]
    buffer.fill_(float("inf"))
    mask_optimizer_state_(optimizer, model)
    mask = model[0].weight_mask != 0
    assert bool((buffer[~mask] == 0).all())
    assert bool(buffer[mask].isinf().all())


def test_a_wrapper_is_looked_through():
    model, base = trained(OPTIMIZERS["Adam"])
    wrapped = PreconditionedOptimizer(base, model, TASK, data(), rank=2)
    pruned(model)
    assert mask_optimizer_state_(wrapped, model) == 2 * len(find_weights(model))


def test_a_dense_model_and_one_without_states_are_left_alone():
    model, optimizer = trained(OPTIMIZERS["Adam"])
    assert mask_optimizer_state_(optimizer, model) == 0
    pruned(model)
    fresh = torch.optim.Adam(model.parameters())
    assert mask_optimizer_state_(fresh, model) == 0
    assert len(fresh.state) == 0


def test_refuses_what_is_no_optimizer():
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got Conv2d"):
        mask_optimizer_state_(network()[0], network())


@pytest.mark.parametrize("preconditioned", [False, True])
def test_of_optimizers_around_others_both_states_are_masked(preconditioned):
    def around(parameters):
        return Lookahead(torch.optim.SGD(parameters, 0.01, momentum=0.9))

    model, optimizer = trained(around)
    masks = pruned(model)
    outer = optimizer
    if preconditioned:
        outer = PreconditionedOptimizer(optimizer, model, TASK, data())
    assert mask_optimizer_state_(outer, model) == 2 * len(masks)
    for p, mask in masks.items():
        for value in (
            optimizer.state[p]["slow_params"],
            optimizer.optimizer.state[p]["momentum_buffer"],
        ):
            assert not value[~mask].any()
            assert value[mask].any()


def test_a_state_that_two_optimizers_share_is_counted_once():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01, momentum=0.9)
    for batch in data():
        optimizer.zero_grad()
        TASK(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        TASK(model, batch).backward()
        optimizer.second_step()
    masks = pruned(model)
    assert mask_optimizer_state_(optimizer, model) == len(masks)


def test_averages_that_a_wrapper_shares_with_its_base_are_counted_once():
    model, base = trained(OPTIMIZERS["momentum"])
    wrapper = torch.optim.SGD(model.parameters(), 0.01)
    wrapper.base, wrapper.state = base, base.state
    masks = pruned(model)
    assert mask_optimizer_state_(wrapper, model) == len(masks)
