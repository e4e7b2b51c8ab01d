"""DTensor view of a matrix whose rows are split over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscurv.distributed.communicator import Communicator


def as_rows(local_RB: Tensor, communicator: Communicator, dim: int) -> Tensor:
    """Return a matrix of which each rank holds its `Communicator.rows` as a DTensor.

    Args:
        local_RB: Shape (D_local, B), this rank's rows; not copied.
        communicator: The ranks; for a single process, the matrix itself is returned.
        dim: Number of rows D.

    Returns:
        Shape (D, B): ``.to_local()`` is this rank's part, ``.full_tensor()`` gathers the whole.
    """
    if communicator.size == 1:
        return local_RB
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(communicator.group, local_RB.device.type)
    width = local_RB.shape[1]
    out: Any = DTensor.from_local(
        local_RB, mesh, [Shard(0)], run_check=False, shape=torch.Size((dim, width)), stride=(1, dim)
    )
    return out
