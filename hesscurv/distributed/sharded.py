"""Parameters that are sharded over ranks (DTensor, by FSDP2), seen as plain tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from hesscurv.distributed.communicator import Communicator

# Whose hooks gather a module's parameters before its forward, and free them after it.
_SHARDING = ("torch.distributed.fsdp", "torch.distributed._composable")


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    # Where the class has not been imported there is no object of it, and importing takes a second.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_shard(tensor: Any) -> Tensor:
    """Return this rank's part of a DTensor, other tensors as they are; nothing is sent."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """Return a DTensor's whole, gathered from all of its ranks; other tensors as they are.

    A matrix that is cut by rows travels by whatever way its group has, also where that cannot send
    from the device the matrix lies on.
    """
    if not is_sharded(tensor):
        return tensor
    mesh = tensor.device_mesh
    if tensor.ndim == 2 and mesh.ndim == 1 and [p.is_shard(0) for p in tensor.placements] == [True]:
        ranks = Communicator(mesh.get_group())
        return ranks.gather_rows(tensor.to_local().mT.contiguous(), tensor.shape[0]).mT
    return tensor.full_tensor()


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back in place of gathered ones that a forward has left behind.

    They are gathered again by FSDP when they are needed, in a backward too.
    """
    module: Any = sys.modules.get("torch.distributed.fsdp")
    kind: Any = getattr(module, "FSDPModule", ())
    for part in model.modules() if kind else ():
        if isinstance(part, kind):
            part.reshard()


def is_sharding_hook(hook: Callable[..., Any]) -> bool:
    """Whether a module's hook is one that gathers or frees its parameters."""
    return str(getattr(hook, "__module__", "")).startswith(_SHARDING)


def refuse_flattened(model: nn.Module) -> None:
    """Refuse the older FSDP, whose flat parameters are none of the model's own.

    Raises:
        ValueError: If a module is wrapped in it.
    """
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        raise ValueError(
            "expected a model with parameters of its own, got one in FullyShardedDataParallel, "
            "which flattens them; shard it with torch.distributed.fsdp.fully_shard instead"
        )


def require_members(tensors: Iterable[Tensor], communicator: Communicator) -> None:
    """Require that all ranks which hold shards of the tensors are the communicator's.

    Raises:
        ValueError: If one is not: it would be waited for.
    """
    for tensor in filter(is_sharded, tensors):
        holders = int(tensor.device_mesh.mesh.numel())  # type: ignore[attr-defined]
        if holders > communicator.size:
            raise ValueError(
                f"expected all {holders} ranks that hold shards of the model in the operator's "
                f"process group, got a group of {communicator.size}; build the operator on all of "
                "them, with their group"
            )
