"""Planning of a block Krylov solve: block size, basis size, storage, checkpoint identity."""

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

# With a float16 basis all pairs of examples/benchmarks/storage.py reach 1e-2. With bfloat16, which
# has 3 bits less, they do not: it is never chosen automatically.
_ROUNDED_FROM_TOL = 5e-3


def expected_matvecs(k: int, block: int) -> int:
    """Return the expected number of matvecs for k pairs, fitted to Hessians of small networks."""
    return 2 * k + 9 * block


def narrow_block(k: int, most: int, least: int = 4) -> int:
    """Return a block of 4 to 16, a quarter of the pairs: narrow ones need fewer matvecs.

    Args:
        k: Number of pairs.
        most: Largest block, such as D.
        least: Smallest one where `most` allows it.
    """
    return min(most, max(least, min(16, k // 4)))


def choose_block_size(H: LinearOperator, k: int) -> int:
    """Return the block size with the least predicted time for k pairs, by H's calibration.

    A wider block makes matvecs and reads of the basis cheaper per vector, but the polynomial degree
    grows more slowly: see `expected_matvecs`.
    """
    dim = H.shape[0]
    widths = [b for b in (4, 8, 16, 32, 64) if b <= max(4, k // 4)]
    product = {b: cost for b in widths if (cost := H.seconds_per_vector(b)) is not None}
    if not product:
        return narrow_block(k, dim)
    # Orders of magnitude suffice: entries read, and multiply-adds, per second.
    read, multiplied = (2.5e9, 5e10) if H.device.type == "cpu" else (4e11, 1e13)

    def seconds(b: int) -> float:
        # A projection reads the basis, of k vectors on average, twice per block.
        gram_schmidt = 2 * k * dim * (1 / (b * read) + 1 / multiplied)
        return (product[b] + gram_schmidt) * expected_matvecs(k, b)

    return min(dim, min(product, key=seconds))


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
    """Return block size and placement of the basis, or raise if it does not fit.

    Args:
        H: The operator.
        k: Number of wanted pairs.
        tol: Their tolerance.
        block_size: The caller's choice; None chooses automatically.
        max_basis: The caller's choice; None chooses automatically.
        num_initial: Number of vectors of the warm start.
        storage: See `choose_placement`.
        storage_dtype: See `choose_placement`.
        state: The checkpoint to resume, whose sizes are kept.

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

    # A block of vectors, its products, and a copy of each.
    reserved = 4 * block * dim * H.dtype.itemsize + H.memory_needed(block)

    if state is not None and storage is None and state["storage"] != "disk":
        storage = state["storage"]  # another device rounds differently

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
    if communicator.size > 1:  # the same number of vectors, in one dtype, on all ranks
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
    """Return the values that must be equal to resume a solve; tolerance and limits may change."""
    # Checkpoints of earlier versions, which supported only "LM", do not have the key.
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
    """Return the newest state that all processes have, or None."""
    available = checkpoint.available
    newest = available[-1] if available else 0
    if H.communicator.size > 1:
        # The minimum over ranks, as the maximum of the negatives.
        newest = -int(H.communicator.max_(torch.tensor([-newest], device="cpu")))
    if newest == 0:
        # Leftovers of a first save that did not complete on all ranks.
        with H.communicator.together("beginning"):
            checkpoint.forget()
        return None
    with H.communicator.together("resuming"):
        if newest not in available:
            raise ValueError(
                f"expected state {newest} of rank {checkpoint.rank} in {checkpoint.folder}, got "
                f"{available}; the ranks' parts do not match: start over in another folder"
            )
        return checkpoint.resume(newest)


def check_disk(
    folder: str | os.PathLike[str], placement: Placement, k: int, block: int, processes: int
) -> None:
    """Refuse a checkpoint that does not fit on the disk of a folder; every vector is written once.

    Raises:
        DiskFullError: If the free space is less than the expected number of matvecs takes, plus the
            basis if it is on the same disk, for all processes on this machine.
    """
    count, most = expected_matvecs(k, block), 2 * placement.capacity
    if count > most:  # a rewritten journal coexists with the old one
        count = 3 * placement.capacity
    nbytes = count * placement.dim * placement.dtype.itemsize
    if placement.folder is not None and os.stat(placement.folder).st_dev == os.stat(folder).st_dev:
        nbytes += placement.nbytes
    check_room(folder, nbytes * _processes_here(processes))


def check_sizes(block_size: Any, max_basis: Any) -> tuple[int | None, int | None]:
    """Return sizes as plain ints or None.

    Raises:
        TypeError: If one is not an int.
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
    """Return how many of a job's processes share this machine, as set by torchrun, or all."""
    return max(1, min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size))))
