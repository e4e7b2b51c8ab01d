"""Manifest of a folder of measurements: settings of the sketch, and identity of the operator."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from hesscurv.eigensolvers.sketch.single_pass import cut
from hesscurv.interface.descriptions import Described
from hesscurv.linalg.random_matrices import KINDS, next_seeds
from hesscurv.objective.parameters import ParameterLayout
from hesscurv.operators.fingerprint import differences, hash_text, sample_gap

FORMAT, VERSION = "hesscurv.measurements", 1

_OVERHEAD_BYTES = 4096  # of a chunk's file: names, headers, the last block of the disk
_DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}
# The squared number of measurements is stored in doubles: no disk holds more than this.
_MOST_MEASUREMENTS, _MOST_ENTRIES = 2 * 10**6, 2**53
_SETTINGS = ("k", "outer", "inner", "measurements", "seed", "omega_seed", "psi_seed")
_PRODUCT = "product"  # key among the entries of the operator's fingerprint
_SAMPLE_SIZE = 9
_MEANING = {
    "operator": "its kind",
    "size": "its size D",
    "entries": "the matrix' entries",
    "parameters": "the parameters' names or shapes",
    "values": "the parameters' values",
    "constants": "the buffers or frozen parameters",
    "training": "the modules' mode",
}


@dataclass(frozen=True, repr=False)
class Manifest(Described):
    """Settings of the sketch and identity of the operator.

    Args:
        k: Number of eigenpairs.
        outer: Measurements whose vectors Y are kept: the basis.
        inner: All measurements.
        measurements: The kind of random matrix.
        seed: Seed of the generator that the two others are drawn from.
        omega_seed: Seed of the matrix that H is applied to.
        psi_seed: Seed of the matrix that tests the products.
        chunk: Measurements per file.
        dim: D.
        dtype: The vectors' dtype, "torch.float32" or "torch.float64".
        layout: `ParameterLayout.to_dict`, None for an operator without a model.
        operator: The operator's `fingerprint`, and its `product_sample` as "product".
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
        """Hash of the manifest, stored in every file of measurements."""
        return hash_text(_as_text(self._data()))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The vectors' dtype."""
        return _DTYPES[self.dtype]

    def ranges(self) -> list[tuple[int, int]]:
        """Return the chunks [start, stop) in order; none straddles `outer`."""
        return cut(0, self.outer, self.chunk) + cut(self.outer, self.inner, self.chunk)

    def num_bytes(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Return the size of the files of these chunks in bytes."""
        return sum(self.num_data_bytes(*chunk) + _OVERHEAD_BYTES for chunk in ranges)

    def num_data_bytes(self, start: int, stop: int) -> int:
        """Return the bytes of a chunk's measurements, without overhead."""
        of_one = self.dim * self.torch_dtype.itemsize * (stop <= self.outer)
        return (stop - start) * (self.inner * 8 + of_one)

    def to_json(self) -> str:
        """Return the manifest as canonical JSON with a checksum."""
        return _as_text({**self._data(), "checksum": self.id})

    @classmethod
    def from_json(cls, text: bytes, file: Path) -> Manifest:
        """Parse the output of `to_json` and validate its sizes.

        Args:
            text: The file's content.
            file: The file, for messages.

        Raises:
            ValueError: If it is damaged, or of another version.
        """
        damaged = (
            f"{file} is damaged; delete it and run a job again with the first one's arguments, "
            "which writes it again"
        )
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(damaged) from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(damaged)
        if (version := data.pop("version", None)) != VERSION:
            raise ValueError(
                f"expected format version {VERSION}, got {version} in {file}; use the hesscurv "
                "that wrote it"
            )
        checksum = data.pop("checksum", None)  # absent in folders of earlier versions
        if set(data) != {field.name for field in fields(cls)}:
            raise ValueError(damaged)
        manifest = cls(**data)
        try:
            manifest._check()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{damaged} ({error})") from error
        if checksum not in (None, manifest.id):
            raise ValueError(
                f"{damaged} (by its checksum it was changed, or holds other measurements' settings)"
            )
        return manifest

    def _data(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def _check(self) -> None:
        """Raise unless types and sizes are consistent, which also bounds the sizes."""
        for name in ("k", "outer", "inner", "chunk", "dim", "seed", "omega_seed", "psi_seed"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name}={getattr(self, name)!r:.40}")
        sizes = (1, self.k, self.outer, self.inner, min(self.dim, _MOST_MEASUREMENTS))
        if list(sizes) != sorted(sizes) or self.chunk < 1 or self.dim > _MOST_ENTRIES:
            raise ValueError(
                f"expected 1 <= k <= outer <= inner <= D, got {self.k}, {self.outer}, "
                f"{self.inner}, {self.dim} in chunks of {self.chunk}"
            )
        if self.dtype not in _DTYPES or self.measurements not in KINDS:
            raise ValueError(f"{self.measurements!r:.40} in {self.dtype!r:.40}")
        if not isinstance(self.operator, dict):
            raise TypeError(f"operator={self.operator!r:.40}")
        sample = self.operator.get(_PRODUCT, [0.0] * _SAMPLE_SIZE)
        if [type(entry) for entry in sample] != [float] * _SAMPLE_SIZE:
            raise TypeError(f"product={sample!r:.40}")
        if self.layout is not None and ParameterLayout.from_dict(self.layout).numel != self.dim:
            raise ValueError(f"expected a layout of {self.dim} entries")

    def require_operator(self, fingerprint: dict[str, Any], folder: Path) -> None:
        """Raise ValueError, naming the differences, unless the fingerprint matches."""
        stored = {name: value for name, value in self.operator.items() if name != _PRODUCT}
        found = differences(stored, fingerprint)
        if found:
            names = ", ".join(_MEANING.get(name, f"the {name}") for name in found)
            raise ValueError(
                f"the measurements in {folder} are of another operator: what differs is {names}; "
                "give the model and batches that they were taken with, or take another folder"
            )

    def with_product(self, sample: list[float]) -> Manifest:
        """Return the manifest with a `product_sample`, against which later jobs compare theirs."""
        return replace(self, operator={**self.operator, _PRODUCT: sample})

    def require_product(self, sample: Callable[[], list[float]], folder: Path) -> None:
        """Raise ValueError unless a product of the operator matches that of the first job.

        Args:
            sample: Returns the operator's `product_sample`; not called if the manifest of an
                earlier version has none.
            folder: For the message.
        """
        stored = self.operator.get(_PRODUCT)
        if stored is None:
            return
        # Products in float32 may differ by 1e-3 between processors of different kinds.
        allowed = torch.finfo(self.torch_dtype).eps ** (1 / 3)
        gap = sample_gap(stored, sample())
        if not gap <= allowed:
            raise ValueError(
                f"the measurements in {folder} are of another operator: a product differs from the "
                f"first job's by {gap:.2g} of its norm, where rounding explains {allowed:.1g}; "
                "weights, batches and settings are the same, so what differs is the loss function "
                "(its arguments, its class weights) or the model's code (activations, constants "
                "that are not buffers); give the same in all jobs, or take another folder"
            )

    def require_settings(self, other: Manifest, folder: Path) -> None:
        """Raise ValueError, naming the differences, unless another job's settings match."""
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
        """Return the call that takes the measurements of a range, as text."""
        fresh = torch.Generator().manual_seed(self.seed)
        is_fresh = next_seeds(fresh, 2) == [self.omega_seed, self.psi_seed]
        # One that had been drawn from cannot be typed: the caller has it.
        source = f"torch.Generator().manual_seed({self.seed})" if is_fresh else "generator"
        return (
            f"measure(H, {self.k}, {str(folder)!r}, start={start}, stop={stop}, "
            f"outer={self.outer}, inner={self.inner}, measurements={self.measurements!r}, "
            f"generator={source})"
        )


def _as_text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True) + "\n"
