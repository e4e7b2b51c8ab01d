"""A small network to prune, with data that it is sure of, and how it is looked at."""

import copy

import torch
from support.bundles import bundled
from torch import nn

from hesscurv import supervised
from hesscurv.pruning import PruningOptions
from hesscurv.pruning.masks.state_dicts import masks_of
from hesscurv.pruning.run.prune_model import prune_model

SEEDS = (0,)
METHODS = ("obs", "obd", "magnitude")
TASK = supervised(nn.CrossEntropyLoss())


def network(seed=0):
    """Convolutions with batch norm, of statistics of its own; one with inputs that 4 divides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(4, 3),
        )
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    with torch.no_grad():
        net[6].weight.mul_(10)
    net.seed = seed
    return net.double()


def data(seed=0, sizes=(16, 16, 8)):
    """Batches whose labels are what the network of the seed says, most of the time."""
    g = torch.Generator().manual_seed(seed)
    teacher, batches = network(seed).eval(), []
    for n in sizes:
        x = torch.randn(n, 3, 4, 4, generator=g).double()
        noise = torch.rand(n, 3, generator=g)
        batches.append((x, (teacher(x).detach() + noise).argmax(1)))
    return batches


def run(net, batches=None, sparsity=0.7, **options):
    """Prune it on its data, with little effort."""
    options = {"stages": 2, "gradients_per_stage": 16} | options
    options = bundled(PruningOptions, options)
    return prune_model(net, TASK, batches or data(net.seed), sparsity, **options)


def loss_of(net, batches=None, task=TASK):
    """The mean loss by plain forward passes."""
    net, batches = copy.deepcopy(net).eval(), batches or data(net.seed)
    with torch.no_grad():
        total = sum(task.weight(b) * float(task(net, b)) for b in batches)
    return total / sum(task.weight(b) for b in batches)


def flat_mask(net):
    """The masks of all weights that are pruned."""
    return torch.cat([m.flatten() for m in masks_of(net).values()])
