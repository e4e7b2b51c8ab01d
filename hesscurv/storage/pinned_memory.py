"""Host memory that a CUDA device copies from and to by itself, as far as the host can spare it."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from hesscurv.linalg.device_memory import free_memory

logger = logging.getLogger(__name__)

_SHARE = 0.9  # of what is free: the system cannot swap it to make room for anything else


def pinned_if_possible(
    shape: tuple[int, ...], dtype: torch.dtype, *, beside: int = 0, sharing: int = 1
) -> Tensor:
    """Return uninitialised memory of the host, page-locked where there is room for that.

    PyTorch rounds page-locked memory up to a power of two, and the system cannot swap it: it is
    taken only if what is needed beside it fits too.

    Args:
        shape: Of the tensor.
        dtype: Of the tensor.
        beside: Bytes of the host's memory that will be needed later.
        sharing: How many processes of the job do the same.

    Returns:
        A CPU tensor, pinned or not.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    rounded = 1 << max(0, nbytes - 1).bit_length()
    free = int(_SHARE * free_memory(torch.device("cpu")))
    if sharing * (rounded + beside) > free:
        logger.debug(
            "%.3g GB of a basis are not pinned: %.3g GB of the host's memory are to be "
            "had, %.3g GB would be needed in all",
            nbytes / 1e9,
            free / 1e9,
            sharing * (rounded + beside) / 1e9,
        )
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:  # the driver refuses, or the system's limit on locked memory
        logger.debug("%.3g GB of a basis are not pinned: %s", nbytes / 1e9, error)
        return torch.empty(shape, dtype=dtype, device="cpu")


def release_pinned() -> None:
    """Give page-locked memory that is in use no more back to the system; PyTorch keeps it else."""
    release = getattr(
        torch._C, "_host_emptyCache", None
    )  # no public name in all of torch's releases
    if release is not None:
        release()
