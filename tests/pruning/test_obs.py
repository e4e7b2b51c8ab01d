"""The joint update of the kept weights against dense solutions, and what it leaves alone."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from hesscurv import Eigenpairs, ParameterLayout
from hesscurv.linalg.woodbury import DiagonalBlock, KroneckerBlock, LowRankPlusBlocks
from hesscurv.pruning.curvature.eigenspace_model import quadratic_model_of
from hesscurv.pruning.curvature.obs import compensate_
from hesscurv.pruning.curvature.quadratic_model import QuadraticModel
from hesscurv.pruning.masks import state_dicts
from hesscurv.pruning.masks.state_dicts import apply_masks_, masks_of

SEEDS = (0,)
NAMES = ("0.weight", "2.weight")
SHAPES = ((5, 4), (3, 5))


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return net.double()


def random_masks():
    return {name: torch.rand(shape) < 0.6 for name, shape in zip(NAMES, SHAPES, strict=True)}


def curvature(first_order=True, n=6):
    """Random rows, a Kronecker and a diagonal block, and the dense matrix of it all."""
    rows = [torch.randn(n, 20).double(), torch.randn(n, 15).double()]
    a = torch.randn(4, 4).double()
    a, scale, d = a @ a.T, torch.rand(5).double(), torch.rand(15).double() + 0.1
    K = torch.block_diag(
        torch.kron(torch.diag(scale), a) + 0.2 * torch.eye(20).double(), torch.diag(d)
    )
    matrix = LowRankPlusBlocks(rows, [KroneckerBlock(a, scale, 0.2), DiagonalBlock(d)])
    residual = torch.randn(n).double() if first_order else None
    gradient = torch.randn(35).double() if first_order else None
    model = QuadraticModel(ParameterLayout(NAMES, SHAPES), matrix, 0.5, residual, gradient)
    R = torch.cat(rows, 1)
    return model, R.T @ R + 0.5 * K, (R.T @ residual + gradient if first_order else 0 * R[0])


def flat(model):
    return torch.cat([_parameter(model, name).detach().flatten() for name in NAMES])


def _parameter(model, name):
    module = model[int(name[0])]
    return module.weight_orig if hasattr(module, "weight_orig") else module.weight


def flatten(masks):
    return torch.cat([masks[name].flatten() for name in NAMES])


def dense_update(w, mask, H, g):
    """The formula as it stands: w_S - H_SS^-1 (g_S - H_SP w_P)."""
    new = torch.zeros_like(w)
    right = g[mask] - H[mask][:, ~mask] @ w[~mask]
    new[mask] = w[mask] - torch.linalg.solve(H[mask][:, mask], right)
    return new


def state(model):
    """Bits, and which tensors there are, in their order."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("when", ["masks given", "pruned before", "pruned with these masks"])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_update_is_the_dense_solution(when, first_order, seed):
    net = network(seed)
    masks, (model, H, g) = random_masks(), curvature(first_order)
    w = flat(net)
    if when != "masks given":
        apply_masks_(net, masks)
    change = compensate_(net, None if when == "pruned before" else masks, model)
    expected = dense_update(w, flatten(masks), H, g)
    # float64 and a condition of some thousands.
    torch.testing.assert_close(flat(net), expected, rtol=1e-8, atol=1e-8)
    d = expected - w
    assert change == pytest.approx(float(g @ d + d @ H @ d / 2), rel=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_afterwards_weights_are_masked_fresh_and_hooked(seed):
    net = network(seed)
    masks, (model, _, _) = random_masks(), curvature()
    compensate_(net, masks, model)
    found = masks_of(net)
    for name in NAMES:
        module = net[int(name[0])]
        assert torch.equal(found[name], masks[name])
        assert not bool(module.weight_orig[~masks[name]].any())
        assert torch.equal(module.weight, module.weight_orig)
    before = net[0].weight.clone()
    net(torch.randn(3, 4).double())
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_second_call_changes_nothing_without_a_first_order_term(seed):
    net = network(seed)
    masks, (model, _, _) = random_masks(), curvature(first_order=False)
    compensate_(net, masks, model)
    before = state(net)
    assert compensate_(net, None, model) == 0
    assert compensate_(net, masks, model) == 0
    assert_same_state(net, before)
    assert len(net[0]._forward_pre_hooks) == 1


def test_masks_add_to_those_that_the_model_has():
    net = network()
    first, second, (model, H, g) = random_masks(), random_masks(), curvature()
    w = flat(net)
    apply_masks_(net, first)
    compensate_(net, {"2.weight": second["2.weight"]}, model)
    both = first | {"2.weight": first["2.weight"] & second["2.weight"]}
    expected = dense_update(w, flatten(both), H, g)
    torch.testing.assert_close(flat(net), expected, rtol=1e-8, atol=1e-8)
    assert all(torch.equal(masks_of(net)[name], both[name]) for name in NAMES)


def test_weights_without_a_mask_move_but_stay_dense():
    net = network()
    masks, (model, H, g) = random_masks(), curvature()
    w = flat(net)
    compensate_(net, {"0.weight": masks["0.weight"]}, model)
    whole = masks | {"2.weight": torch.ones(3, 5, dtype=torch.bool)}
    torch.testing.assert_close(flat(net), dense_update(w, flatten(whole), H, g), rtol=1e-8, atol=0)
    assert list(masks_of(net)) == ["0.weight"]


def test_what_the_curvature_does_not_know_stands_still():
    net = network()
    others = {n: p.detach().clone() for n, p in net.named_parameters() if n not in NAMES}
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    compensate_(net, random_masks(), curvature()[0])
    assert all(torch.equal(dict(net.named_parameters())[n], p) for n, p in others.items())
    assert all(torch.equal(dict(net.named_buffers())[n], b) for n, b in buffers.items())


def test_the_optimiser_keeps_its_parameters_and_state():
    net = network()
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.randn(3, 4).double()).square().sum().backward()
    optimiser.step()
    before = [net[0].weight, net[2].weight]
    compensate_(net, random_masks(), curvature()[0])
    assert net[0].weight_orig is before[0]
    assert net[2].weight_orig is before[1]
    assert all("exp_avg" in optimiser.state[p] for p in before)


@pytest.mark.parametrize("seed", SEEDS)
def test_eigenpairs_stand_for_their_quadratic_model(seed):
    net, other, masks = network(seed), network(seed), random_masks()
    vectors = torch.linalg.qr(torch.randn(35, 4).double()).Q
    values = torch.tensor([4.0, -3.0, 2.0, 1.0]).double()
    layout = ParameterLayout(NAMES, SHAPES)
    good = torch.ones(4, dtype=torch.bool)
    pairs = Eigenpairs(values, vectors, torch.zeros(4).double(), good, 0, layout=layout)
    w = flat(net)
    compensate_(net, masks, pairs)
    H = vectors * values.abs() @ vectors.T + torch.eye(35)  # |lambda_k| = 1
    expected = dense_update(w, flatten(masks), H, torch.zeros(35).double())
    torch.testing.assert_close(flat(net), expected, rtol=1e-8, atol=1e-8)
    compensate_(other, masks, quadratic_model_of(other, pairs))
    assert torch.equal(flat(net), flat(other))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_linear_regression_ends_at_its_constrained_least_squares(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 2, bias=False)).double()
    x, y = torch.randn(40, 6).double(), torch.randn(40, 2).double()
    # Of 1/2 mean |y - x W^T|^2 all 80 rows are there, and next to nothing beside them.
    rows = torch.kron(torch.eye(2), x) / 40**0.5
    residual = ((net(x) - y).T.flatten() / 40**0.5).detach()
    tiny = DiagonalBlock(torch.full((12,), 1e-6).double())
    model = QuadraticModel(
        ParameterLayout(("0.weight",), ((2, 6),)), LowRankPlusBlocks([rows], [tiny]), 1.0, residual
    )
    mask = torch.rand(2, 6) < 0.5
    before = float((net(x) - y).detach().square().sum() / 80)
    change = compensate_(net, {"0.weight": mask}, model)
    best = torch.zeros(2, 6).double()
    for o in range(2):
        best[o, mask[o]] = torch.linalg.lstsq(x[:, mask[o]], y[:, o]).solution
    # What the damping of 1e-6 shifts; rounding divided by it is far less.
    torch.testing.assert_close(net[0].weight.detach(), best, rtol=1e-5, atol=1e-5)
    after = float((net(x) - y).detach().square().sum() / 80)
    assert after == pytest.approx(float((x @ best.T - y).square().sum() / 80), rel=1e-8)
    assert change == pytest.approx(after - before, abs=1e-5)  # it counts the damping, too


def test_half_precision_weights_are_updated_in_the_curvatures_dtype():
    net = network()
    masks, (model, H, g) = random_masks(), curvature()
    net.bfloat16()
    w = flat(net).double()
    compensate_(net, masks, model)
    expected = dense_update(w, flatten(masks), H, g).bfloat16()
    # One unit in the last of 8 bits, where the two round to different sides.
    torch.testing.assert_close(flat(net), expected, rtol=2**-7, atol=0)


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pruned", [False, True])
def test_a_failure_halfway_restores_every_weight_bit_for_bit(monkeypatch, pruned):
    net = network()
    masks, (model, _, _) = random_masks(), curvature()
    if pruned:
        apply_masks_(net, random_masks())
    before, parameters = state(net), [_parameter(net, name) for name in NAMES]
    weights = [net[0].weight.detach().clone(), net[2].weight.detach().clone()]
    refresh = state_dicts.refresh_

    def fail(module, name):
        if module is net[2]:
            raise RuntimeError("no more memory")
        refresh(module, name)

    monkeypatch.setattr(state_dicts, "refresh_", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        compensate_(net, masks, model)
    assert_same_state(net, before)
    assert all(_parameter(net, n) is p for n, p in zip(NAMES, parameters, strict=True))
    assert torch.equal(net[0].weight, weights[0])
    assert torch.equal(net[2].weight, weights[1])


def test_an_update_that_is_not_finite_is_refused():
    net = network()
    masks, (model, _, _) = random_masks(), curvature()
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    before = state(net)
    with pytest.raises(ValueError, match="finite weights after the update"):
        compensate_(net, masks, model)
    del before["2.weight"]  # NaN equals nothing
    assert net[2].weight.isnan().sum() == 1
    assert all(torch.equal(net.state_dict()[name], t) for name, t in before.items())


def test_wrong_arguments_are_refused_before_anything_is_changed():
    net = network()
    masks, (model, _, _) = random_masks(), curvature()
    before = state(net)
    with pytest.raises(ValueError, match="expected masks, got none"):
        compensate_(net, None, model)
    with pytest.raises(TypeError, match="masks as a dict"):
        compensate_(net, masks["0.weight"], model)
    with pytest.raises(ValueError, match=r"has the weights \['2.bias'\]"):
        compensate_(net, masks | {"2.bias": torch.ones(3, dtype=torch.bool)}, model)
    with pytest.raises(TypeError, match=r"bool tensor as the mask of .0\.weight"):
        compensate_(net, {"0.weight": torch.ones(5, 4)}, model)
    with pytest.raises(ValueError, match=r"mask of shape \(5, 4\)"):
        compensate_(net, {"0.weight": masks["0.weight"].T}, model)
    with pytest.raises(TypeError, match="expected a QuadraticModel or Eigenpairs"):
        compensate_(net, masks, torch.eye(35))
    other = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"part of the curvature of shape \(6, 4\)"):
        compensate_(other, {"0.weight": torch.ones(6, 4, dtype=torch.bool)}, model)
    with pytest.raises(ValueError, match="no parameter or submodule"):
        compensate_(nn.Sequential(nn.Linear(4, 5)), {"0.weight": masks["0.weight"]}, model)
    assert_same_state(net, before)
    assert not any(isinstance(h, prune.BasePruningMethod) for h in net[0]._forward_pre_hooks)
