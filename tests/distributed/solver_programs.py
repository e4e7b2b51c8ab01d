"""What the ranks of a world solve in the tests of the eigensolvers."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from distributed.rank_programs import TASK, batches, net, share
from support.worlds import SHARDS_ON_CPUS, die, refused

import hesscurv
from hesscurv.eigensolvers.krylov.checkpoint import Checkpoint
from hesscurv.operators.matrix_operators import DenseOperator
from hesscurv.storage.mapped_files import DiskFullError
from hesscurv.storage.placement import Placement

K = 12
ALLOCATE = Placement.allocate
OPTIONS = {
    "plain": {},
    "restarts": {"max_basis": K + 12, "block_size": 3},
    "one vector a block": {"block_size": 1},
    "disk": {"storage": "disk"},
    "half": {"storage": "disk", "storage_dtype": torch.float16, "tol": 1e-2},
    "single_pass": {"method": "single_pass"},
    "rayleigh_ritz": {"method": "rayleigh_ritz", "subspace_iterations": 4},
}


def solve(model=None, data=None, **options):
    if options.get("storage") == "disk":
        options["storage"] = Path("blocks")
    H = hesscurv.HessianOperator(net() if model is None else model, TASK, data or batches())
    options = {"tol": 1e-6, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        return hesscurv.eigsh(H, K, **options)


def told(pairs):
    """Plain values of a result, and how many rows of it lie here."""
    vectors = pairs.eigenvectors
    local = vectors.to_local() if hasattr(vectors, "to_local") else vectors
    return {
        "eigenvalues": pairs.eigenvalues,
        "residuals": pairs.residuals,
        "converged": pairs.converged,
        "vectors": pairs.gather().eigenvectors.double(),
        "shape": tuple(vectors.shape),
        "rows": len(local),
        "bytes": pairs.info.get("planned_bytes"),
        "num_matvecs": pairs.num_matvecs,
    }


def solve_all():
    data = share(batches())
    out = {name: told(solve(data=data, **options)) for name, options in OPTIONS.items()}
    out["float32"] = told(solve(net().float(), [(x.float(), y) for x, y in data], tol=1e-4))
    pairs = solve(data=data)
    out["overlap"] = float(hesscurv.overlap(hesscurv.magnitude_mask(net(), K), pairs))
    pairs.save("pairs.pt")
    dist.barrier()
    out["loaded"] = told(hesscurv.Eigenpairs.load("pairs.pt"))
    H = hesscurv.HessianOperator(net(), TASK, data)
    out["measure"] = refused(lambda: hesscurv.measure(H, K, "measurements"))
    near = solve(data=data, tol=1e-2)
    out["warm"] = told(solve(data=data, initial=near))
    out["first three"] = tuple(near.truncate(3).gather().eigenvectors.shape)
    return out


def solve_wrapped():
    data = share(batches())
    out = {"ddp": told(solve(torch.nn.parallel.DistributedDataParallel(net()), data))}
    if not SHARDS_ON_CPUS:
        return out
    from torch.distributed.fsdp import fully_shard

    model = net()
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    out["fsdp2"] = told(solve(model, data))
    return out


class Failing(DenseOperator):
    def __init__(self, matrix, allowed, fail):
        super().__init__(matrix)
        self.communicator = hesscurv.distributed.Communicator.of()
        self.allowed, self.fail = allowed, fail

    def _matmat(self, vectors_DB):
        if self.num_matvecs >= self.allowed:
            self.fail()
        return super()._matmat(vectors_DB)


def matrix(dim=120):
    values = torch.randn(dim, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return torch.diag(values**3)


def power_cut():
    raise RuntimeError("the power went out")


def go_on():
    """Interrupt solves, on all ranks and on one alone, and go on."""
    options = {"block_size": 3, "max_basis": K + 15, "tol": 1e-9}
    whole = hesscurv.eigsh(Failing(matrix(), 10**9, power_cut), K, **options)
    first = dist.get_rank() == 0
    out = {"whole": told(whole)}
    for name, allowed in (("all", 30), ("one", 24 if first else 10**9)):
        out[name] = refused(
            lambda allowed=allowed: hesscurv.eigsh(
                Failing(matrix(), allowed, power_cut), K, checkpoint="work", **options
            )
        )
    solve_on = lambda: hesscurv.eigsh(  # noqa: E731
        Failing(matrix(), 10**9, power_cut), K, checkpoint="work", **options
    )
    if not first:
        damage("work")
    dist.barrier()
    out["damaged"] = refused(solve_on)
    if not first:
        damage("work")
    H = Failing(matrix(), 10**9, power_cut)
    out["resumed"] = told(hesscurv.eigsh(H, K, checkpoint="work", **options))
    out["new products"] = H.num_matvecs
    other = matrix() + 1e-3 * torch.eye(len(matrix())) if not first else matrix()
    out["foreign"] = refused(
        lambda: hesscurv.eigsh(Failing(other, 10**9, power_cut), K, checkpoint="work", **options)
    )
    out["again"] = refused(solve_on)
    out["unlike"] = refused(
        lambda: hesscurv.eigsh(
            Failing(matrix(), 10**9, power_cut), K, max_matvecs=60 if first else 90, **options
        )
    )
    out["bad k"] = refused(lambda: hesscurv.eigsh(H, K if first else -1, **options))
    return out


def damage(folder):
    """Flip a byte of this rank's journals; twice is not at all."""
    for path in Path(folder).glob(f"journal-{dist.get_rank()}-*.bin"):
        content = bytearray(path.read_bytes())
        content[100] ^= 0xFF
        path.write_bytes(content)


def fill_one_disk():
    """Let the disk of one rank be full."""
    if dist.get_rank() == 1:

        def allocate(self, rows):
            raise DiskFullError(28, "the disk is full")

        Placement.allocate = allocate
    H = Failing(matrix(), 10**9, power_cut)
    out = [refused(lambda: hesscurv.eigsh(H, K, storage="blocks"))]
    if dist.get_rank() == 1:

        def rotate(self, start, stop, Y):
            raise DiskFullError(28, "the disk is full")

        Checkpoint.rotate = rotate
        del Placement.allocate
        Placement.allocate = ALLOCATE
    options = {"block_size": 3, "max_basis": K + 12, "tol": 1e-9, "checkpoint": "full"}
    out.append(refused(lambda: hesscurv.eigsh(H, K, **options)))
    return out


def solve_few_rows():
    """Solve where some ranks have no row at all."""
    A = torch.diag(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
    H = Failing(A, 10**9, power_cut)
    return told(hesscurv.eigsh(H, 2, block_size=1))


def lose_one():
    """Let one rank end as if its machine had, in the midst of a solve."""
    fail = die if dist.get_rank() == 1 else power_cut
    H = Failing(matrix(), 30 if dist.get_rank() == 1 else 10**9, fail)
    return refused(lambda: hesscurv.eigsh(H, K, block_size=3, tol=1e-12))
