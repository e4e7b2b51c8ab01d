"""Folder of measurements: a manifest shared by all jobs, and one file per chunk.

``manifest.json`` holds the settings and the operator's fingerprint; the first job writes it, and it
never changes. ``measurements_START_STOP.npz`` holds the measurements of one chunk. All files appear
atomically, so jobs need neither locks nor communication.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesscurv.eigensolvers.sketch.manifest import Manifest
from hesscurv.interface.descriptions import describe_object
from hesscurv.storage.atomic_files import create_atomically, write_atomically
from hesscurv.storage.destinations import require_regular_file

_MANIFEST = "manifest.json"
_MOST_MANIFEST_BYTES = 2**28
_READ_BYTES = 2**24
_LEFTOVER_SECONDS = 3600  # a temporary file unmodified for this long belongs to a dead job


class DamagedFileError(ValueError):
    """A file of measurements is truncated or was modified."""


class MeasurementFolder:
    """The files of one folder and its manifest.

    Args:
        path: The folder.
        manifest: Its manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        """Return the folder and the sizes of the sketch."""
        return describe_object(
            self,
            path=str(self.path),
            k=self.manifest.k,
            measurements=self.manifest.inner,
            D=self.manifest.dim,
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MeasurementFolder:
        """Open an existing folder.

        Raises:
            FileNotFoundError: If there is no manifest: no job has started.
            ValueError: If the manifest is damaged, or of another version.
        """
        path = Path(path)
        file = path / _MANIFEST
        if not file.is_file():
            raise FileNotFoundError(
                f"expected a folder with the {_MANIFEST} of `measure`, found none in {path}; "
                "run measure(H, k, folder) first"
            )
        if (size := file.stat().st_size) > _MOST_MANIFEST_BYTES:
            raise ValueError(f"expected the {_MANIFEST} of `measure`, got {_size(size)} in {file}")
        return cls(path, Manifest.from_json(file.read_bytes(), file))

    @classmethod
    def join(
        cls,
        path: str | os.PathLike[str],
        wanted: Manifest,
        sample: Callable[[], list[float]],
    ) -> MeasurementFolder:
        """Open the folder of these measurements; the first job creates it.

        Of several concurrent jobs one is the first, and the others find its manifest.

        Args:
            path: The folder; its parent must exist.
            wanted: The manifest of this job. All but the chunk size must match.
            sample: Returns the operator's `product_sample`, which is compared as well.

        Raises:
            FileNotFoundError: If the parent folder does not exist.
            ValueError: If the folder belongs to another operator or other settings, or is damaged.
            OSError: If the disk has too little space for all measurements.
        """
        path = Path(path)
        if not (path / _MANIFEST).exists():
            # Before the manifest is written, which would bind a second attempt to these sizes.
            new = cls(path, wanted)
            # By names only: another job may already be writing its measurements.
            new.require_space(new.absent())
            path.mkdir(exist_ok=True)
            first = wanted.with_product(sample())
            create_atomically(path / _MANIFEST, first.to_json().encode())
        folder = cls.open(path)
        folder.manifest.require_operator(wanted.operator, path)
        folder.manifest.require_settings(wanted, path)
        folder.manifest.require_product(sample, path)
        return folder

    def file(self, start: int, stop: int) -> Path:
        """Return the path of a chunk's file, existing or not."""
        return self.path / f"measurements_{start:07d}_{stop:07d}.npz"

    def missing(self) -> list[tuple[int, int]]:
        """Return the chunks without a whole file, judged by the zip directory, not the content.

        Raises:
            ValueError: If a file belongs to other measurements.
        """
        return [
            chunk for chunk in self.manifest.ranges() if not self.is_whole(*chunk, every_byte=False)
        ]

    def absent(self) -> list[tuple[int, int]]:
        """Return the chunks without any file, damaged or not."""
        return [chunk for chunk in self.manifest.ranges() if not self.file(*chunk).exists()]

    def require_sizes(self) -> None:
        """Raise DamagedFileError if a file is shorter than the manifest implies, unread."""
        for start, stop in self.manifest.ranges():
            path, least = self.file(start, stop), self.manifest.num_data_bytes(start, stop)
            if (size := path.stat().st_size) < least:
                raise DamagedFileError(
                    f"{path} is damaged (expected at least {_size(least)}, got {_size(size)}); "
                    f"{self._remedy(start, stop)}"
                )

    def require_space(self, ranges: list[tuple[int, int]]) -> None:
        """Raise OSError if the files of these chunks do not fit on the disk."""
        place = self.path if self.path.is_dir() else self.path.absolute().parent
        if not place.is_dir():
            raise FileNotFoundError(
                f"expected an existing folder to make {self.path.name!r} in, got {place}"
            )
        needed, free = self.manifest.num_bytes(ranges), shutil.disk_usage(place).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the measurements still missing take {_size(needed)} in {self.path} and "
                f"{_size(free)} are free; free some, take a folder on another disk, or a smaller "
                f"outer (now {self.manifest.outer}) in a new folder",
            )

    def write(self, start: int, stop: int, tested_nc: Tensor, Y_cD: Tensor | None) -> None:
        """Write the file of one chunk, atomically.

        Args:
            start: Its first measurement.
            stop: One past the last.
            tested_nc: Shape (inner, stop - start), ``Psi^T Y``, float64.
            Y_cD: Shape (stop - start, D), the products; None past outer.

        Raises:
            OSError: If the disk is full; no part of the file is left and the others are whole.
        """
        arrays = {
            "manifest": np.array(self.manifest.id),
            "range": np.array([start, stop], dtype="<i8"),
            "tested": tested_nc.cpu().numpy(),
        }
        if Y_cD is not None:
            arrays["vectors"] = Y_cD.cpu().numpy()

        def save(file: Any) -> None:
            # An .npz file: each member has a checksum, verified on reading.
            with zipfile.ZipFile(file, "w") as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, (1, 0), allow_pickle=False)

        try:
            write_atomically(self.file(start, stop), save)
        except OSError as error:
            needed = _size(self.manifest.num_bytes([(start, stop)]))
            raise OSError(
                error.errno,
                f"could not write measurements {start} to {stop} ({needed}): {error.strerror}. "
                "What was written before is whole; free some space and run the same call again",
                str(self.path),
            ) from error

    def read(self, start: int, stop: int, out_cD: Tensor | None) -> Tensor:
        """Read the file of one chunk and verify the checksums.

        Args:
            start: Its first measurement.
            stop: One past the last.
            out_cD: Shape (stop - start, D), row-contiguous, in the manifest's dtype: filled with
                the products Y. None past outer.

        Returns:
            ``Psi^T Y``, shape (inner, stop - start), float64 on the CPU.

        Raises:
            FileNotFoundError: If there is no file.
            DamagedFileError: If it is truncated or was modified; out_cD may be partly overwritten.
            ValueError: If it belongs to other measurements.
        """
        tested_nc = torch.empty(
            self.manifest.inner, stop - start, dtype=torch.float64, device="cpu"
        )
        host_cD = out_cD
        if out_cD is not None and out_cD.device.type != "cpu":
            host_cD = torch.empty_like(out_cD, device="cpu")
        with self._opened(start, stop) as archive:
            _read_member(archive, "tested", tested_nc)
            if host_cD is not None:
                _read_member(archive, "vectors", host_cD)
        if out_cD is not None and host_cD is not None and host_cD is not out_cD:
            out_cD.copy_(host_cD)
        return tested_nc

    def remove_leftovers(self) -> None:
        """Remove temporary files of jobs killed an hour ago or earlier."""
        for pattern in (".measurements_*", f".{_MANIFEST}.*"):
            for path in self.path.glob(pattern):
                with contextlib.suppress(FileNotFoundError):  # another job removed it
                    if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                        path.unlink()

    def is_whole(self, start: int, stop: int, *, every_byte: bool = True) -> bool:
        """Return whether a chunk has a whole file, by its checksums or its zip directory."""
        try:
            with self._opened(start, stop) as archive:
                return not every_byte or archive.testzip() is None
        except (FileNotFoundError, DamagedFileError):
            return False

    def _remedy(self, start: int, stop: int) -> str:
        return f"delete it and run {self.manifest.call(self.path, start, stop)} again"

    @contextlib.contextmanager
    def _opened(self, start: int, stop: int) -> Iterator[zipfile.ZipFile]:
        """Open a chunk's file, check that it belongs here, and yield it."""
        path = self.file(start, stop)
        remedy = self._remedy(start, stop)
        identity, found = np.array(self.manifest.id), np.zeros(2, dtype="<i8")
        present = np.empty_like(identity)
        try:
            require_regular_file(path, "a file of measurements")
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                _read_member(archive, "manifest", present)
                _read_member(archive, "range", found)
                foreign = present != identity or found.tolist() != [start, stop]
                if not foreign:
                    yield archive
        except (FileNotFoundError, PermissionError, MemoryError):
            raise
        except Exception as error:
            raise DamagedFileError(f"{path} is damaged ({error}); {remedy}") from error
        if foreign:
            raise ValueError(
                f"{path} holds other measurements than {_MANIFEST} beside it says; {remedy}"
            )


def _read_member(archive: zipfile.ZipFile, name: str, out: Tensor | np.ndarray[Any, Any]) -> None:
    """Fill an array from a member; any error means that the file is not whole."""
    array = out.numpy() if isinstance(out, Tensor) else out
    with archive.open(f"{name}.npy") as member:
        np.lib.format.read_magic(member)
        header = np.lib.format.read_array_header_1_0(member)
        if header != (array.shape, False, array.dtype):
            raise ValueError(f"expected {name} {array.shape} of {array.dtype}, got {header}")
        flat = array.reshape(-1).view(np.uint8)
        filled = 0
        while filled < len(flat):
            part = member.read(min(_READ_BYTES, len(flat) - filled))
            if not part:
                raise EOFError(f"{name} ends after {filled} of {len(flat)} bytes")
            flat[filled : filled + len(part)] = np.frombuffer(part, dtype=np.uint8)
            filled += len(part)
        if member.read(1):  # zipfile verifies the checksum at the end of the member
            raise ValueError(f"{name} continues after {filled} bytes")


def _size(num_bytes: float) -> str:
    """Format a number of bytes."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
