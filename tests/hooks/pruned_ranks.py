"""What the ranks of a world prune while they train, in the tests of the pruning trigger."""

from __future__ import annotations

import torch
import torch.distributed as dist
from support.worlds import refused
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hesscurv
from hesscurv.hooks import CurvatureMonitor, PruneWhenStable, Stability, every
from hesscurv.pruning import find_weights, masks_of

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
STEPS, AT = 6, 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def data(seed, count=4):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        x = torch.randn(8, 6, generator=g).double()
        out.append((x, x[:, :3].argmax(1)))
    return out


def prune_and_train():
    """Train in DDP; each rank has samples of its own, and would come to a mask of its own."""
    rank = dist.get_rank()
    model = DistributedDataParallel(net())
    batches = data(10 + rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    monitor = CurvatureMonitor(
        model, TASK, data(20 + rank, 1), 3, quantities="overlap", schedule=every(1)
    )
    trigger = PruneWhenStable(
        monitor,
        batches,
        0.5,
        stability=Stability(0.2, None, 10.0, patience=1),
        not_before=AT,
        optimizer=optimizer,
        stages=1,
        gradients_per_stage=16,
    )
    told = []
    for step in range(STEPS):
        optimizer.zero_grad()
        TASK(model, batches[step % len(batches)]).backward()
        optimizer.step()
        monitor.step(step)
        told.append(trigger.step(step) is not None)
    alone = net()
    hesscurv.pruning.prune_model(alone, TASK, batches, 0.5, stages=1, gradients_per_stage=16)
    return {
        "told": told,
        "pruned": trigger.pruned,
        "shares": [signal["share"] for signal in trigger.signals],
        "statuses": [record["status"] for record in monitor.records],
        "masks": {name: mask.clone() for name, mask in masks_of(model).items()},
        "weights": {n: p.detach().clone() for n, p in sorted(model.module.named_parameters())},
        "used": model.module[0].weight.detach().clone(),
        "alone": masks_of(alone),
    }


def fail_on_first():
    """The first rank cannot prune; the others learn why, and nothing has changed."""
    model = net()
    monitor = CurvatureMonitor(model, TASK, data(1, 1), 3, quantities="overlap", schedule=every(1))

    def prune(model, sparsity):
        raise ValueError("no such weights")

    trigger = PruneWhenStable(monitor, prune=prune, stability=None, deadline=0)
    error = refused(lambda: trigger.step(0))
    return {"error": error, "names": [n for n, _ in model.named_parameters()], "done": trigger.done}


def prune_other_modules():
    """A function of one's own that prunes a bias on the first rank alone."""
    model = net()
    monitor = CurvatureMonitor(model, TASK, data(1, 1), 3, quantities="overlap", schedule=every(1))

    def prune(model, sparsity):
        nn.utils.prune.l1_unstructured(model[0], "bias", 0.5)

    PruneWhenStable(monitor, prune=prune, stability=None, deadline=0).step(0)
    return {"masks": masks_of(model), "weights": len(find_weights(model))}


def run_all():
    return {f.__name__: f() for f in (prune_and_train, fail_on_first, prune_other_modules)}
