"""Which parameters are preconditioned: groups, frozen ones, missing gradients, other models'."""

import copy

import pytest
import torch
from optim.training import (
    DIM,
    EXACT,
    SPECTRA,
    TASK,
    Quadratic,
    data,
    dense_preconditioner,
    net,
    precondition,
    quadratic_data,
    quadratic_loss,
    set_gradients,
    sgd,
    train,
    weights,
)
from torch import nn

from hesscurv.optim.group_settings import DAMPING, EVERY, RANK

CLOSE = {"rtol": 1e-7, "atol": 1e-7}  # as in test_preconditioner_rules.py


def quadratic(base, model, **options):
    options = {"tol": EXACT, "refresh_every": 1} | options
    return precondition(
        base, model, quadratic_loss, quadratic_data(SPECTRA["indefinite"]), **options
    )


def dense_of(model, parts):
    """P of the Hessian's block of some of a quadratic's parameters, and which entries these are."""
    H = quadratic_data(SPECTRA["indefinite"])[0][0]
    sizes = [p.numel() for p in model.parts]
    index = torch.cat([torch.arange(DIM).split(sizes)[i] for i in parts])
    return dense_preconditioner(H[index][:, index], 3), index


def step(model, optimizer, g):
    """Take a step with these gradients; return what was subtracted from the weights."""
    before = weights(model)
    set_gradients(model, g)
    optimizer.step()
    return before - weights(model)


def gradient():
    return torch.randn(DIM, dtype=torch.float64)


# -- groups -----------------------------------------------------------------------------------


def test_hyperparameters_are_in_every_group_and_the_bases_stay():
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    optimizer = precondition(torch.optim.SGD(groups, lr=0.2), model, rank=2, damping=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]
    for group in optimizer.param_groups:
        assert [group[key] for key in (RANK, DAMPING, EVERY)] == [2, 0.5, 3]
    assert optimizer.defaults[RANK] == 2
    assert optimizer.defaults["lr"] == 0.2


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_a_group_added_later_is_preconditioned_from_the_next_step_on(through):
    model = Quadratic()
    first, second, third = model.parts
    optimizer = quadratic(torch.optim.SGD([first, third], lr=1.0), model, refresh_every=100)
    P, index = dense_of(model, [0, 2])
    g = gradient()
    moved = step(model, optimizer, g)
    torch.testing.assert_close(moved[index], P @ g[index], **CLOSE)
    assert not moved[6:10].any()
    (optimizer if through == "wrapper" else optimizer.base).add_param_group(
        {"params": [second], "lr": 0.5}
    )
    moved = step(model, optimizer, g)
    P, _ = dense_of(model, [0, 1, 2])
    rates = torch.ones(DIM, dtype=torch.float64)
    rates[6:10] = 0.5
    torch.testing.assert_close(moved, rates * (P @ g), **CLOSE)
    assert optimizer.report().refreshes == 2
    assert optimizer.param_groups[1][RANK] == 3


def test_a_group_that_the_base_refuses_is_refused():
    model = net()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model[0].weight]})
    assert len(optimizer.param_groups) == 1


def test_a_base_may_be_wrapped_again_with_other_settings():
    model = net()
    optimizer = sgd(model, damping=3.0)
    train(model, optimizer, 2)
    again = precondition(optimizer.base, model, rank=5, damping=None, refresh_every=7)
    assert [again.param_groups[0][key] for key in (RANK, DAMPING, EVERY)] == [5, None, 7]
    assert again.report().steps == 0
    train(model, again, 1)
    assert len(again.report().gains) == 5


# -- frozen and selected ----------------------------------------------------------------------


def test_frozen_parameters_are_left_out_and_come_in_when_freed():
    model = Quadratic()
    model.parts[1].requires_grad_(False)
    optimizer = quadratic(torch.optim.SGD(model.parameters(), lr=1.0), model, refresh_every=100)
    P, index = dense_of(model, [0, 2])
    g = gradient()
    before = weights(model)
    set_gradients(model, g)
    model.parts[1].grad = None
    optimizer.step()
    moved = before - weights(model)
    torch.testing.assert_close(moved[index], P @ g[index], **CLOSE)
    assert not moved[6:10].any()
    model.parts[1].requires_grad_(True)
    P, _ = dense_of(model, [0, 1, 2])
    torch.testing.assert_close(step(model, optimizer, g), P @ g, **CLOSE)
    model.parts[0].requires_grad_(False)
    P, index = dense_of(model, [1, 2])
    moved = step(model, optimizer, g)
    torch.testing.assert_close(moved[index], P @ g[index], **CLOSE)
    # It has a gradient still, and so the base steps along that.
    torch.testing.assert_close(moved[:6], g[:6], **CLOSE)


def test_all_may_be_frozen_for_a_while():
    model = net()
    optimizer = sgd(model, params=["0", "2.weight"])
    train(model, optimizer, 2)
    model.requires_grad_(False)
    before, refreshes = weights(model), optimizer.report().refreshes
    optimizer.zero_grad()
    optimizer.step()
    state = optimizer.state_dict()
    assert torch.equal(weights(model), before)
    model.requires_grad_(True)
    optimizer.load_state_dict(state)
    train(model, optimizer, 1)
    assert optimizer.report().refreshes == refreshes + 1  # due, after three steps


@pytest.mark.parametrize(
    "params", [["parts.0", "parts.2"], lambda name, p: name != "parts.1", "parameters"]
)
def test_selected_parameters_are_preconditioned_and_the_others_stepped_by_the_base(params):
    model = Quadratic()
    params = [model.parts[2], model.parts[0]] if params == "parameters" else params
    optimizer = quadratic(torch.optim.SGD(model.parameters(), lr=1.0), model, params=params)
    P, index = dense_of(model, [0, 2])
    g = gradient()
    moved = step(model, optimizer, g)
    torch.testing.assert_close(moved[index], P @ g[index], **CLOSE)
    torch.testing.assert_close(moved[6:10], g[6:10], **CLOSE)


def test_parameters_that_are_not_the_models_are_stepped_by_the_base():
    model, other = Quadratic(), nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = quadratic(torch.optim.SGD([other, *model.parts], lr=1.0), model)
    other.grad = torch.full((5,), 0.5, dtype=torch.float64)
    g = gradient()
    moved = step(model, optimizer, g)
    torch.testing.assert_close(moved, dense_of(model, [0, 1, 2])[0] @ g, **CLOSE)
    assert torch.equal(other, torch.full((5,), 0.5, dtype=torch.float64))


def test_parameters_of_the_model_that_are_not_the_optimizers_are_constants():
    model = Quadratic()
    optimizer = quadratic(torch.optim.SGD([model.parts[0]], lr=1.0), model)
    P, index = dense_of(model, [0])
    g = gradient()
    moved = step(model, optimizer, g)
    torch.testing.assert_close(moved[index], P @ g[index], **CLOSE)
    assert not moved[6:].any()


# -- missing and sparse gradients -------------------------------------------------------------

DECAYING = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
}


@pytest.mark.parametrize("base", DECAYING)
def test_a_parameter_without_a_gradient_is_left_alone_also_by_weight_decay(base):
    model, alone = Quadratic(), Quadratic()
    optimizer, plain = (
        quadratic(DECAYING[base](model.parameters()), model),
        DECAYING[base](alone.parameters()),
    )
    set_gradients(model, gradient())
    optimizer.step()
    with torch.no_grad():
        for p, q in zip(model.parts, alone.parts, strict=True):
            q.copy_(p)
    plain.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    before, g = weights(model), gradient()
    for m, o in ((model, optimizer), (alone, plain)):
        set_gradients(m, g)
        m.parts[1].grad = None
        o.step()
    moved, by_base = before - weights(model), before - weights(alone)
    assert not by_base[6:10].any()
    assert not moved[6:10].any()
    assert model.parts[1].grad is None
    P = dense_of(model, [0, 1, 2])[0]
    if base == "AdamW":  # the update is multiplied, and what has none is not moved by the others'
        expected = P @ by_base
        expected[6:10] = 0
        torch.testing.assert_close(moved, expected, **CLOSE)


def test_a_step_without_any_gradient_is_the_bases():
    model = net()
    optimizer = sgd(model)
    before = weights(model)
    optimizer.step()
    assert torch.equal(weights(model), before)
    assert optimizer.report().steps == optimizer.report().refreshes == 0
    train(model, optimizer, 1)
    assert optimizer.report().steps == optimizer.report().refreshes == 1


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 3, sparse=sparse)
        self.out = nn.Linear(3, 1)
        self.double()

    def forward(self, words):
        return self.out(self.embedding(words).mean(1))


def test_sparse_embeddings_are_stepped_by_the_base_and_keep_their_gradients():
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randint(5, (8, 2), generator=generator), torch.randn(8, 1).double())
    model, alone = Words(True), Words(False)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    # The task's embedding is dense for a Hessian; here that of the other layer alone is taken.
    optimizer = precondition(base, model, batches=[batch], rank=1, refresh_every=2)
    selected = ["out"]
    reference = precondition(
        torch.optim.SGD(alone.parameters(), lr=0.1),
        alone,
        TASK,
        [batch],
        rank=1,
        refresh_every=2,
        params=selected,
    )
    for _ in range(5):
        for m, o in ((model, optimizer), (alone, reference)):
            o.zero_grad()
            TASK(m, batch).backward()
            found = m.embedding.weight.grad
            o.step()
            assert m.embedding.weight.grad is found
            assert found.is_sparse == (m is model)
    torch.testing.assert_close(weights(model), weights(alone), rtol=1e-12, atol=1e-12)
    assert torch.equal(model.embedding.weight[5:], Words(True).embedding.weight[5:])  # never seen
    assert optimizer.report().failures == 0


@pytest.mark.parametrize("mode", ["gradient", "update"])
def test_a_gradient_that_is_sparse_once_is_left_to_the_base(mode):
    """As of a functional embedding, which no module tells of beforehand."""
    model = Quadratic(shapes=[(4, 2), (4,)])
    optimizer = quadratic(torch.optim.SGD(model.parameters(), lr=1.0), model, mode=mode)
    step(model, optimizer, gradient())
    before, refreshes = weights(model), optimizer.report().refreshes
    rows, values = torch.tensor([[1, 3]]), torch.ones(2, 2, dtype=torch.float64)
    sparse = torch.sparse_coo_tensor(rows, values, (4, 2), check_invariants=True)
    model.parts[0].grad, model.parts[1].grad = sparse, None
    optimizer.step()
    moved = (before - weights(model))[:8].view(4, 2)
    torch.testing.assert_close(moved, sparse.to_dense(), rtol=1e-12, atol=1e-12)
    assert optimizer.report().refreshes == refreshes + 1


# -- models that change -----------------------------------------------------------------------


def test_another_dtype_or_shape_begins_anew():
    model = net(torch.float32)
    batches = data()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = precondition(base, model, TASK, batches, refresh_every=100)
    model.double()
    train(model, optimizer, 2)
    assert optimizer._tracked.current.basis_mD.dtype == torch.float64
    model[0], model[2] = nn.Linear(5, 4).double(), nn.Linear(4, 1).double()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, 2)
    assert (optimizer.report().refreshes, optimizer.report().failures) == (2, 0)


def test_half_precision_parameters_have_a_basis_in_float32():
    model = net(torch.bfloat16)
    batches = data(dtype=torch.bfloat16)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = precondition(base, model, TASK, batches)
    train(model, optimizer, 4)
    assert optimizer.report().failures == 0
    assert optimizer._tracked.current.basis_mD.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in model.parameters())
