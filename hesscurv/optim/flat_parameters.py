"""An optimizer's parameters as parts of one flat vector, on each process its own shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed import Communicator
from hesscurv.distributed.sharded import is_sharded, own_shard
from hesscurv.optim.foreach import apply_foreach


class FlatParameters:
    """The flat vector of some parameters, in an order of their own.

    Of parameters that are sharded over processes (DTensor), it has this process's entries.

    Args:
        parameters: Which ones, in the order in which they come in the vector.

    Attributes:
        numel: The length of this process's vector.
        offsets: Where each parameter begins in it.
        dtype: At least float32, whatever the parameters' own.

    Raises:
        ValueError: If there are none, or they lie on several devices, or are not all sharded over
            the same processes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            raise ValueError("expected at least one parameter, got none")
        self.parameters = list(parameters)
        locals_ = [own_shard(p) for p in self.parameters]
        devices = {t.device for t in locals_}
        if len(devices) > 1:
            raise ValueError(
                f"expected the parameters on one device, got {sorted(map(str, devices))}; select "
                "those of one device with params="
            )
        self._signatures = [_signature(p) for p in self.parameters]
        self._meshes = _meshes_of(self.parameters)
        self.is_sharded = is_sharded(self.parameters[0])
        self.shapes = [tuple(t.shape) for t in locals_]
        self.sizes = [t.numel() for t in locals_]
        self.numel = sum(self.sizes)
        self.offsets = [0, *accumulate(self.sizes)][:-1]
        self.device = devices.pop()
        self.dtype = max(
            (torch.float32 if t.itemsize < 4 else t.dtype for t in locals_),
            key=lambda dtype: torch.finfo(dtype).bits,
        )

    def are(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether these are the parameters, on the device and in the dtype and shape they had."""
        given = list(parameters)
        return (
            len(given) == len(self.parameters)
            and all(p is q for p, q in zip(given, self.parameters, strict=True))
            and [_signature(p) for p in given] == self._signatures
        )

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes that hold the other shards."""
        for mesh, dim in self._meshes:
            Communicator(mesh.get_group(dim), self.device).sum_(tensor)
        return tensor

    def any_of(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether any entry of any tensor, on any process that has shards of it, is not zero."""
        found = any(t is not None and bool((_entries(t) != 0).any()) for t in tensors)
        if not self.is_sharded:
            return found
        return bool(self.sum_(torch.tensor(float(found), device=self.device)))

    def flatten(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """Return one vector of a tensor for each parameter, zeros for None.

        Of tensors in memory order, one kernel in the vector's dtype, or one for each of theirs.
        """
        shards = [None if t is None else own_shard(t).reshape(-1) for t in tensors]
        given = [shard for shard in shards if shard is not None]
        if all(shard.dtype == self.dtype for shard in given):
            if len(given) < len(shards):
                longest = max(n for n, s in zip(self.sizes, shards, strict=True) if s is None)
                zeros = torch.zeros(longest, dtype=self.dtype, device=self.device)
                pairs = zip(shards, self.sizes, strict=True)
                given = [zeros[:n] if shard is None else shard for shard, n in pairs]
            return torch.cat(given)
        new = torch.empty if len(given) == len(shards) else torch.zeros
        flat = new(self.numel, dtype=self.dtype, device=self.device)
        parts = zip(flat.split(self.sizes), shards, strict=True)
        apply_foreach(torch._foreach_copy_, [part for part, s in parts if s is not None], given)
        return flat

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return a vector's parts in the parameters' own shapes, as views."""
        parts = flat.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def like(self, index: int, local: Tensor) -> Tensor:
        """Return a tensor of a parameter's local shape as the parameter's kind of tensor."""
        return _as_shard_of(self.parameters[index], local, trailing=0)

    # -- a basis, as one tensor for each parameter --------------------------------------------

    def new_basis(self, count: int) -> Tensor:
        """Return zeros (count, numel)."""
        return torch.zeros(count, self.numel, dtype=self.dtype, device=self.device)

    def basis_of(self, vectors_Dm: Tensor) -> Tensor:
        """Return this process's (m, numel) of whole vectors, columns, in the parameters' order."""
        if not self.is_sharded:
            return vectors_Dm.mT.to(self.device, self.dtype, copy=True).contiguous()
        out, start = self.new_basis(vectors_Dm.shape[1]), 0
        for p, part in zip(self.parameters, self.parts(out), strict=True):
            rows = vectors_Dm[start : start + p.numel()].to(self.device, self.dtype)
            part.copy_(_own_part(p, rows.reshape(*p.shape, vectors_Dm.shape[1])))
            start += p.numel()
        return out

    def parts(self, basis_mD: Tensor) -> list[Tensor]:
        """Return a basis as tensors of shape (*local shape, m), one a parameter, as views."""
        return [
            part.view(len(basis_mD), *shape).movedim(0, -1)
            for part, shape in zip(basis_mD.split(self.sizes, dim=1), self.shapes, strict=True)
        ]

    def stored_parts(self, basis_mD: Tensor) -> list[Tensor]:
        """Return `parts` as the parameters' kind of tensor, of shape (*shape, m)."""
        parts = zip(self.parameters, self.parts(basis_mD), strict=True)
        return [_as_shard_of(p, part, trailing=1) for p, part in parts]

    def whole_basis(self, basis_mD: Tensor) -> Tensor:
        """Return the vectors of all processes, columns (D, m); gathered where they are sharded."""
        if not self.is_sharded:
            return basis_mD.mT
        parts: list[Any] = self.stored_parts(basis_mD)
        return torch.cat([part.full_tensor().flatten(end_dim=-2) for part in parts])


def _signature(p: nn.Parameter) -> tuple[Any, ...]:
    return p.device, p.dtype, p.shape


def _meshes_of(parameters: Sequence[nn.Parameter]) -> list[tuple[Any, int]]:
    """Return the dimensions of the processes' mesh that parameters are sharded over, the same ones.

    Of a mesh with replicas, whose processes hold the same entries, only those that differ.
    """
    found: list[tuple[Any, tuple[int, ...]] | None] = []
    for p in parameters:
        like: Any = p
        own = (
            (like.device_mesh, tuple(i for i, at in enumerate(like.placements) if at.is_shard()))
            if is_sharded(p)
            else None
        )
        if own not in found:
            found.append(own)
    if len(found) > 1:
        raise ValueError(
            "expected all parameters sharded over the same processes, or none of them, got some "
            "like this and some like that; shard the whole model or select with params="
        )
    return [] if found[0] is None else [(found[0][0], dim) for dim in found[0][1]]


def _entries(tensor: Tensor) -> Tensor:
    """Return those entries that this process has, of a sparse tensor those that are stored."""
    tensor = own_shard(tensor)
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _as_shard_of(parameter: Tensor, local: Tensor, trailing: int) -> Tensor:
    """Return a local tensor as a DTensor that is placed as a sharded parameter is."""
    if not is_sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    like: Any = parameter
    shape = torch.Size([*parameter.shape, *local.shape[len(local.shape) - trailing :]])
    stride = torch.empty(shape, dtype=torch.float32, device="meta").stride()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def _own_part(parameter: Tensor, full: Tensor) -> Tensor:
    """Cut out of a whole tensor what this process has of a sharded parameter; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    like: Any = parameter
    mesh = like.device_mesh
    everywhere = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()
