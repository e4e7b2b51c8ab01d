"""Plain tensors from parameters sharded over ranks (DTensor, by FSDP2)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from hesscurv.distributed.communicator import Communicator

# Modules whose hooks gather a layer's parameters before its forward and free them afterwards.
_SHARDING = ("torch.distributed.fsdp", "torch.distributed._composable")


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    # No instance exists unless the class has been imported; importing it takes a second.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_shard(tensor: Any) -> Tensor:
    """Return this rank's part of a DTensor, other tensors unchanged; without communication."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """Gather a DTensor from all of its ranks; other tensors are returned unchanged.

    A matrix split by rows goes through `Communicator`, so its group may have a backend that cannot
    send from the matrix's device.
    """
    if not is_sharded(tensor):
        return tensor
    mesh = tensor.device_mesh
    if tensor.ndim == 2 and mesh.ndim == 1 and [p.is_shard(0) for p in tensor.placements] == [True]:
        ranks = Communicator(mesh.get_group())
        return ranks.gather_rows(tensor.to_local().mT.contiguous(), tensor.shape[0]).mT
    return tensor.full_tensor()


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters that a forward has left behind, keeping their shards.

    FSDP gathers them again when a forward or backward needs them.
    """
    module: Any = sys.modules.get("torch.distributed.fsdp")
    kind: Any = getattr(module, "FSDPModule", ())
    for part in model.modules() if kind else ():
        if isinstance(part, kind):
            part.reshard()


def is_sharding_hook(hook: Callable[..., Any]) -> bool:
    """Whether a module's hook gathers or frees its parameters."""
    return str(getattr(hook, "__module__", "")).startswith(_SHARDING)


def refuse_flattened(model: nn.Module) -> None:
    """Refuse FSDP1, whose flat parameters replace those of the model.

    Raises:
        ValueError: If a module is wrapped in `FullyShardedDataParallel`.
    """
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        raise ValueError(
            "expected a model with parameters of its own, got one in FullyShardedDataParallel, "
            "which flattens them; shard it with torch.distributed.fsdp.fully_shard instead"
        )


def require_members(tensors: Iterable[Tensor], communicator: Communicator) -> None:
    """Require every rank that holds shards of the tensors to be in the communicator.

    Raises:
        ValueError: If one is not; the others would wait for it forever.
    """
    for tensor in filter(is_sharded, tensors):
        holders = int(tensor.device_mesh.mesh.numel())  # type: ignore[attr-defined]
        if holders > communicator.size:
            raise ValueError(
                f"expected all {holders} ranks that hold shards of the model in the operator's "
                f"process group, got a group of {communicator.size}; build the operator on all of "
                "them, with their group"
            )
