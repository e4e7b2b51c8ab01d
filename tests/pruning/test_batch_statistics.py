"""Running statistics measured anew, against averages that are computed here."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hesscurv import supervised
from hesscurv.pruning.run.batch_statistics import recalibrate_

TASK = supervised(nn.CrossEntropyLoss())
SEEDS = (0,)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, momentum=None),
        nn.BatchNorm1d(4, track_running_stats=False),
    ).double()


def data(seed):
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, 2, 4, 4) for n in (6, 5, 7)]
    return [
        (torch.randn(s, generator=g, dtype=torch.float64) + 1, torch.zeros(s[0], dtype=torch.long))
        for s in shapes
    ]


def recalibrate(net, batches):
    return recalibrate_(net, TASK, batches)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_buffers_are_the_plain_averages_over_the_batches(seed, training):
    net, batches = network().train(training), data(seed)
    assert recalibrate(net, batches) == 2
    plain, found = copy.deepcopy(net).eval(), {1: [], 6: []}
    for x, _ in batches:
        y = plain[0](x)
        found[1].append((y.mean((0, 2, 3)), y.var((0, 2, 3))))
        # Of what this batch, normalised by itself, gives the next layer.
        y = plain[5](F.batch_norm(y, None, None, training=True).relu().flatten(1))
        found[6].append((y.mean(0), y.var(0)))
    for place, rows in found.items():
        norm = net[place]
        mean, var = (torch.stack(t).mean(0) for t in zip(*rows, strict=True))
        # float64, sums of a hundred terms.
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-10, atol=1e-12)
        assert int(norm.num_batches_tracked) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_modes_momenta_parameters_and_random_state_are_as_before(fails):
    net, batches = network().train(), data(0)
    net[3].eval()
    if fails:
        batches.append((torch.randn(2, 3, 4, 4).double(), torch.zeros(2, dtype=torch.long)))
    modes = [m.training for m in net.modules()]
    parameters = [p.detach().clone() for p in net.parameters()]
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="channels"):
            recalibrate(net, batches)
    else:
        recalibrate(net, batches)
    assert [m.training for m in net.modules()] == modes
    assert (net[1].momentum, net[6].momentum) == (0.3, None)
    assert all(torch.equal(a, b) for a, b in zip(parameters, net.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())


def test_a_loader_that_shuffles_leaves_the_random_state():
    samples = torch.utils.data.TensorDataset(*(torch.cat(t) for t in zip(*data(0), strict=True)))
    loader = torch.utils.data.DataLoader(samples, batch_size=6, shuffle=True)
    net, random = network(), torch.get_rng_state()
    recalibrate(net, loader)
    assert torch.equal(torch.get_rng_state(), random)


def test_without_batch_norms_nothing_is_run():
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 4)).double()
    net.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    assert recalibrate(net, data(0)) == 0
