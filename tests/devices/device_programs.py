"""What the pretended device itself does, as CUDA would."""

from __future__ import annotations

import os
import time

import torch
from support.pretended_cuda import torch_cuda
from torch import nn

from hesscurv.operators.ways.tracing import load_forward_rules


def error_of(use):
    try:
        use()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def mixtures():
    x = torch.ones(3, 4, device="cuda")
    return {
        "tensor of the CPU": error_of(lambda: x + torch.ones(4)),
        "other device": error_of(lambda: x + torch.ones(4, device="cuda:1")),
        "generator of the CPU": error_of(
            lambda: torch.randn(3, device="cuda", generator=torch.Generator())
        ),
        "number of the CPU": error_of(lambda: x + torch.tensor(1.0)),
        "indices of the CPU": error_of(lambda: x[torch.tensor([0, 1])]),
    }


def counts():
    x = torch.randn(4, 4, device="cuda", dtype=torch.float64)
    uses = {
        "launch": lambda: x + x,
        "view": lambda: x.view(16)[2:].t(),
        "item": lambda: x.sum().item(),
        "to host": lambda: x.cpu(),
        "from host": lambda: torch.ones(2).cuda(),
        "from host by turns": lambda: torch.ones(2).pin_memory().to("cuda", non_blocking=True),
        "mask": lambda: x[x > 0],
        "eigh": lambda: torch.linalg.eigh(x + x.mT),
        "synchronize": torch.cuda.synchronize,
    }
    found = {}
    for name, use in uses.items():
        torch_cuda.reset()
        use()
        n = torch_cuda.counts()
        copies = n.host_to_device_bytes, n.device_to_host_bytes
        found[name] = (n.waits, n.item_reads, n.waiting_operations, *copies)
    return found


def memory():
    torch_cuda.reset()
    before = torch_cuda.counts().used_bytes
    x = torch.empty(1000, device="cuda")
    during, peak = torch_cuda.counts().used_bytes - before, torch_cuda.counts().peak_bytes - before
    is_nan = bool(x.isnan().all())
    torch_cuda.set_limit(torch_cuda.counts().used_bytes + 1000)
    refused = error_of(lambda: torch.empty(1000, device="cuda"))
    free, total = torch.cuda.mem_get_info()
    del x
    after = torch_cuda.counts().used_bytes - before
    return {
        "bytes": (during, after),
        "peak": peak,
        "uninitialised is NaN": is_nan,
        "refused": refused,
        "free": (free, total > free),
    }


def recurrent(kind, device):
    """A net's outputs, gradients and second derivatives; and whether it has a forward mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = getattr(nn, kind)(3, 4, num_layers=2, batch_first=True).double()
        x = torch.randn(2, 5, 3, dtype=torch.float64)
    net, x = net.to(device), x.to(device).requires_grad_()
    out = net(x)[0]
    weights = list(net.parameters())
    slopes = torch.autograd.grad(out.square().sum(), weights, create_graph=True)
    second = torch.autograd.grad(sum(s.square().sum() for s in slopes), weights)
    load_forward_rules()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        forward = error_of(lambda: net(dual))
    return {"out": out, "slopes": slopes, "second": second, "forward": forward}


def random_numbers():
    """States are restored, and differ between devices."""
    torch.manual_seed(7)
    first = torch.randn(3, device="cuda")
    with torch.random.fork_rng(devices=[0, 1]):
        torch.randn(3, device="cuda")
    state = torch.cuda.get_rng_state()
    second = torch.randn(3, device="cuda")
    torch.cuda.set_rng_state(state)
    again = torch.randn(3, device="cuda")
    torch.manual_seed(7)
    return {
        "reseeded": torch.equal(first, torch.randn(3, device="cuda")),
        "restored": torch.equal(second, again),
        "other than the CPU's": not torch.equal(first.cpu(), torch.randn(3)),
    }


def refused_waits():
    x = torch.ones(3, device="cuda")
    with torch_cuda.waits_refused():
        fine = error_of(lambda: x + x)
        refused = [error_of(use) for use in (x.sum().item, x.cpu, x.nonzero)]
    return fine, refused, x.sum().item()


def raises():
    raise KeyError("a program's own")


def ends():
    os._exit(3)


def sleeps():
    time.sleep(60)


def returns(value):
    print("not an answer")
    return value
