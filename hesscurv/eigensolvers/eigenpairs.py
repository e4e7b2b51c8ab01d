"""The result of an eigensolver: eigenpairs with their residuals and cost, saved without pickle."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscurv.distributed.sharded import is_sharded, whole
from hesscurv.operators.parameters import ParameterLayout
from hesscurv.storage.atomic_files import write_atomically

_FORMAT = "hesscurv.Eigenpairs"
_VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs:
    """The k eigenpairs of largest magnitude of a symmetric operator of size D.

    Sorted by ``|eigenvalue|``, largest first, both signs.

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

    def __repr__(self) -> str:
        """Summarise sizes, range of eigenvalues, convergence and cost."""
        dim, k = self.eigenvectors.shape
        lam = f", |lambda| {self.eigenvalues[0].abs():.3g} .. {self.eigenvalues[-1].abs():.3g}"
        return (
            f"Eigenpairs(k={k}, D={dim}{lam if k else ''}, "
            f"converged={int(self.converged.sum())}/{k}, num_matvecs={self.num_matvecs}, "
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
        return replace(
            self,
            eigenvalues=self.eigenvalues[:k],
            eigenvectors=self.eigenvectors[:, :k],
            residuals=self.residuals[:k],
            converged=self.converged[:k],
        )

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

        The file is read by `load` with ``torch.load(weights_only=True)``; it holds tensors and
        plain values alone. Its size is that of the eigenvectors, D k floats. Of pairs that are
        spread over processes, all call it; all gather them, and the first one writes.

        Args:
            path: The file to write; its folder must exist.

        Raises:
            FileNotFoundError: If the folder does not exist.
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
        write_atomically(path, lambda file: torch.save(data, file))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        map_location: str | torch.device | None = "cpu",
    ) -> Eigenpairs:
        """Read pairs that `save` wrote.

        Args:
            path: The file.
            map_location: Where to put the tensors, as in `torch.load`; the CPU by default.

        Returns:
            The eigenpairs.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not one of `save`'s, is damaged, or comes from a newer
                version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"expected a file of Eigenpairs.save, found none at {path}")
        try:
            data = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} is damaged or not a file of Eigenpairs.save; compute and save it again"
            ) from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f"expected a file of Eigenpairs.save, got another kind in {path}")
        if data.get("version") != _VERSION:
            raise ValueError(
                f"expected format version {_VERSION}, got {data.get('version')} in {path}; "
                "read it with the hesscurv that wrote it"
            )
        try:
            layout = data["layout"]
            return cls(
                eigenvalues=data["eigenvalues"],
                eigenvectors=data["eigenvectors_kD"].mT,
                residuals=data["residuals"],
                converged=data["converged"],
                num_matvecs=data["num_matvecs"],
                method=data["method"],
                layout=None if layout is None else ParameterLayout.from_dict(layout),
                info=data["info"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}; compute and save it again") from error
