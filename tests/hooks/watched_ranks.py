"""What the ranks of a world run in the tests of monitors."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from hooks.watched import TASK, Clock, Kept, data, equal, left_behind, net
from torch.nn.parallel import DistributedDataParallel

from hesscurv.hooks import CurvatureMonitor, MonitorOptions, MonitorWarning, every

STEPS = 4


def share(batches):
    """This rank's rows of every batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return [(x[rank::size], y[rank::size]) for x, y in batches]


def train(model, after=lambda step: None, steps=STEPS):
    """Train on this rank's share; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    batches, losses = share(data()), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = TASK(model, batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        after(step)
        losses.append(loss.item())
    return losses


def unchanged():
    """A run of DDP with a monitor, beside one without: bits, records, who logs."""
    found = []
    for watched in (False, True):
        model = DistributedDataParallel(net(noisy=True))
        torch.manual_seed(3 + dist.get_rank())
        logger, monitor = Kept(), None
        if watched:
            monitor = CurvatureMonitor(
                model,
                TASK,
                share(data(2)),
                4,
                schedule=every(3),
                quantities="full",
                loggers=[logger],
                options=MonitorOptions(trace_matvecs=4),
            )
        losses = train(model, monitor.step if monitor else lambda step: None)
        found.append((losses, left_behind(model)))
    return {
        "same": equal(*found),
        "records": monitor.records,
        "logged": len(logger.records),
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "vectors": monitor.pairs.eigenvectors,
    }


def decide():
    """Clocks that differ: rank 1's steps take no time, so that by itself it would wait forever."""
    clock, model = Clock(), net()

    class Slow:
        def log(self, record, step):
            clock.now += 3.0

    monitor = CurvatureMonitor(
        model,
        TASK,
        share(data(1)),
        2,
        quantities="sparsity",
        schedule=every(5),
        max_fraction=0.1,
        loggers=[Slow()],
        options=MonitorOptions(clock=clock),
    )
    for step in range(95):
        clock.now += 1.0 if dist.get_rank() == 0 else 1e-3
        monitor.step(step)
    return [record["step"] for record in monitor.records]


def fail():
    """A measurement that fails on one rank alone, by its data or before any exchange."""

    class Broken:
        def log(self, record, step):
            raise OSError("no room")

    model = net()
    batches = share(data(2))
    monitor = CurvatureMonitor(model, TASK, batches, 3, loggers=[Broken()], schedule=every(1))

    def break_(step):
        if dist.get_rank() == 1 and step == 1:
            monitor._probe._batches[0][0].fill_(float("nan"))
        if dist.get_rank() == 1 and step == 3:
            monitor._probe.selected = lambda: 1 / 0

    def mend(step):
        if dist.get_rank() == 1 and step in (1, 3):
            monitor._probe._batches = batches
            vars(monitor._probe).pop("selected", None)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            break_(step)
            monitor.step(step)
            mend(step)
    told = [str(w.message) for w in caught if issubclass(w.category, MonitorWarning)]
    return {
        "status": [record["status"] for record in monitor.records],
        "errors": [record.get("error", "") for record in monitor.records],
        "told": told,
    }


def joint():
    """One measurement of a model, by each rank's share of the probe set."""
    return CurvatureMonitor(net(), TASK, share(data(2)), 4, tol=1e-8).measure(0)


def run_all():
    return {program.__name__: program() for program in (unchanged, decide, joint, fail)}
