"""Checkpoints of a growing basis: a journal of its changes, and the state of the iteration.

A folder holds, for each process (rank r of a job, or 0):

    journal-<r>-<g>.bin  appended vectors and coefficients of rotations, in order; append-only.
                         A new generation g starts once it is too long
    state-<r>-<n>.pt     the n-th state: fingerprint, settings, index of the journal with checksums,
                         and the values of the iteration. The last two are kept
    lock-<r>             held by the process that uses the folder

A state is written atomically and refers to a prefix of the journal, so that whenever the process
ends, the newest whole state and that prefix are a consistent checkpoint. Resuming replays the
journal in order, which gives a bit-identical basis.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hesscurv.eigensolvers.krylov.basis import Basis
from hesscurv.operators.fingerprint import differences
from hesscurv.storage.checked_files import read_checked, write_checked
from hesscurv.storage.mapped_files import DiskFullError, disk_full

logger = logging.getLogger(__name__)

_FORMAT, _VERSION = "hesscurv.checkpoint", 1
_PARTS = {"identity", "generation", "length", "journal", "took", "state"}
_PIECE_NUMEL = 2**26  # entries copied through host memory at once
_OVERHEAD = 0.2  # maximal share of the time spent writing states


class Checkpoint:
    """The journal of one basis, and the states of the iteration that grows it.

    Args:
        folder: Created if it does not exist. One solve per folder.
        identity: Plain values that must be equal on resuming.
        rank: Rank of the process.

    Raises:
        ValueError: If the folder holds the checkpoint of another problem, or a damaged one.
        BlockingIOError: If another process uses the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any], rank: int = 0):
        self.folder, self.rank = Path(folder), rank
        self._identity = identity
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder / f"lock-{rank}")
        self._ops: list[dict[str, Any]] = []
        self._generation = self._length = self._count = 0
        self._file: BinaryIO | None = None
        self._saved, self._took = time.perf_counter(), 0.0
        try:
            for path in self.folder.glob(f".state-{rank}-*"):  # temporary files of a killed process
                path.unlink(missing_ok=True)
            self._states = self._read_states()
        except BaseException:
            _unlock(self._lock)
            raise
        self._generations = {n: s["generation"] for n, s in self._states.items()}

    # -- resuming -------------------------------------------------------------------------------

    @property
    def available(self) -> list[int]:
        """Numbers of the resumable states, oldest first."""
        return sorted(self._states)

    def resume(self, number: int) -> dict[str, Any]:
        """Select a state, and return the values of the iteration."""
        chosen = self._states[number]
        self._states.clear()
        self._count, self._ops = number, list(chosen["journal"])
        self._generation, self._length = chosen["generation"], chosen["length"]
        self._took = float(chosen["took"])
        return dict(chosen["state"])

    def forget(self) -> None:
        """Remove all states, to start over."""
        for _, path in self._state_files():
            path.unlink(missing_ok=True)
        self._states.clear()
        self._generations.clear()

    def replay(self, basis: Basis) -> None:
        """Replay the journal on an empty basis, and record all later changes.

        Raises:
            ValueError: If the journal is damaged.
        """
        path = self._journal_path(self._generation)
        if self._ops:
            try:
                with open(path, "rb") as file:
                    for op in self._ops:
                        self._apply(op, file, basis)
            except (FileNotFoundError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(self._damaged(path)) from error
        # Later states are removed only now that the selected one has proved whole.
        for later, old in self._state_files():
            if later > self._count:
                old.unlink(missing_ok=True)
                self._generations.pop(later, None)
        self._file = open(path, "r+b" if self._ops else "w+b")  # noqa: SIM115, closed by `close`
        self._file.truncate(self._length)
        self._file.seek(self._length)
        basis.journal = self

    def _apply(self, op: dict[str, Any], file: BinaryIO, basis: Basis) -> None:
        if op["kind"] == "truncate":
            basis.truncate(op["size"])
            return
        tensor = self._read(file, op)
        if op["kind"] == "append":
            if tensor.shape[1] != basis.dim:
                raise ValueError(self._damaged(Path(file.name)))
            basis.append(tensor)
        else:
            basis.rotate_(op["start"], op["stop"], tensor)

    def _read(self, file: BinaryIO, op: dict[str, Any]) -> Tensor:
        dtype, shape, offset = getattr(torch, op["dtype"]), op["shape"], op["offset"]
        end = offset + math.prod(shape) * dtype.itemsize
        fits = len(shape) == 2 and min(*shape, offset) >= 0
        if not fits or end > os.fstat(file.fileno()).st_size:  # before allocating
            raise ValueError(self._damaged(Path(file.name)))
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        raw = _bytes_of(tensor)
        file.seek(offset)
        got = file.readinto(raw)  # type: ignore[attr-defined]
        if got != raw.nbytes or zlib.crc32(raw) != op["crc"]:
            raise ValueError(self._damaged(Path(file.name)))
        return tensor

    # -- the journal, called by `Basis` ---------------------------------------------------------

    def append(self, rows: list[Tensor]) -> None:
        """Record appended vectors, in their storage dtype."""
        for part in rows:
            for piece in part.split(max(1, _PIECE_NUMEL // max(1, part.shape[1]))):
                self._record(piece, kind="append")

    def rotate(self, start: int, stop: int, Y_nk: Tensor) -> None:
        """Record `Basis.rotate_`."""
        self._record(Y_nk, kind="rotate", start=start, stop=stop)

    def truncate(self, size: int) -> None:
        """Record `Basis.truncate`."""
        self._ops.append({"kind": "truncate", "size": size})

    def _record(self, tensor: Tensor, **op: Any) -> None:
        assert self._file is not None
        tensor = tensor.detach().cpu().contiguous()
        raw = _bytes_of(tensor)
        try:
            self._file.write(raw)
        except OSError as error:
            raise disk_full(error, self.folder, raw.nbytes) from error
        op["shape"] = list(tensor.shape)
        op["dtype"] = str(tensor.dtype).removeprefix("torch.")
        op["offset"], op["crc"] = self._length, zlib.crc32(raw)
        self._length += raw.nbytes
        self._ops.append(op)

    # -- saving ---------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether writing a state costs little compared to the work since the last one."""
        return (time.perf_counter() - self._saved) * _OVERHEAD >= self._took

    def save(self, state: dict[str, Any], basis: Basis) -> None:
        """Write a state; all work up to here is safe afterwards.

        Args:
            state: Values of the iteration: tensors and plain values.
            basis: The basis, rewritten to a new journal if the current one is too long.

        Raises:
            DiskFullError: If the disk is full; the previous state is intact.
        """
        begun = time.perf_counter()
        assert self._file is not None
        rows = sum(op["shape"][0] for op in self._ops if op["kind"] == "append")
        # Rewriting costs one basis, and is amortised over a journal of more than two.
        if rows > 2 * basis.capacity:
            self._begin_anew(basis)
        # The journal must be on disk before the state that refers to it.
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_full(error, self.folder, self._length) from error
        self._count += 1
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "identity": self._identity,
            "generation": self._generation,
            "length": self._length,
            "journal": self._ops,
            "took": self._took,
            "state": state,
        }
        write_checked(self._state_path(self._count), data)
        self._forget_old()
        self._saved = time.perf_counter()
        self._took = self._saved - begun

    def close(self) -> None:
        """Close the files and release the lock."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # unwritten data belongs to no state
                self._file.close()
        _unlock(self._lock)

    def _begin_anew(self, basis: Basis) -> None:
        """Write the current basis to a new journal, once rotations have made the old one long."""
        assert self._file is not None
        self._file.close()
        self._generation += 1
        path = self._journal_path(self._generation)
        self._file = open(path, "w+b")  # noqa: SIM115, closed by `close`
        self._ops, self._length = [], 0
        try:
            self.append(basis.slabs())
        except OSError:
            path.unlink(missing_ok=True)  # frees space on the full disk
            raise

    def _forget_old(self) -> None:
        self._generations[self._count] = self._generation
        for number, path in self._state_files():
            if number < self._count - 1:
                path.unlink(missing_ok=True)
                self._generations.pop(number, None)
        needed = {self._journal_path(g) for g in self._generations.values()}
        for path in self.folder.glob(f"journal-{self.rank}-*.bin"):
            if path not in needed:
                path.unlink(missing_ok=True)

    # -- files ----------------------------------------------------------------------------------

    def _read_states(self) -> dict[int, dict[str, Any]]:
        states, damaged = {}, None
        for number, path in self._state_files():
            try:
                data = read_checked(path)
            except ValueError as error:
                damaged = error
                continue
            self._check(data, path)
            states[number] = data
        if damaged is not None:
            raise ValueError(f"{damaged}; {_REMEDY}") from damaged
        return states

    def _check(self, data: dict[str, Any], path: Path) -> None:
        if data.get("format") != _FORMAT or data.get("version") != _VERSION:
            raise ValueError(
                f"expected a checkpoint of format version {_VERSION} in {path}, got "
                f"{data.get('format')!r} version {data.get('version')!r}; resume it with the "
                f"hesscurv that wrote it; {_REMEDY}"
            )
        if not set(data) >= _PARTS:
            raise ValueError(f"{path} is damaged: it lacks {sorted(_PARTS - set(data))}; {_REMEDY}")
        stored = data["identity"]
        different = differences(stored, self._identity)
        if different:
            told = ", ".join(
                f"{key} (there {_short(stored.get(key))}, here {_short(self._identity.get(key))})"
                for key in different
            )
            raise ValueError(
                f"{self.folder} holds the checkpoint of another problem; what differs: {told}; "
                f"make the same call as before, or {_REMEDY}"
            )

    def _state_files(self) -> Iterator[tuple[int, Path]]:
        for path in sorted(self.folder.glob(f"state-{self.rank}-*.pt")):
            number = path.stem.rpartition("-")[2]
            if number.isdigit():
                yield int(number), path

    def _state_path(self, number: int) -> Path:
        return self.folder / f"state-{self.rank}-{number:06d}.pt"

    def _journal_path(self, generation: int) -> Path:
        return self.folder / f"journal-{self.rank}-{generation:03d}.bin"

    def _damaged(self, path: Path) -> str:
        return f"{path} is damaged, cut short or missing; {_REMEDY}"


_REMEDY = "name another folder, or delete this one to start over"


def check_room(folder: str | os.PathLike[str], nbytes: int) -> None:
    """Refuse a checkpoint that does not fit on the disk.

    Args:
        folder: Folder of the checkpoint.
        nbytes: Its expected size in bytes.

    Raises:
        DiskFullError: If less space is free.
    """
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise DiskFullError(
            f"the checkpoint will take {nbytes / 1e9:.3g} GB, and the disk of {folder} has "
            f"{free / 1e9:.3g} GB left; free some space, name a folder on another disk, or take "
            "fewer vectors (k, max_basis) or storage_dtype=torch.float16"
        )


_locks: set[int] = set()


def _lock(path: Path) -> int:
    """Open and lock a file, or raise; the system releases the lock when the process ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BlockingIOError(
            f"another process is working in {path.parent}; wait for it, or name another folder"
        ) from error
    except (ImportError, OSError) as error:  # Windows, or a file system without locks
        logger.info("%s cannot be locked: %s", path, error)
    _locks.add(handle)
    return handle


def _unlock(handle: int) -> None:
    _locks.discard(handle)
    os.close(handle)


def _drop_locks() -> None:
    # After a fork: a child, such as a data loader's worker, would hold them beyond its parent.
    for handle in list(_locks):
        _unlock(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
