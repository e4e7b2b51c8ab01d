"""How often uses of the library wait for the pretended device, and where."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from devices.api_programs import TASK, block, operator, problem, seeded
from support.pretended_cuda import torch_cuda
from support.pretended_cuda.wait_sites import WaitSites

import hesscurv

# Whether uses are repeated with an eye on where they wait, which takes several times as long.
_looking = False


def located(name: str, *args: Any) -> list[str]:
    """The lines that wait in a program of this module."""
    global _looking
    _looking = True
    try:
        return globals()[name](*args)["sites"]
    finally:
        _looking = False


def counted(use: Callable[[], Any]) -> dict[str, Any]:
    """What the device counts of a use, and the lines that wait in a second one, for `located`."""
    torch_cuda.reset()
    use()
    counts = torch_cuda.counts()
    where = WaitSites()
    if _looking:
        with where:
            use()
    return {
        "waits": counts.waits,
        "copies": counts.host_to_device + counts.device_to_host,
        "launches": counts.launches,
        "sites": [f"{n} x {site}" for site, n in where.sites.most_common()],
    }


def count_blocks(H: Any) -> list[int]:
    """Let an operator note the widths of the blocks that it multiplies."""
    widths: list[int] = []
    multiply = H._matmat

    def noting(block):
        widths.append(block.shape[1])
        return multiply(block)

    H._matmat = noting
    return widths


def product(kind, case, way):
    H = operator("cuda", kind, case, way=way)
    V = block(H, 8)
    H @ V  # compared with the reference, for once
    return counted(lambda: H @ V)


def solve(k, dim):
    """A Hessian's pairs: all of its waits, those of its products included."""
    model = torch.nn.Sequential(torch.nn.Linear(dim, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    batch = torch.randn(32, dim), torch.randint(5, (32,))
    H = hesscurv.HessianOperator(model.double().cuda(), TASK, [as_double(batch)], way="batched")
    hesscurv.eigsh(H, k, tol=1e-3)
    widths = count_blocks(H)
    found = counted(lambda: hesscurv.eigsh(H, k, tol=1e-3))
    return found | {"blocks": len(widths) // (1 + _looking)}


def as_double(batch):
    return batch[0].double().cuda(), batch[1].cuda()


def density():
    H = operator("cuda", way="batched")

    def use():
        hesscurv.spectral_density(H, num_steps=8, num_probes=4, generator=seeded())

    use()
    widths = count_blocks(H)
    return counted(use) | {"blocks": len(widths) // (1 + _looking)}


def wrapped(base, mode, hidden=1):
    """An optimizer of a net of 2 (hidden + 1) parameters, with a gradient, between refreshes."""
    layers = [part for _ in range(hidden) for part in (torch.nn.Linear(6, 6), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(6, 4)).cuda()
    batch = torch.randn(16, 6, device="cuda"), torch.randint(4, (16,)).cuda()
    inner = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "adam": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
    }[base]()
    warnings.simplefilter("ignore", hesscurv.optim.CurvatureWarning)
    optimizer = hesscurv.optim.PreconditionedOptimizer(
        inner,
        model,
        TASK,
        [batch],
        rank=2,
        refresh_every=1000,
        options=hesscurv.optim.PreconditionerOptions(mode=mode),
    )

    def gradient():
        optimizer.zero_grad()
        TASK(model, batch).backward()

    for _ in range(2):
        gradient()
        optimizer.step()
    gradient()
    return optimizer


def optimizer_step(base, mode):
    """A step between refreshes; anything that waits raises."""
    optimizer = wrapped(base, mode)
    with torch_cuda.waits_refused():
        optimizer.step()
    return counted(optimizer.step)


def added_launches(base, mode, hidden):
    """Kernels of a step between refreshes, less those of the base's own."""
    optimizer = wrapped(base, mode, hidden)
    return counted(optimizer.step)["launches"] - counted(optimizer.base.step)["launches"]


def monitor_step(due):
    found = problem("mlp", "cuda")
    schedule = hesscurv.hooks.every(1 if due else 1000)
    monitor = hesscurv.hooks.CurvatureMonitor(
        found.model, TASK, found.batches, k=2, schedule=schedule
    )
    monitor.step(0)
    steps = iter(range(1, 10))
    return counted(lambda: monitor.step(next(steps)))


def sites_of_a_product():
    """The collector of sites itself: a line that reads, and none of one that does not."""
    x = torch.ones(3, device="cuda")
    with WaitSites(folder="/devices/") as where:
        x.sum()
        x.sum().item()
        x.cpu()
    return sorted(where.sites.values()), [site.split(":")[0] for site in where.sites]
