"""Placement of a basis of long vectors: device memory, host memory, or disk."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hesscurv.linalg.device_memory import device_memory, free_memory
from hesscurv.storage.mapped_files import mapped_tensor
from hesscurv.storage.pinned_memory import pinned_if_possible

logger = logging.getLogger(__name__)

_SHARE = 0.8  # of the free memory; the rest is for products and other processes
_SHARE_OF_DISK = 0.95
_MAPPED_ROWS = 64  # rows of a mapped block per piece: see `Placement.pieces`


@dataclass(frozen=True)
class Placement:
    """Storage location and dtype of a basis.

    Args:
        kind: "device", "cpu" or "disk".
        dtype: float32, float64, float16 or bfloat16.
        device: The operator's device, where all computation runs.
        folder: The folder, for "disk".
        chosen: Whether it was chosen automatically.
        capacity: Maximal number of vectors.
        dim: Their length.
        sharing: Number of processes of the job that share the host's memory.
    """

    kind: str
    dtype: torch.dtype
    device: torch.device
    capacity: int
    dim: int
    folder: Path | None = None
    chosen: bool = False
    sharing: int = 1

    @property
    def nbytes(self) -> int:
        """The bytes of all planned vectors."""
        return self.capacity * self.dim * self.dtype.itemsize

    def is_unusual(self, dtype: torch.dtype) -> bool:
        """Whether it was chosen for lack of memory: off the device, or in lower precision."""
        return self.chosen and (self.kind != "device" or self.dtype != dtype)

    def __str__(self) -> str:
        """Return location, number and size of the vectors."""
        where = {
            "device": str(self.device),
            "cpu": "host memory",
            "disk": f"files in {self.folder}",
        }
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"basis of up to {self.capacity} vectors of {self.dim:,} entries in {name}: "
            f"{self.nbytes / 1e9:.3g} GB on {where[self.kind]}"
        )

    def allocate(self, rows: int) -> Tensor:
        """Return uninitialised storage (rows, D).

        For a CUDA device, host memory is pinned if there is room.

        Raises:
            DiskFullError: If it is a file and the disk is full.
        """
        if self.kind == "disk":
            assert self.folder is not None
            return mapped_tensor(self.folder, (rows, self.dim), self.dtype)
        shape = rows, self.dim
        if self.kind == "cpu" and self.device.type == "cuda":
            # The planned vectors that are still to come must fit as well.
            beside = max(0, self.capacity - rows) * self.dim * self.dtype.itemsize
            return pinned_if_possible(shape, self.dtype, beside=beside, sharing=self.sharing)
        device = self.device if self.kind == "device" else torch.device("cpu")
        return torch.empty(shape, dtype=self.dtype, device=device)

    def pieces(self, block_mD: Tensor) -> Sequence[Tensor]:
        """Split a block into pieces for sequential reading.

        Algebra runs over chunks of columns whose size falls with the number of rows: many rows of
        a file would be read in many short stretches.
        """
        return block_mD.split(_MAPPED_ROWS) if self.kind == "disk" else [block_mD]


def choose_placement(
    storage: str | os.PathLike[str] | None,
    storage_dtype: torch.dtype | None,
    *,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    least: int,
    wanted: int,
    rounding_allowed: bool,
    sharing: int = 1,
    reserved: int = 0,
) -> Placement:
    """Choose the location, dtype and capacity of a basis from the free memory.

    Candidates, in order: the device in the operator's dtype; the device in float16 if the tolerance
    allows its rounding; host memory in both; a temporary folder. The first that holds three
    quarters of the wanted vectors is taken, or else the first that holds the required ones.

    Args:
        storage: "device"; "host" or "cpu", host memory; or a folder. None chooses automatically.
        storage_dtype: The operator's dtype, float16 or bfloat16; None chooses automatically.
        dim: Length of a vector, on this process.
        dtype: The operator's dtype.
        device: The operator's device.
        least: Minimal number of vectors.
        wanted: Number of vectors beyond which more do not help.
        rounding_allowed: Whether float16 may be chosen.
        sharing: Number of processes of the job that share the host's memory and disk.
        reserved: Bytes on the operator's device reserved for products.

    Returns:
        The placement, with `capacity` set.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If it fits nowhere; with sizes and remedies.
    """
    _check(storage, storage_dtype, dtype)
    kinds = _kinds(storage, device)
    dtypes = [storage_dtype] if storage_dtype is not None else [dtype]
    if storage_dtype is None and rounding_allowed and storage is None and dtype == torch.float32:
        dtypes.append(torch.float16)
    options = []
    for kind, folder in kinds:
        for stored in dtypes:
            shared = kind != "device" or device.type == "cpu"
            room = _free(kind, folder, device) // (sharing if shared else 1)
            if kind == "device" or (kind == "cpu" and device.type == "cpu"):
                room = max(0, room - reserved)
            fits = room // (max(dim, 1) * stored.itemsize)
            chosen = storage is None and storage_dtype is None
            option = Placement(
                kind, stored, device, min(fits, wanted), dim, folder, chosen, sharing
            )
            options.append((option, room))
    for enough in (max(least, 3 * wanted // 4), least):
        for option, _ in options:
            if option.capacity >= enough:
                return option
    raise ValueError(_refusal(options, least, dim))


def allocate_basis(
    storage: str | os.PathLike[str] | None,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    reserved: int,
) -> Tensor:
    """Return uninitialised storage for a basis of fixed size, in memory or in a file.

    Args:
        storage: "device", "host" (or "cpu", the same) or a folder, the last two for operators on
            the CPU; None takes memory or, for such operators, a temporary folder if it is short.
        rows: Number of vectors.
        dim: Their length.
        dtype: Dtype of the vectors and of the operator.
        device: The operator's device.
        reserved: Bytes on it reserved for products.

    Returns:
        Shape (rows, dim), on a device of the operator's type.

    Raises:
        ValueError: If it fits nowhere, or is not on the operator's device.
        DiskFullError: If it is a file and the disk is full.
    """
    if device.type != "cpu" and storage not in (None, "device"):
        raise ValueError(
            f"expected storage 'device' for an operator on {device}, got {storage!r}; a basis "
            "elsewhere takes method='block_krylov'"
        )
    placement = choose_placement(
        "device" if device.type != "cpu" else storage,
        None if storage is None else dtype,
        dim=dim,
        dtype=dtype,
        device=device,
        least=rows,
        wanted=rows,
        rounding_allowed=False,
        reserved=reserved,
    )
    if placement.is_unusual(dtype):
        logger.warning("%s", placement)
    return placement.allocate(rows)


def _kinds(
    storage: str | os.PathLike[str] | None, device: torch.device
) -> list[tuple[str, Path | None]]:
    if storage is None:
        kinds: list[tuple[str, Path | None]] = [("device", None)]
        if device.type != "cpu":
            kinds.append(("cpu", None))
        folder = Path(tempfile.gettempdir())
        return [*kinds, ("disk", folder)] if not _is_memory(folder) else kinds
    if storage in ("device", "host", "cpu"):
        on_device = storage == "device" or device.type == "cpu"
        return [("device" if on_device else "cpu", None)]
    folder = Path(storage)
    folder.mkdir(parents=True, exist_ok=True)
    return [("disk", folder)]


def _free(kind: str, folder: Path | None, device: torch.device) -> int:
    if kind == "disk":
        assert folder is not None
        return int(_SHARE_OF_DISK * shutil.disk_usage(folder).free)
    place = device if kind == "device" else torch.device("cpu")
    # Free memory fluctuates: without the second bound, a plan for all of the memory would pass in
    # some runs and fail in others.
    return int(_SHARE * min(free_memory(place), device_memory(place)))


def _is_memory(folder: Path) -> bool:
    """Whether a folder lies in memory (tmpfs), so that using it saves none."""
    best, kind = "", ""
    try:
        for line in Path("/proc/mounts").read_text().splitlines():
            _, point, name = line.split()[:3]
            inside = folder.resolve().is_relative_to(point)
            if inside and len(point) >= len(best):
                best, kind = point, name
    except (OSError, ValueError):
        return False
    return kind in ("tmpfs", "ramfs")


def _check(
    storage: str | os.PathLike[str] | None, storage_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    if storage in ("cuda", "gpu", "ram", "disk"):
        raise ValueError(
            f"expected storage 'host', 'device', 'cpu' or a folder, got {storage!r}; for a folder "
            f"of that name say './{storage}'"
        )
    if storage is not None and not isinstance(storage, (str, os.PathLike)):
        raise TypeError(
            f"expected storage 'host', 'device', 'cpu' or a folder, got a {type(storage).__name__}"
        )
    if storage_dtype is None:
        return
    if not isinstance(storage_dtype, torch.dtype):
        raise TypeError(
            f"expected storage_dtype to be a torch.dtype, got a {type(storage_dtype).__name__}"
        )
    if storage_dtype not in (torch.bfloat16, torch.float16, dtype):
        raise ValueError(
            f"expected storage_dtype torch.float16, torch.bfloat16 or the operator's own, {dtype}, "
            f"got {storage_dtype}"
        )


def _refusal(options: list[tuple[Placement, int]], least: int, dim: int) -> str:
    tried = "; ".join(
        f"{str(o.dtype).removeprefix('torch.')} on "
        f"{o.folder if o.kind == 'disk' else o.device if o.kind == 'device' else 'the host'}: "
        f"{least * dim * o.dtype.itemsize / 1e9:.3g} GB needed, {room / 1e9:.3g} GB available"
        for o, room in options
    )
    remedies = ["lower k, max_basis or block_size", "select fewer parameters"]
    if all(o.dtype.itemsize > 2 for o, _ in options):
        remedies.append("storage_dtype=torch.float16 with tol >= 5e-3")
    if all(o.kind != "disk" for o, _ in options):
        remedies.append("name a folder on a disk with storage=")
    else:
        remedies.append("name a folder on a larger disk with storage=")
    return (
        f"a basis of at least {least} vectors of {dim:,} entries fits nowhere ({tried}); "
        + ", or ".join(remedies)
    )
