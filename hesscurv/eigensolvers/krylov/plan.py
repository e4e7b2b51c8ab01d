"""What is decided before the first product of a block Krylov solve: sizes, places, identity."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.checkpoint import Checkpoint, check_room
from hesscurv.interface.integers import as_int
from hesscurv.operators.fingerprint import fingerprint, hash_tensors
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.storage.placement import Placement, choose_placement

_SEARCH_ROOM = 30  # vectors of a search for missed eigenvectors

# A basis in float16 lets all pairs of examples/benchmarks/storage.py reach 1e-2. (One in bfloat16,
# which has 3 bits less, does not: it is not chosen.)
_ROUNDED_FROM_TOL = 5e-3


def expected_matvecs(k: int, block: int) -> int:
    """Return about how many products k pairs take, as measured on Hessians of small nets."""
    return 2 * k + 9 * block


def choose_block_size(H: LinearOperator, k: int) -> int:
    """Return the block size with the least predicted time for k pairs, by H's calibration.

    A wider block makes a product and the reading of the basis cheaper, and the space grow slower in
    degree: see `expected_matvecs`.
    """
    dim = H.shape[0]
    if H.seconds_per_vector(4) is None:
        return max(1, min(16, k // 4 if k > 16 else 4, dim))
    # Orders of magnitude are enough: entries per second read, multiplied and added.
    read, multiplied = (2.5e9, 5e10) if H.device.type == "cpu" else (4e11, 1e13)

    def seconds(b: int) -> float:
        # A measured projection reads the basis, of k vectors on average, twice a block.
        gram_schmidt = 2 * k * dim * (1 / (b * read) + 1 / multiplied)
        return ((H.seconds_per_vector(b) or 0.0) + gram_schmidt) * expected_matvecs(k, b)

    return min(dim, min((b for b in (4, 8, 16, 32, 64) if b <= max(4, k // 4)), key=seconds))


def plan(
    H: LinearOperator,
    k: int,
    tol: float,
    *,
    block_size: int | None,
    max_basis: int | None,
    num_initial: int,
    storage: str | os.PathLike[str] | None,
    storage_dtype: torch.dtype | None,
    state: dict[str, Any] | None,
) -> tuple[int, Placement]:
    """Return the block size and where the basis lives, or refuse what cannot fit.

    Args:
        H: The operator.
        k: The number of wanted pairs.
        tol: Their tolerance.
        block_size: What the caller wants; None chooses.
        max_basis: What the caller wants; None chooses.
        num_initial: How many vectors the solve starts from.
        storage: See `choose_placement`.
        storage_dtype: See `choose_placement`.
        state: The checkpoint to go on from, whose sizes are taken over.

    Raises:
        ValueError: If an argument is out of range, or it fits nowhere.
    """
    dim = H.shape[0]
    communicator = H.communicator
    first, last = communicator.rows(dim)
    local = last - first
    if state is not None:
        block, least = int(state["block"]), int(state["capacity"])
        wanted = least
        stored = getattr(torch, state["storage_dtype"].removeprefix("torch."))
        if storage_dtype not in (None, stored):
            raise ValueError(
                f"expected storage_dtype={stored}, as in the checkpoint, got {storage_dtype}; make "
                "the same call as before, or name another folder"
            )
        storage_dtype = stored
    else:
        block = min(block_size or choose_block_size(H, k), dim)
        least = min(dim, k + 3 * block)
        wanted = min(dim, max(least, 2 * max(k, num_initial) + 10 * block + _SEARCH_ROOM))
        if max_basis is not None:
            if max_basis < least:
                raise ValueError(
                    f"expected max_basis >= k + 3 block_size = {least}, got {max_basis}; lower k "
                    "or block_size"
                )
            least = wanted = min(max_basis, dim)

    # A block of vectors, its products, and what either is copied to on the way.
    reserved = 4 * block * dim * H.dtype.itemsize + H.memory_needed(block)

    if state is not None and storage is None and state["storage"] != "disk":
        storage = state["storage"]  # another place has other roundings

    def choose(least: int, wanted: int, storage_dtype: torch.dtype | None) -> Placement:
        with communicator.together("planning the basis"):
            return choose_placement(
                storage,
                storage_dtype,
                dim=local,
                dtype=H.dtype,
                device=H.device,
                least=least,
                wanted=wanted,
                rounding_allowed=tol >= _ROUNDED_FROM_TOL,
                sharing=_processes_here(communicator.size),
                reserved=reserved,
            )

    placement = choose(least, wanted, storage_dtype)
    if communicator.size > 1:  # all ranks have as many vectors, in one dtype
        chosen = placement.chosen
        own = [-placement.capacity, int(placement.dtype == torch.float16)]
        fewest, rounded = communicator.max_(torch.tensor(own, device="cpu")).tolist()
        dtype = torch.float16 if rounded else placement.dtype
        placement = choose(-fewest, -fewest, dtype)
        placement = replace(placement, chosen=chosen)
    return block, placement


def identity(
    H: LinearOperator,
    k: int,
    *,
    block_size: int | None,
    max_basis: int | None,
    initial: Tensor | None,
    verify: bool,
    generator: torch.Generator,
    which: str = "LM",
) -> dict[str, Any]:
    """Return what must be equal for a solve to be gone on with; tolerance and limits may change."""
    # Checkpoints of earlier versions, which knew "LM" alone, do not name it.
    asked = {} if which == "LM" else {"which": which}
    return {
        **fingerprint(H),
        **asked,
        "method": "block_krylov",
        "k": k,
        "block_size": block_size,
        "max_basis": max_basis,
        "verify": verify,
        "initial": None if initial is None else hash_tensors([initial]),
        "generator": hash_tensors([generator.get_state()]),
        "processes": H.communicator.size,
    }


def newest_state(checkpoint: Checkpoint, H: LinearOperator) -> dict[str, Any] | None:
    """Return the newest state that all processes have, or None where there is none yet."""
    available = checkpoint.available
    newest = available[-1] if available else 0
    if H.communicator.size > 1:
        newest = -int(H.communicator.max_(torch.tensor([-newest], device="cpu")))
    if newest == 0:
        # Of a first save that not all came to.
        with H.communicator.together("beginning"):
            checkpoint.forget()
        return None
    with H.communicator.together("resuming"):
        if newest not in available:
            raise ValueError(
                f"expected state {newest} of rank {checkpoint.rank} in {checkpoint.folder}, got "
                f"{available}; the ranks' parts do not fit each other: begin anew in another folder"
            )
        return checkpoint.resume(newest)


def check_disk(
    folder: str | os.PathLike[str], placement: Placement, k: int, block: int, processes: int
) -> None:
    """Refuse a checkpoint in a folder whose disk has no room: every vector is written once.

    Raises:
        DiskFullError: If there is less than the products usually needed would take, with the basis
            itself where it goes to the same disk, for all processes of this machine.
    """
    count, most = expected_matvecs(k, block), 2 * placement.capacity
    if count > most:  # the journal will be written anew, beside the old one
        count = 3 * placement.capacity
    nbytes = count * placement.dim * placement.dtype.itemsize
    if placement.folder is not None and os.stat(placement.folder).st_dev == os.stat(folder).st_dev:
        nbytes += placement.nbytes
    check_room(folder, nbytes * _processes_here(processes))


def check_sizes(block_size: Any, max_basis: Any) -> tuple[int | None, int | None]:
    """Return sizes as plain ints, None as it is.

    Raises:
        TypeError: If one is no int.
        ValueError: If one is below 1.
    """
    sizes: list[int | None] = []
    for name, value in (("block_size", block_size), ("max_basis", max_basis)):
        if value is None:
            sizes.append(None)
            continue
        size = as_int(name, value)
        if size < 1:
            raise ValueError(f"expected {name} >= 1, got {size}")
        sizes.append(size)
    return sizes[0], sizes[1]


def _processes_here(size: int) -> int:
    """Return how many of a job's processes share this machine, as torchrun says, or all."""
    return max(1, min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size))))
