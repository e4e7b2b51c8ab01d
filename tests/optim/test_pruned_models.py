"""A model that is pruned in training goes on with a preconditioner of its own masks."""

import pytest
import torch
from optim.training import TASK, data, precondition
from torch import nn
from torch.nn.utils import prune

from hesscurv.pruning import find_weights


def net(bias):
    torch.manual_seed(0)
    layers = nn.Linear(5, 8, bias=bias), nn.Softplus(), nn.Linear(8, 1, bias=bias)
    return nn.Sequential(*layers).double()


def train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        TASK(model, data()[step % 4]).backward()
        optimizer.step()


# Without biases the parameters keep their order, and only their names are others.
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("params", [None, ["0.weight"], lambda name, p: "weight" in name])
def test_the_eigenspace_is_measured_anew_where_parameters_are_renamed(bias, params):
    model = net(bias)
    base = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    optimizer = precondition(base, model, params=params, rank=2, refresh_every=3, tol=1e-8)
    train(model, optimizer, 4)
    before = optimizer.report()
    for module, name in find_weights(model).values():
        prune.l1_unstructured(module, name, 0.5)
    train(model, optimizer, 1)  # a failure would warn, and warnings are errors
    after = optimizer.report()
    assert (after.refreshes, after.failures) == (before.refreshes + 1, 0)
    # The curvature of what is pruned is zero, and no eigenvector has a part in it.
    mask = model[0].weight_mask
    basis = optimizer.state[model[0].weight_orig]["curvature_basis"][..., :2]
    assert bool((basis[mask == 0].abs() < 1e-6).all())  # by the tolerance of the pairs
    assert bool((basis[mask != 0].abs() > 1e-3).any())
    train(model, optimizer, 4)
    assert optimizer.report().refreshes == after.refreshes + 1


def test_masked_entries_do_not_come_back():
    model = net(False)
    base = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-2)
    optimizer = precondition(base, model, rank=2, refresh_every=2)
    train(model, optimizer, 3)
    masks = {}
    for module, name in find_weights(model).values():
        prune.l1_unstructured(module, name, 0.5)
        masks[module] = module.weight_mask.clone()
    train(model, optimizer, 6)
    for module, mask in masks.items():
        module(torch.zeros(1, module.in_features, dtype=torch.float64))
        assert torch.equal(module.weight_mask, mask)
        assert not bool(module.weight[mask == 0].any())
