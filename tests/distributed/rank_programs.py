"""What the ranks of a world run in the tests, and the small problem that they share out."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from support.worlds import die, refused
from torch import nn

import hesscurv
from hesscurv.distributed import Communicator
from hesscurv.operators.fingerprint import fingerprint
from hesscurv.operators.loss_gradient import loss_and_gradient
from hesscurv.operators.matrix_operators import DenseOperator

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
KINDS = {
    "hessian": hesscurv.HessianOperator,
    "ggn": hesscurv.GGNOperator,
    "fisher": hesscurv.EmpiricalFisherOperator,
}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)
    ).double()


def batches(sizes=(6, 1, 4, 3, 5, 2, 7)):
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(n, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


def share(data):
    """Every rank's own batches: the first has more than the others."""
    size, rank = dist.get_world_size(), dist.get_rank()
    owner = [0, *(i % size for i in range(len(data) - 1))]
    return [batch for batch, who in zip(data, owner, strict=True) if who == rank]


def vectors(dim: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(dim, count, generator=generator, dtype=torch.float64)


def communicate():
    """All of a communicator's methods, on uneven sizes and other layouts."""
    comm = Communicator.of()
    out = {"rank": comm.rank, "size": comm.size}
    full = torch.arange(22.0, dtype=torch.float64).reshape(2, 11)
    start, stop = comm.rows(11)
    out["rows"] = (start, stop)
    out["gathered"] = comm.gather_rows(full[:, start:stop], 11)
    out["reduced"] = comm.reduce_rows(full * (comm.rank + 1))
    out["sum"] = comm.sum_(torch.full((2, 3), float(comm.rank)).mT)
    out["half"] = comm.sum_(torch.ones(3, dtype=torch.bfloat16)).double()
    out["max"] = comm.max_(torch.tensor(float(comm.rank)))
    out["broadcast"] = comm.broadcast_(torch.full((3,), float(comm.rank)), src=1)
    out["texts"] = comm.gather_texts("é" * comm.rank)
    with comm.together("a step") as step:
        step.note = comm.rank - 1
    out["notes"] = step.notes
    comm.agree(0.1, "number")
    comm.barrier()
    small = comm.gather_rows(torch.ones(1, comm.rows(1)[1] - comm.rows(1)[0]), 1)
    D = DenseOperator(full.mT @ full)
    D.communicator = comm
    out["dense"] = D.product_rows(full.mT[start:stop].contiguous())
    out["fewer rows than ranks"] = small
    return out


def disagree():
    """Each thing that goes wrong on one rank; the group goes on after each."""
    comm = Communicator.of()
    last = comm.rank == comm.size - 1
    dim = hesscurv.HessianOperator(net(), TASK, share(batches())).shape[0]

    def build(model=None, data=None, kind="hessian", **options):
        return KINDS[kind](
            model or net(), TASK, share(batches()) if data is None else data, **options
        )

    def other_weights():
        model = net()
        if last:
            model[0].weight.data[0, 0] += 1e-12
        build(model)

    def other_buffers():
        model = nn.Sequential(net(), nn.BatchNorm1d(3).double())
        if last:
            model[1].running_mean += 1
        build(model)

    def fail():
        with comm.together("the work"):
            if last:
                raise ZeroDivisionError("one rank alone")

    def other_steps():
        with comm.together("one thing" if last else "another"):
            pass

    def later_weights():
        model = net()
        H = build(model)
        H @ vectors(dim)
        if last:
            model[2].bias.data[0] += 1.0
        H @ vectors(dim)

    def bad_batch():
        data = share(batches())
        if last:
            data[0][0][0, 0] = torch.nan
        build(data=data)

    def bad_product():
        data = share(batches())
        if last:
            data[0][0][0, 0] = torch.nan
        build(data=data, check=False) @ vectors(dim)

    def never_agreed():
        model = net()
        H = build(model)
        if last:
            model[0].bias.data.add_(1.0)
        refused(lambda: H @ vectors(dim))
        H @ vectors(dim)

    def bad_batch_later():
        data = share(batches())
        H = build(data=data)
        if last:
            data[0][0][0, 0] = torch.nan
        H @ vectors(dim)

    H = build()
    V = vectors(dim)
    start, stop = comm.rows(dim)
    cases = {
        "agree": lambda: comm.agree(comm.rank // (comm.size - 1), "number", "be of one mind"),
        "fail": fail,
        "nested": lambda: _nested(comm, fail),
        "other steps": other_steps,
        "other weights": other_weights,
        "other buffers": other_buffers,
        "later weights": later_weights,
        "other kind": lambda: build(kind="ggn" if last else "hessian"),
        "other parameters": lambda: build(params=["0"] if last else None),
        "other mode": lambda: build(training=last),
        "no data": lambda: build(data=[]),
        "bad argument": lambda: build(way="none" if last else "auto"),
        "bad batch": bad_batch,
        "bad batch later": bad_batch_later,
        "other vectors": lambda: H @ (V + last),
        "other width": lambda: H @ (V[:, :2] if last else V),
        "nan operand": lambda: H @ (V / (1 - last)),
        "wrong shape": lambda: H @ (V[1:] if last else V),
        "wrong rows": lambda: H.product_rows(V[1:] if last else V[start:stop]),
        "bad product": bad_product,
        "never agreed": never_agreed,
    }
    out = {}
    for name, case in cases.items():
        out[name] = refused(case)
        comm.barrier()
    out["after"] = H @ V
    return out


def _nested(comm, fail):
    with comm.together("around it"):
        fail()


def multiply(names=tuple(KINDS)):
    """Products of every kind, of all ranks and by rows; changes of weights and of batches."""
    comm = Communicator.of()
    out = {}
    for name in names:
        H = KINDS[name](net(), TASK, share(batches()))
        V = vectors(H.shape[0])
        start, stop = H.communicator.rows(H.shape[0])
        out[name] = H @ V
        out[f"{name}, a vector"] = H @ V[:, 0]
        out[f"{name}, rows"] = H.product_rows(V[start:stop].contiguous())
        out[f"{name}, count"] = H.num_matvecs
        out[f"{name}, weight"] = H.total_weight
    model, data = net(), share(batches())
    H = hesscurv.HessianOperator(model, TASK, data)
    with torch.no_grad():
        model[0].weight.mul_(2)
    out["after a step"] = H @ V
    if comm.rank == 0:
        data[0][0].mul_(2)
    out["after new data"] = H @ V
    if comm.rank == 0:
        data.append(batches()[1])
    out["after more data"] = H @ V
    out["more weight"] = H.total_weight
    H.expect(200)
    H.calibrate(200)
    out["seconds"] = H.seconds_per_vector(4)
    out["calibrated"] = H @ V
    out["fingerprint"] = fingerprint(H)
    # The first ranks have all the data.
    H = hesscurv.HessianOperator(net(), TASK, batches() if comm.rank == 0 else [])
    H.expect(100)
    H.calibrate(100)
    out["empty ranks"] = H @ V
    H.seconds_per_vector(4)
    # Two groups: each its own operator.
    groups = [dist.new_group([r]) for r in range(comm.size)]
    alone = hesscurv.HessianOperator(net(), TASK, batches(), process_group=groups[comm.rank])
    out["alone"] = alone @ V
    out["alone, size"] = alone.communicator.size
    # Closures count alike.
    points = batches((4,) * comm.size)[comm.rank]
    model = net()
    C = hesscurv.HessianOperator(model, lambda m: TASK(m, points))
    out["closures"] = C @ V
    return out


def run_all(*names):
    """Several programs in one world, since starting one takes seconds."""
    return {name: globals()[name]() for name in names}


def refuse():
    raise KeyError("no program of this name")


def wrap_ddp():
    """A model in DDP, with batch statistics that each rank took of its own data."""
    rank = dist.get_rank()
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    H = hesscurv.HessianOperator(wrapped, TASK, share(batches()))
    V = vectors(H.shape[0])
    before = H @ V
    data = batches((8,) * dist.get_world_size())[rank]
    twin = copy.deepcopy(model)
    TASK(wrapped, data).backward()
    optimizer.step()
    after = H @ V
    return {
        "before": before,
        "after": after,
        "start": {k: v.double() for k, v in twin.state_dict().items()},
        "state": {k: v.double() for k, v in model.state_dict().items()},
    }


def shard(depth: int = 2):
    """A model that FSDP2 shards: products, and training that goes on as without them."""
    from torch.distributed.fsdp import fully_shard

    def build():
        model = net()
        model[2].bias.requires_grad_(False)
        for part in [model[0], model[2]][:depth]:
            fully_shard(part)
        fully_shard(model)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(model, optimizer, data):
        optimizer.zero_grad()
        TASK(model, data).backward()
        optimizer.step()
        return [p.full_tensor().detach().clone() for p in model.parameters()]

    data = share(batches())
    (model, optimizer), (twin, twins) = build(), build()
    out = {}
    H = hesscurv.HessianOperator(model, TASK, data)
    V = vectors(H.shape[0])
    out["layout"] = H.layout.to_dict()
    out["before training"] = H @ V
    out["trained"] = train(model, optimizer, data[0])
    out["trained without"] = train(twin, twins, data[0])
    out["sharded"] = all(type(p).__name__ == "DTensor" for p in model.parameters())
    for name, kind in KINDS.items():
        out[name] = kind(model, TASK, data) @ V
    out["after training"] = H @ V
    loss = TASK(model, data[0])  # between a forward and its backward
    out["in between"] = H @ V
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    train(twin, twins, data[0])
    with torch.no_grad():
        model(data[0][0])  # leaves gathered parameters behind
    out["left gathered"] = H @ V
    values = [p.full_tensor() for p in model.parameters()]
    whole = net()
    whole[2].bias.requires_grad_(False)
    with torch.no_grad():
        for p, value in zip(whole.parameters(), values, strict=True):
            p.copy_(value)
    out["left gathered, expected"] = hesscurv.HessianOperator(whole, TASK, data) @ V
    out["trained again"] = train(model, optimizer, data[-1])
    out["trained again without"] = train(twin, twins, data[-1])
    model.unshard()
    start, stop = H.communicator.rows(H.shape[0])
    out["rows"] = H.product_rows(V[start:stop].contiguous())
    out["all"] = H @ V
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group = groups[dist.get_rank()]
    out["too few"] = refused(
        lambda: hesscurv.HessianOperator(model, TASK, data, process_group=group)
    )
    return out


def lose_a_rank():
    """The last rank dies in the middle: what the others raise, and how soon."""
    comm = Communicator.of()
    H = hesscurv.HessianOperator(net(), TASK, share(batches()))
    V = vectors(H.shape[0])
    H @ V
    if comm.rank == comm.size - 1:
        die()
    return refused(lambda: [H @ V for _ in range(3)])


def one_is_late():
    """The last rank does something else for longer than the timeout."""
    import time

    comm = Communicator.of()
    if comm.rank == comm.size - 1:
        time.sleep(4)
        return refused(comm.barrier)
    return refused(comm.barrier)


def differentiate():
    """The loss and its gradient where ranks have other batches, and where one has none."""
    loss, gradient = loss_and_gradient(hesscurv.HessianOperator(net(), TASK, share(batches())))
    data = batches() if dist.get_rank() == 0 else []
    return {
        "loss": loss,
        "gradient": gradient,
        "without data": loss_and_gradient(hesscurv.HessianOperator(net(), TASK, data))[0],
    }
