"""The result of an eigensolver: eigenpairs with their residuals and cost, saved without pickle."""

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
from hesscurv.objective.parameters import ParameterLayout
from hesscurv.storage.checked_archives import read_archive, write_archive

_FORMAT = "hesscurv.Eigenpairs"
_VERSION = 1
_KIND = "a file of Eigenpairs.save"


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs:
    """The k eigenpairs of largest magnitude of a symmetric operator of size D.

    Sorted by ``|eigenvalue|``, largest first, both signs. ``pairs[:10]`` are the first ten,
    ``pairs[3]`` is the fourth alone, and ``for pair in pairs`` goes over them one by one: each time
    Eigenpairs, of as many columns. Values and vectors by themselves are
    ``zip(pairs.eigenvalues, pairs.eigenvectors.mT)``.

    Args:
        eigenvalues: Shape (k,), real.
        eigenvectors: Shape (D, k), orthonormal columns; column i belongs to eigenvalue i. Computed
            by several processes together, a DTensor of which each has some rows (see `gather`).
        residuals: Shape (k,), ``||H v_i - lambda_i v_i||``, absolute; NaN where not measured.
        converged: Shape (k,), bool: ``residual_i <= max(tol |lambda_i|, 10 eps |lambda_1|)``.
        num_matvecs: Products with H that were used, each vector counted once.
        method: The solver's name.
        layout: Names and shapes of the parameters that the rows stand for; None for an operator
            without a model.
        info: Plain values about the run (tol, block size, seconds, seed, ...), kept when saved.

    Raises:
        ValueError: If shapes do not fit each other.
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
        """Check that the parts fit each other."""
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
        """Return some of the pairs, in the order in which they are asked for.

        Args:
            index: One number, from the end if negative; a slice; a mask (k,); or several numbers,
                as a list, an array or a tensor.

        Returns:
            Eigenpairs, also of a single one or of none. Of one number and of a slice that goes
            forward, views of these; else copies.

        Raises:
            IndexError: If a number is out of range, or a mask is not of k entries.
            TypeError: If it is something else.
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
        """Go over the pairs one by one, each as Eigenpairs of one column, a view of these."""
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

        To be called by all processes that have computed them; of a single one, the pairs
        themselves.
        """
        if not is_sharded(self.eigenvectors):
            return self
        return replace(self, eigenvectors=whole(self.eigenvectors))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pairs to one file, atomically: the old file stays until the new one is whole.

        The file is read by `load`, and by ``torch.load(weights_only=True)``; it holds tensors and
        plain values alone, and a checksum of all of its bytes. Its size is that of the
        eigenvectors, D k floats. A symbolic link is written through, a file that is there keeps its
        mode and owner, and devices and FIFOs are written to. Of pairs that are spread over
        processes, all call it; all gather them, and the first one writes.

        Args:
            path: The file to write; its folder must exist.

        Raises:
            FileNotFoundError: If the folder does not exist.
            TypeError: If `info` holds something that is no plain value.
            OSError: If the disk is full; the old file is untouched and no part is left.
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
        """Read pairs that `save` wrote.

        The checksum is compared before anything is taken from the file. Files from before there was
        one are compared part by part.

        Args:
            path: The file.
            map_location: Where to put the tensors, as in `torch.load`; the CPU by default.

        Returns:
            The eigenpairs.

        Raises:
            FileNotFoundError: If there is no such file.
            IsADirectoryError: If it is a folder.
            ValueError: If the file is not one of `save`'s, is damaged, or comes from a newer
                version.

        Cost: the file is read twice.
        """
        path = Path(path)
        if isinstance(map_location, (str, torch.device)):
            # What is wrong with the device is not the file's error.
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
    """Return the arguments that a file holds, of the right kinds."""
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
    """Return the numbers of pairs that a mask or several numbers choose, (n,), int64."""
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
    """Return entries (k,) or columns (D, k) of these numbers, as a copy."""
    if not is_sharded(tensor):
        return tensor.index_select(tensor.ndim - 1, chosen.to(tensor.device))
    from torch.distributed.tensor import DTensor

    sharded: Any = tensor  # cut by rows: the columns of each part are those of the whole
    own = sharded.to_local()
    return DTensor.from_local(
        own.index_select(1, chosen.to(own.device)),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=torch.Size((tensor.shape[0], len(chosen))),
        stride=(len(chosen), 1),
    )
