"""What the ranks of a world train in the tests of the preconditioned optimizer."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optim.training import TASK, data, net, precondition
from support.worlds import SHARDS_ON_CPUS, refused
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hesscurv.optim import CurvatureWarning

BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}
SAMPLES = 8  # of a batch of all ranks
STEPS = 5


def options_of(base):
    """The automatic rate too, where it is to be had; intervals of three steps."""
    return {"learning_rate": "auto", "max_growth": 3.0} if base == "SGD" else {}


def share(batches):
    """This rank's rows of every batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * SAMPLES // size, (rank + 1) * SAMPLES // size)
    return [(x[rows], y[rows]) for x, y in batches]


def train(model, optimizer, steps, first=0, batches=None):
    """Train on this rank's share; return all weights, whole."""
    batches = share(data()) if batches is None else batches
    for step in range(first, first + steps):
        optimizer.zero_grad()
        TASK(model, batches[step % len(batches)]).backward()
        optimizer.step()
    return weights(model)


def weights(model):
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole]).clone()


def wrap(model, base="SGD", batches=None, **options):
    options = {"samples": SAMPLES // dist.get_world_size()} | options_of(base) | options
    batches = share(data()) if batches is None else batches
    return precondition(BASES[base](model.parameters()), model, TASK, batches, **options)


def ddp(seed=1):
    return torch.nn.parallel.DistributedDataParallel(net(seed=seed))


def fsdp(seed=1, mesh=None):
    """The last layer's one row is on one rank alone."""
    model = net(seed=seed)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


# -- programs ---------------------------------------------------------------------------------


def train_ddp():
    """DDP with each base, and the module within in its place; what was seen of the curvature."""
    out = {}
    for base, inner in (("SGD", False), ("SGD", True), ("AdamW", False)):
        model = ddp()
        made = BASES[base](model.parameters())
        optimizer = precondition(
            made,
            model.module if inner else model,
            TASK,
            share(data()),
            samples=SAMPLES // dist.get_world_size(),
            **options_of(base),
        )
        out[base, inner] = train(model, optimizer, STEPS)
        report = optimizer.report()
        out[base, inner, "seen"] = (report.eigenvalues, report.gains, report.rate_factor)
    return out


def decide():
    """Refreshes within a share of the time, by clocks that differ between the ranks."""
    model = ddp()
    optimizer = wrap(model, refresh_every=None, max_fraction=0.5)
    now = [0.0]
    optimizer._schedule.clock = lambda: now[0]
    solve = optimizer._tracker.solve

    def slow(*args):
        now[0] += 20.0 + 10.0 * dist.get_rank()
        return solve(*args)

    optimizer._tracker.solve = slow
    refreshed = []
    for step in range(45):
        before = optimizer.report().refreshes
        train(model, optimizer, 1, first=step)
        if optimizer.report().refreshes > before:
            refreshed.append(step)
        now[0] += 1.0
    return {"refreshed": refreshed, "weights": weights(model)}


def drift():
    """Checks of drift, after which all ranks refresh, or none."""
    model = ddp()
    optimizer = wrap(model, refresh_every=1000, drift_tol=0.2, check_every=2)
    out = train(model, optimizer, 4)
    before = optimizer.report().refreshes
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    train(model, optimizer, 4, first=4)
    return {"before": before, "after": optimizer.report().refreshes, "weights": out}


def differ():
    """Ranks with no second batch, with no samples at all, and with a loader that fails."""
    rank, out = dist.get_rank(), {}
    for name, count in (("no second batch", 1), ("no samples", 0)):
        model = ddp()
        optimizer = wrap(model, batches=share(data())[: count if rank else None])
        out[name] = train(model, optimizer, STEPS)
        out[name, "failures"] = optimizer.report().failures

    class Broken(list):
        def __iter__(self):
            if rank:
                raise OSError("no such file")
            return super().__iter__()

    model, alone = ddp(), ddp()
    optimizer = wrap(model, batches=Broken(share(data())))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", CurvatureWarning)
        out["broken"] = train(model, optimizer, STEPS)
    out["broken, said"] = [str(w.message) for w in said if w.category is CurvatureWarning]
    out["base"] = train(alone, BASES["SGD"](alone.parameters()), STEPS)
    return out


def train_fsdp():
    """FSDP2, also over a mesh with replicas."""
    out = {}
    size = dist.get_world_size()
    meshes = {"one dimension": None}
    for shape in [(size, 1), (1, size)] if size == 2 else [(2, size // 2)]:
        meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for name, mesh in meshes.items():
        for base in BASES if mesh is None else ("SGD",):
            model = fsdp(mesh=mesh)
            optimizer = wrap(model, base)
            out[base, name] = train(model, optimizer, STEPS)
            report = optimizer.report()
            out[base, name, "failures"] = report.failures
            out[base, name, "seen"] = (report.eigenvalues, report.gains, report.rate_factor)
            p = model[0].weight
            out[base, name, "basis"] = (
                optimizer.state[p]["curvature_basis"].to_local().shape,
                p.to_local().shape,
            )
            gradients = [q.grad for q in model.parameters()]
            optimizer.step()
            out[base, name, "same gradients"] = all(
                q.grad is g for q, g in zip(model.parameters(), gradients, strict=True)
            )
    partly = net()
    fully_shard(partly[0])
    out["partly sharded"] = refused(lambda: wrap(partly))[:2]
    return out


KINDS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
}


def checkpoint():
    """FSDP2, resumed from state dicts and files before the first step."""
    out = {}
    for base in BASES:
        model = fsdp()
        optimizer = wrap(model, base)
        train(model, optimizer, 2)
        values, states = weights(model), {}
        for kind, options in KINDS.items():
            parts = get_state_dict(model, optimizer, options=options)
            if kind != "full":
                dcp.save(dict(zip("mo", parts, strict=True)), checkpoint_id=Path(base + kind))
            # Trained on meanwhile, what a state dict refers to is another one.
            states[kind] = kept(parts[1])
        out[base, "expected"] = train(model, optimizer, 3, first=2)
        for kind, options in KINDS.items():
            other = fsdp(seed=9)
            resumed = wrap(other, base)
            put(other, values)
            set_optimizer_state_dict(other, resumed, states[kind], options=options)
            out[base, kind, "state"] = train(other, resumed, 3, first=2)
            if kind != "full":
                third = fsdp(seed=9)
                fresh = wrap(third, base)
                parts = dict(zip("mo", get_state_dict(third, fresh, options=options), strict=True))
                dcp.load(parts, checkpoint_id=Path(base + kind))
                set_state_dict(
                    third,
                    fresh,
                    model_state_dict=parts["m"],
                    optim_state_dict=parts["o"],
                    options=options,
                )
                out[base, kind, "files"] = train(third, fresh, 3, first=2)
    return out


def kept(value):
    """A copy of a state dict, of sharded tensors too."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: kept(v) for key, v in value.items()}
    return [kept(v) for v in value] if isinstance(value, list) else value


def put(model, values):
    """Give a sharded model whole values."""
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        parts = values.split([p.numel() for p in model.parameters()])
        for p, part in zip(model.parameters(), parts, strict=True):
            p.copy_(distribute_tensor(part.view(p.shape), p.device_mesh, p.placements))


PROGRAMS = ["train_ddp", "decide", "drift", "differ"]
if SHARDS_ON_CPUS:
    PROGRAMS += ["train_fsdp", "checkpoint"]


def run_all():
    """All programs in one world, since starting one takes seconds."""
    return {name: globals()[name]() for name in PROGRAMS}
