"""What a folder of measurements is of: the settings of the sketch, and the operator."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hesscurv.eigensolvers.single_pass import cut
from hesscurv.operators.fingerprint import differences, hash_text

FORMAT, VERSION = "hesscurv.measurements", 1

_OVERHEAD_BYTES = 4096  # of a chunk's file: names, headers, the last block of the disk
_SETTINGS = ("k", "outer", "inner", "measurements", "seed", "omega_seed", "psi_seed")
_MEANING = {
    "operator": "its kind",
    "size": "its size D",
    "entries": "the matrix' entries",
    "parameters": "the parameters' names or shapes",
    "values": "the parameters' values",
    "constants": "the buffers or frozen parameters",
    "training": "the modules' mode",
}


@dataclass(frozen=True)
class Manifest:
    """What is measured: the settings of the sketch and what the operator is.

    Args:
        k: Number of eigenpairs.
        outer: Measurements whose vectors Y are kept: the basis.
        inner: All measurements.
        measurements: The kind of test matrix.
        seed: The seed that the two others are drawn from.
        omega_seed: Of the matrix that H is applied to.
        psi_seed: Of the matrix that tests the products.
        chunk: Measurements in one file.
        dim: D.
        dtype: The vectors' dtype, "torch.float32" or "torch.float64".
        layout: `ParameterLayout.to_dict`, None for an operator without a model.
        operator: The operator's `fingerprint`.
    """

    k: int
    outer: int
    inner: int
    measurements: str
    seed: int
    omega_seed: int
    psi_seed: int
    chunk: int
    dim: int
    dtype: str
    layout: dict[str, Any] | None
    operator: dict[str, Any]

    @property
    def id(self) -> str:
        """A hash of all of it, which every file of measurements carries."""
        return hash_text(self.to_json())

    @property
    def torch_dtype(self) -> torch.dtype:
        """The vectors' dtype."""
        return {"torch.float32": torch.float32, "torch.float64": torch.float64}[self.dtype]

    def ranges(self) -> list[tuple[int, int]]:
        """Return the chunks [start, stop) in their order; none has vectors in part."""
        return cut(0, self.outer, self.chunk) + cut(self.outer, self.inner, self.chunk)

    def num_bytes(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Return how large the files of these chunks are."""
        return sum(
            (stop - start) * self.inner * 8
            + (stop - start) * self.dim * self.torch_dtype.itemsize * (stop <= self.outer)
            + _OVERHEAD_BYTES
            for start, stop in ranges
        )

    def to_json(self) -> str:
        """Return the manifest as text, the same for the same manifest."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(data, indent=1, sort_keys=True) + "\n"

    def require_operator(self, fingerprint: dict[str, Any], folder: Path) -> None:
        """Raise ValueError, naming what differs, unless the fingerprint is that of the operator."""
        found = differences(self.operator, fingerprint)
        if found:
            names = ", ".join(_MEANING.get(name, f"the {name}") for name in found)
            raise ValueError(
                f"the measurements in {folder} are of another operator: what differs is {names}; "
                "give the model and batches that they were taken with, or take another folder"
            )

    def require_settings(self, other: Manifest, folder: Path) -> None:
        """Raise ValueError, naming what differs, unless another job's settings are the same."""
        found = [
            f"{name}={getattr(self, name)!r} there and {getattr(other, name)!r} here"
            for name in _SETTINGS
            if getattr(self, name) != getattr(other, name)
        ]
        if found:
            raise ValueError(
                f"the measurements in {folder} have other settings: {', '.join(found)}; give the "
                "same settings, or take another folder"
            )

    def call(self, folder: Path, start: int, stop: int) -> str:
        """Return the call that takes the measurements of a range."""
        return (
            f"measure(H, {self.k}, {str(folder)!r}, start={start}, stop={stop}, "
            f"outer={self.outer}, inner={self.inner}, measurements={self.measurements!r}, "
            f"seed={self.seed})"
        )
