"""torch.distributed.checkpoint in a single process: into a new optimizer before its first step."""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim.training import TASK, data, net, precondition, train, weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
OPTIONS = {"nested": StateDictOptions(), "flat": FLAT}


def build(base, seed=1):
    model = net(seed=seed)
    options = {} if base == "AdamW" else {"learning_rate": "auto", "max_growth": 2.0}
    return model, precondition(BASES[base](model.parameters()), model, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", BASES)
def test_training_resumes_with_the_same_bits_through_state_dicts(base, options):
    model, optimizer = build(base)
    train(model, optimizer, 2)
    state = get_optimizer_state_dict(model, optimizer, options=OPTIONS[options])
    # Both refer to tensors that training goes on with, as ever.
    state, expected_weights = copy.deepcopy((state, get_model_state_dict(model)))
    expected = train(model, optimizer, 6, first=2)
    other, resumed = build(base, seed=9)
    set_model_state_dict(other, expected_weights)
    set_optimizer_state_dict(other, resumed, state, options=OPTIONS[options])
    assert resumed.param_groups[0]["lr"] == 0.01
    assert torch.equal(train(other, resumed, 6, first=2), expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", BASES)
def test_training_resumes_with_the_same_bits_through_files(base, options, tmp_path):
    def states(model, optimizer):
        found = get_state_dict(model, optimizer, options=OPTIONS[options])
        return dict(zip(("model", "optimizer"), found, strict=True))

    model, optimizer = build(base)
    train(model, optimizer, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # and so a single process
        dcp.save(states(model, optimizer), checkpoint_id=tmp_path)
        expected = train(model, optimizer, 6, first=2)
        other, resumed = build(base, seed=9)
        state = states(other, resumed)
        dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        other,
        resumed,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=OPTIONS[options],
    )
    assert torch.equal(train(other, resumed, 6, first=2), expected)


@pytest.mark.parametrize("base", BASES)
def test_asking_for_the_state_before_the_first_step_changes_nothing(base):
    model, optimizer = build(base)
    other, asked = build(base)
    before = weights(other)
    state = get_optimizer_state_dict(other, asked)
    assert torch.equal(weights(other), before)
    assert all(p.grad is None for p in other.parameters())
    assert asked.report().steps == asked.report().refreshes == 0
    for name, p in other.named_parameters():
        assert state["state"][name]["curvature_basis"].shape == (*p.shape, 4)
    if base == "SGD":  # others have zeros in their state by then, and AdamW counts a step
        assert torch.equal(train(other, asked, 5), train(model, optimizer, 5))


def test_a_state_from_before_the_first_step_is_one_to_begin_with():
    model, optimizer = build("SGD")
    state = get_optimizer_state_dict(model, optimizer)
    other, resumed = build("SGD")
    set_optimizer_state_dict(other, resumed, state)
    assert torch.equal(train(other, resumed, 5), train(model, optimizer, 5))
    assert resumed.report().refreshes == 2


def test_parameters_without_an_eigenspace_are_in_the_checkpoint_as_the_bases():
    def start(seed):
        model = net(seed=seed)
        model[0].bias.requires_grad_(False)
        base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        return model, precondition(base, model, TASK, data(), params=["0.weight", "2"])

    model, optimizer = start(1)
    train(model, optimizer, 2)
    state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    state, model_state = copy.deepcopy((state, model.state_dict()))
    expected = train(model, optimizer, 4, first=2)
    other, resumed = start(9)
    other.load_state_dict(model_state)
    set_optimizer_state_dict(other, resumed, state, options=FLAT)
    assert torch.equal(train(other, resumed, 4, first=2), expected)
