"""Eigenpairs: the result of an eigensolver, with residuals and cost, saved without pickle."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscurv.distributed.sharded import is_sharded, whole
from hesscurv.interface.notebook_html import Points, draw_points, notebook_html
from hesscurv.objective.parameters import ParameterLayout
from hesscurv.storage.checked_archives import read_archive, write_archive

_FORMAT = "hesscurv.Eigenpairs"
_VERSION = 1
_KIND = "a file of Eigenpairs.save"


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs:
    """The k eigenpairs of largest magnitude of a symmetric operator of size D.

    Sorted by ``|eigenvalue|``, largest first, both signs. ``pairs[:10]`` are the first ten,
    ``pairs[3]`` is the fourth, and ``for pair in pairs`` iterates over them; each of these is an
    Eigenpairs. For values and vectors as tensors use
    ``zip(pairs.eigenvalues, pairs.eigenvectors.mT)``.

    Args:
        eigenvalues: Shape (k,), real.
        eigenvectors: Shape (D, k), orthonormal columns; column i belongs to eigenvalue i. If
            computed by several processes, a DTensor split by rows (see `gather`).
        residuals: Shape (k,), ``||H v_i - lambda_i v_i||``, absolute; NaN where not measured.
        converged: Shape (k,), bool: ``residual_i <= max(tol |lambda_i|, 10 eps |lambda_1|)``.
        num_matvecs: Matvecs with H, each vector counted once.
        method: The solver's name.
        layout: Names and shapes of the parameters that the rows correspond to; None for an operator
            without a model.
        info: Plain values about the run (tol, block size, seconds, seed, ...), kept when saved.

    Raises:
        ValueError: If shapes do not match.

    Example:
        >>> len(pairs), pairs.eigenvectors.shape, bool(pairs.converged.all())
        (3, torch.Size([23, 3]), True)
        >>> pairs.save("pairs.pt")
        >>> hesscurv.Eigenpairs.load("pairs.pt").num_matvecs == pairs.num_matvecs
        True
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    converged: Tensor
    num_matvecs: int
    method: str = ""
    layout: ParameterLayout | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the shapes match."""
        k = self.eigenvalues.shape[0] if self.eigenvalues.ndim == 1 else -1
        if k < 0 or self.eigenvectors.ndim != 2 or self.eigenvectors.shape[1] != k:
            raise ValueError(
                "expected eigenvalues (k,) and eigenvectors (D, k), got "
                f"{tuple(self.eigenvalues.shape)} and {tuple(self.eigenvectors.shape)}"
            )
        for name in ("residuals", "converged"):
            if tuple(getattr(self, name).shape) != (k,):
                raise ValueError(
                    f"expected {name} of shape ({k},), got {tuple(getattr(self, name).shape)}"
                )
        if self.layout is not None and self.layout.numel != self.eigenvectors.shape[0]:
            raise ValueError(
                f"expected a layout of {self.eigenvectors.shape[0]} entries, got one of "
                f"{self.layout.numel}"
            )

    def __len__(self) -> int:
        """Return the number of pairs k."""
        return self.eigenvalues.shape[0]

    def __getitem__(self, index: Any) -> Eigenpairs:
        """Return a subset of the pairs, in the order of the index.

        Args:
            index: An integer, negative ones from the end; a slice; a mask (k,); or several
                integers, as a list, an array or a tensor.

        Returns:
            Eigenpairs, also for a single pair or none. Views for an integer or a slice with a
            positive step, copies otherwise.

        Raises:
            IndexError: If an integer is out of range, or a mask does not have k entries.
            TypeError: If the index is anything else.
        """
        k = len(self)
        if isinstance(index, slice) and (index.step is None or operator.index(index.step) > 0):
            return self._map(lambda tensor: tensor[..., index])
        if isinstance(index, slice):
            index = list(range(*index.indices(k)))
        elif not isinstance(index, (bool, tuple, str)) and not getattr(index, "ndim", 0):
            try:
                number = operator.index(index)
            except TypeError:
                pass
            else:
                if not -k <= number < k:
                    raise IndexError(f"expected an index in [{-k}, {k}), got {number}")
                number %= k
                return self._map(lambda tensor: tensor[..., number : number + 1])
        chosen = _chosen(index, k)
        return self._map(lambda tensor: _columns(tensor, chosen))

    def __iter__(self) -> Iterator[Eigenpairs]:
        """Iterate over the pairs, each as Eigenpairs of one column, a view."""
        return (self[i] for i in range(len(self)))

    def _map(self, of: Callable[[Tensor], Tensor]) -> Eigenpairs:
        return replace(
            self,
            eigenvalues=of(self.eigenvalues),
            eigenvectors=of(self.eigenvectors),
            residuals=of(self.residuals),
            converged=of(self.converged),
        )

    def __repr__(self) -> str:
        """Summarise sizes, range of eigenvalues, convergence and cost."""
        dim, k = self.eigenvectors.shape
        lam = ""
        if k and self.eigenvalues.device.type != "meta":
            first, last = (float(self.eigenvalues[i].detach().abs()) for i in (0, -1))
            lam = f", |lambda| {first:.3g} .. {last:.3g}" if k > 1 else f", |lambda| {first:.3g}"
            lam += f", converged={int(self.converged.sum())}/{k}"
        return (
            f"Eigenpairs(k={k}, D={dim}{lam}, num_matvecs={self.num_matvecs}, "
            f"method={self.method!r}, dtype={self.eigenvectors.dtype}, "
            f"device={str(self.eigenvectors.device)!r})"
        )

    def _repr_html_(self) -> str:
        """Show sizes, convergence, the spectrum by sign, and the first pairs."""
        dim, k = self.eigenvectors.shape
        facts = {"D": dim, "products": self.num_matvecs, "method": self.method or None}
        title = f"{k:,} eigenpairs"
        if self.eigenvalues.device.type == "meta":
            return notebook_html(title, facts)
        values, residuals = (t.detach().tolist() for t in (self.eigenvalues, self.residuals))
        done = self.converged.tolist()
        facts |= {
            "converged": f"{sum(done):,} of {k:,}",
            "largest residual": max(residuals, default=None),
            "dtype": str(self.eigenvectors.dtype).removeprefix("torch."),
            "device": str(self.eigenvectors.device),
        }
        signs = (("positive", 1), ("negative", -1))
        ranks = {name: [i for i, v in enumerate(values) if v * sign > 0] for name, sign in signs}
        series = [
            Points(name, [i + 1 for i in found], [abs(values[i]) for i in found])
            for name, found in ranks.items()
        ]
        return notebook_html(
            title,
            facts,
            drawing=draw_points(series, x="rank", y="|eigenvalue|", logarithmic=True),
            columns=("rank", "eigenvalue", "residual", "converged"),
            rows=[(i + 1, values[i], residuals[i], done[i]) for i in range(k)],
        )

    def truncate(self, k: int) -> Eigenpairs:
        """Return the first k pairs; the eigenvectors are a view of these.

        Raises:
            ValueError: If k is not between 1 and the number of pairs.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"expected 1 <= k <= {len(self)}, got k={k}")
        return self[:k]

    def to(self, *args: Any, **kwargs: Any) -> Eigenpairs:
        """Return the pairs on another device or in another floating dtype, as `Tensor.to` does."""
        return replace(
            self,
            eigenvalues=self.eigenvalues.to(*args, **kwargs),
            eigenvectors=self.eigenvectors.to(*args, **kwargs),
            residuals=self.residuals.to(*args, **kwargs),
            converged=self.converged.to(device=self.eigenvalues.to(*args, **kwargs).device),
        )

    def gather(self) -> Eigenpairs:
        """Return the pairs with all rows of the eigenvectors on every process.

        Collective: call it on all processes that have computed the pairs. On a single process it
        returns the pairs themselves.
        """
        if not is_sharded(self.eigenvectors):
            return self
        return replace(self, eigenvectors=whole(self.eigenvectors))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pairs to one file, atomically: the old file stays until the new one is whole.

        The file is read by `load` and by ``torch.load(weights_only=True)``; it holds only tensors
        and plain values, and a checksum over all bytes. Its size is that of the eigenvectors, D k
        floats. Symbolic links, devices and FIFOs are written through; an existing file keeps its
        mode and owner. For pairs distributed over processes this is collective: all gather, and the
        first process writes.

        Args:
            path: The file to write; its folder must exist.

        Raises:
            FileNotFoundError: If the folder does not exist.
            TypeError: If `info` holds anything but plain values.
            OSError: If the disk is full; the old file is untouched and no partial file remains.
        """
        if is_sharded(self.eigenvectors):
            mesh = self.eigenvectors.device_mesh  # type: ignore[attr-defined]
            whole_pairs = self.gather()
            if mesh.get_local_rank() == 0:
                whole_pairs.save(path)
            return
        vectors_kD = self.eigenvectors.detach().mT.contiguous()
        if vectors_kD.untyped_storage().nbytes() > vectors_kD.numel() * vectors_kD.element_size():
            vectors_kD = vectors_kD.clone()  # torch.save writes a view's whole storage
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "eigenvalues": self.eigenvalues.detach().clone(),
            "eigenvectors_kD": vectors_kD,
            "residuals": self.residuals.detach().clone(),
            "converged": self.converged.detach().clone(),
            "num_matvecs": int(self.num_matvecs),
            "method": self.method,
            "layout": None if self.layout is None else self.layout.to_dict(),
            "info": dict(self.info),
        }
        write_archive(path, data)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        map_location: str | torch.device | None = "cpu",
    ) -> Eigenpairs:
        """Read pairs from a file of `save`.

        The checksum is verified before any content is used; older files without one are verified
        member by member.

        Args:
            path: The file.
            map_location: Device of the tensors, as in `torch.load`; default the CPU.

        Returns:
            The eigenpairs.

        Raises:
            FileNotFoundError: If there is no such file.
            IsADirectoryError: If it is a folder.
            ValueError: If the file was not written by `save`, is damaged, or comes from a newer
                version.

        Cost: the file is read twice.
        """
        path = Path(path)
        if isinstance(map_location, (str, torch.device)):
            # Before the file is read, so that a missing device is not reported as damage.
            torch.empty(0, dtype=torch.uint8, device=map_location)
        try:
            data, lost = read_archive(path, _KIND, map_location)
        except ValueError as error:
            raise ValueError(f"{error}; {_REMEDY}") from error
        if data.get("format") != _FORMAT:
            raise ValueError(f"expected {_KIND}, got another kind in {path}")
        if data.get("version") != _VERSION:
            raise ValueError(
                f"expected format version {_VERSION}, got {data.get('version')} in {path}; "
                "read it with the hesscurv that wrote it"
            )
        if lost:
            raise ValueError(f"{path} is damaged or cut short: its checksum is missing; {_REMEDY}")
        try:
            return cls(**_parts(data))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}; {_REMEDY}") from error


_REMEDY = "take another copy, or compute and save it again"


def _parts(data: dict[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments in a file, type-checked."""
    layout = data["layout"]
    parts = {
        "eigenvalues": data["eigenvalues"],
        "eigenvectors": data["eigenvectors_kD"].mT,
        "residuals": data["residuals"],
        "converged": data["converged"],
        "num_matvecs": data["num_matvecs"],
        "method": data["method"],
        "layout": None if layout is None else ParameterLayout.from_dict(layout),
        "info": data["info"],
    }
    for name, kind in (("num_matvecs", int), ("method", str), ("info", dict)):
        if not isinstance(parts[name], kind):
            raise TypeError(f"{name} is a {type(parts[name]).__name__}")
    for name in ("eigenvalues", "eigenvectors", "residuals"):
        if not parts[name].is_floating_point():
            raise TypeError(f"{name} of {parts[name].dtype}")
    if parts["converged"].dtype != torch.bool:
        raise TypeError(f"converged of {parts['converged'].dtype}")
    return parts


def _chosen(index: Any, k: int) -> Tensor:
    """Return the indices selected by a mask or a sequence of integers, (n,), int64."""
    try:
        listed = [] if isinstance(index, list) and not index else index
        chosen = listed if isinstance(listed, Tensor) else torch.as_tensor(listed, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0, 0, dtype=torch.float32, device="cpu")
    if chosen.numel() == 0 and chosen.ndim == 1:
        chosen = chosen.long()
    whole_numbers = not chosen.is_floating_point() and not chosen.is_complex()
    if chosen.ndim != 1 or not whole_numbers or isinstance(index, (str, tuple)):
        raise TypeError(
            f"expected a number, a slice, a mask ({k},) or several numbers, got {index!r:.80}"
        )
    if chosen.dtype == torch.bool:
        if len(chosen) != k:
            raise IndexError(f"expected a mask of {k} entries, got {len(chosen)}")
        return chosen.nonzero().squeeze(1)
    chosen = chosen.long()
    if bool(((chosen < -k) | (chosen >= k)).any()):
        raise IndexError(f"expected indices in [{-k}, {k}), got {index!r:.80}")
    return chosen % max(k, 1)


def _columns(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Return the selected entries (k,) or columns (D, k), as a copy."""
    if not is_sharded(tensor):
        return tensor.index_select(tensor.ndim - 1, chosen.to(tensor.device))
    from torch.distributed.tensor import DTensor

    sharded: Any = tensor  # split by rows: columns can be selected locally
    own = sharded.to_local()
    return DTensor.from_local(
        own.index_select(1, chosen.to(own.device)),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=torch.Size((tensor.shape[0], len(chosen))),
        stride=(len(chosen), 1),
    )
