"""A basis in pinned memory, whose copies come as late as they may, on the pretended device."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from devices.device_programs import error_of
from devices.wait_programs import as_double, count_blocks, counted
from support.pretended_cuda import torch_cuda

import hesscurv
from hesscurv.eigensolvers.krylov.basis import Basis
from hesscurv.linalg import projections as projecting
from hesscurv.linalg.orthogonalization import orthonormalize_against_
from hesscurv.linalg.projections import project_out_
from hesscurv.linalg.transfers import copy_stream, prefetched
from hesscurv.storage.placement import Placement

CUDA = torch.device("cuda", 0)
DIM = 5000


@contextmanager
def small_chunks() -> Iterator[None]:
    """Several chunks of a basis of `DIM` columns: on a GPU these are of 2^27 entries."""
    few = lambda device, on_host: 6000  # noqa: E731
    with (
        mock.patch.object(projecting, "chunk_entries", few),
        mock.patch("hesscurv.eigensolvers.krylov.basis.chunk_entries", few),
        mock.patch.object(projecting, "_SUM_LENGTH", 64),
    ):
        yield


def late():
    """The device itself: a copy on another stream is not there before it is waited for."""
    host = torch.ones(3, 4, pin_memory=True)
    there = torch.zeros(3, 4, device="cuda")
    copies = copy_stream(CUDA)
    copies.copy_(there, host)
    before = there.cpu()
    event = copies.record_event()
    host.fill_(2)
    torch.cuda.current_stream().wait_event(event)
    return before, there.cpu()


def indirect():
    """The device itself: copies for which CUDA would wait are refused."""
    there = torch.zeros(3, 4, device="cuda")
    pinned = torch.zeros(3, 8, pin_memory=True)
    side = torch.cuda.Stream()

    def copying(source, non_blocking=True):
        def copy():
            with torch.cuda.stream(side):
                there.copy_(source, non_blocking=non_blocking)

        return error_of(copy)

    return {
        "pageable": copying(torch.zeros(3, 4)),
        "strided": copying(pinned[:, :4]),
        "cast": copying(pinned.view(6, 4)[:3].double().pin_memory()),
        "blocking": copying(pinned.view(6, 4)[:3], non_blocking=False),
        "direct": copying(pinned.view(6, 4)[:3]),
    }


def fetched(dtype, stored):
    """All chunks of a matrix, whole and in ranges of columns, and how often the host waits."""
    x = torch.randn(5, 100, dtype=stored)
    pinned = x.pin_memory()
    chunks = [pinned[:, i : i + 30] for i in range(0, 120, 30)] + [pinned[:2], pinned[:, :0]]
    torch_cuda.reset()
    got = [part.clone() for part in prefetched(iter(chunks), CUDA, dtype)]
    waits = torch_cuda.counts().waits
    expected = [chunk.to(CUDA, dtype) for chunk in chunks]
    return waits, [torch.equal(a, b) for a, b in zip(got, expected, strict=True)]


def fetched_in_little_memory():
    """Where two buffers do not fit: one chunk at a time."""
    pinned = torch.randn(100, 1000, pin_memory=True)
    torch_cuda.set_limit(torch_cuda.counts().used_bytes + 6 * 100_000)
    parts = prefetched([pinned, pinned], CUDA, torch.float32)
    return [bool(torch.equal(next(parts).cpu(), pinned)) for _ in range(2)]


def basis_on(kind, stored, capacity=40):
    place = Placement(kind, stored, CUDA, capacity, DIM)
    return Basis(place, first=6, grow=4, dtype=torch.float64)


def steps(stored):
    """What a solver does with a basis, on the host and on the device: largest differences."""
    near, far = basis_on("device", stored), basis_on("cpu", stored)
    assert far.slabs() == []
    generator = torch.Generator().manual_seed(1)
    found = {}

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def append(count, device="cuda"):
        rows = draw(count, DIM)
        for basis in (near, far):
            mine = rows.to(device, copy=True)
            basis.append(mine)
            mine.fill_(float("nan"))  # its owner's

    def compare(name, a, b):
        found[name] = float((a.cpu().double() - b.cpu().double()).abs().max())

    def turn(start, stop, k):
        Y, _ = torch.linalg.qr(draw(stop - start, stop - start))
        for basis in (near, far):
            basis.rotate_(start, stop, Y[:, :k])

    def whole(name):
        compare(name, torch.cat(near.slabs()), torch.cat(far.slabs()))

    with small_chunks():
        append(5)
        compare("block of the last", near.block(0, 5), far.block(0, 5))
        compare("block again", near.block(1, 4), far.block(1, 4))
        append(4)  # across slabs
        compare("part of the last", near.block(6, 9), far.block(6, 9))
        append(3)
        compare("older and last", near.block(7, 12), far.block(7, 12))
        append(2)
        whole("slabs at once")
        append(3)
        turn(9, 17, 8)
        compare("turned", near.block(14, 17), far.block(14, 17))
        append(3)
        turn(0, 15, 7)
        whole("turned and moved up")
        append(4)
        for basis in (near, far):
            basis.truncate(basis.size - 3)
        append(2)
        append(2)
        whole("truncated")
        append(3, device="cpu")  # as a checkpoint is replayed
        turn(2, 6, 0)
        whole("none of them kept")
        append(3)
        for basis in (near, far):
            basis.truncate(basis.size - 3)
        append(3, device="cpu")  # over vectors that are on their way
        whole("overwritten")
        turn(0, near.size, 4)
        append(2)
        compare("shrunk", near.shrink(), far.shrink())
    return found


def projections(stored):
    """Projection and orthonormalisation against vectors on the host and on the device."""
    Q, _ = torch.linalg.qr(torch.randn(DIM, 20, dtype=torch.float64))
    W = torch.randn(4, DIM, dtype=torch.float64, device="cuda")
    near, far = basis_on("device", stored), basis_on("cpu", stored)
    for basis in (near, far):
        for part in Q.mT.split(5):
            basis.append(part.cuda())
    outs = []
    with small_chunks():
        for basis in (near, far):
            once = W.clone()
            outs.append([project_out_(once, basis.slabs()), once])
            mine = W.clone()
            slabs = basis.slabs()
            torch_cuda.reset()
            outs[-1] += orthonormalize_against_(mine, slabs)
            outs[-1].append(torch_cuda.counts().waits)
    (*a, waits), (*b, far_waits) = outs
    return [float((x - y).abs().max()) for x, y in zip(a, b, strict=True)], far_waits - waits


def hessian(dim=12):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(dim, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
        batch = torch.randn(32, dim), torch.randint(5, (32,))
    task = hesscurv.supervised(torch.nn.CrossEntropyLoss())
    return hesscurv.HessianOperator(model.double().cuda(), task, [as_double(batch)], way="batched")


def residual(H, pairs):
    V, values = pairs.eigenvectors.cuda(), pairs.eigenvalues.cuda()
    return float((H @ V - V * values).norm(dim=0).max())


def pageable(shape, dtype, **_):
    return torch.empty(shape, dtype=dtype)


def solve_in_turns(storage, options):
    """As `solve`, in pageable memory, whose copies the host waits for."""
    with mock.patch("hesscurv.storage.placement.pinned_if_possible", pageable):
        return solve(storage, options)


def solve(storage, options):
    """Pairs of a Hessian; whether they are in pinned memory; waits and blocks of another solve."""
    H = hessian()
    options = {"tol": 1e-8, "storage": storage, **options}

    def pairs():
        return hesscurv.eigsh(H, 10, **options)

    found = pairs()
    with small_chunks():
        chunked = pairs()
    widths = count_blocks(H)
    counts = counted(pairs)
    return counts | {
        "blocks": len(widths),
        "values": found.eigenvalues,
        "chunked": chunked.eigenvalues,
        "products": found.num_matvecs,
        "restarts": found.info["restarts"],
        "residual": residual(H, found),
        "pinned": found.eigenvectors.device.type == "cpu" and found.eigenvectors.is_pinned(),
        "storage": found.info["storage"],
    }


def resumed(storage):
    """Whether a solve that was stopped and goes on ends with the bits of one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"tol": 1e-8, "storage": storage, "block_size": 4, "max_basis": 30}
        whole = hesscurv.eigsh(hessian(), 10, **options, checkpoint=Path(folder) / "whole")
        H, count = hessian(), 0
        multiply = H._matmat

        def stopping(block):
            nonlocal count
            count += 1
            if count == 9:
                raise KeyboardInterrupt
            return multiply(block)

        H._matmat = stopping
        stopped = False
        try:
            hesscurv.eigsh(H, 10, **options, checkpoint=Path(folder) / "work")
        except KeyboardInterrupt:
            stopped = True
        again = hesscurv.eigsh(hessian(), 10, **options, checkpoint=Path(folder) / "work")
    return {
        "stopped": stopped,
        "values": torch.equal(whole.eigenvalues, again.eigenvalues),
        "vectors": torch.equal(whole.eigenvectors, again.eigenvectors),
        "products": whole.num_matvecs == again.num_matvecs,
    }


def refused_pinning():
    """What is logged where the driver pins nothing, and whether a basis works all the same."""
    torch_cuda.set_pinnable(0)
    lines: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lines.append  # type: ignore[method-assign]
    logger = logging.getLogger("hesscurv.storage.pinned_memory")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        basis = basis_on("cpu", torch.float64)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    rows = torch.randn(8, DIM, dtype=torch.float64, device="cuda")
    basis.append(rows)
    same = torch.equal(basis.block(2, 8), rows[2:])
    return [(line.levelname, line.getMessage()) for line in lines], same


def pinned_half_way():
    """A slab that is pinned, and later ones that are not."""
    torch_cuda.set_pinnable(7 * DIM * 8)
    basis = basis_on("cpu", torch.float64)
    rows = torch.randn(12, DIM, dtype=torch.float64, device="cuda")
    for part in rows.split(4):
        basis.append(part)
    pinned = [slab.is_pinned() for slab in basis.slabs()]
    same = torch.equal(torch.cat(basis.slabs()), rows.cpu())
    Y, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    basis.rotate_(0, 12, Y)
    gap = float((torch.cat(basis.slabs()) - Y.mT @ rows.cpu()).abs().max())
    return pinned, same, gap
