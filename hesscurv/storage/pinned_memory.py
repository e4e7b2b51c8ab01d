"""Page-locked host memory, as far as the host can spare it."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from hesscurv.linalg.device_memory import free_memory

logger = logging.getLogger(__name__)

_SHARE = 0.9  # of the free memory: page-locked memory cannot be swapped out


def pinned_if_possible(
    shape: tuple[int, ...], dtype: torch.dtype, *, beside: int = 0, sharing: int = 1
) -> Tensor:
    """Return uninitialised host memory, page-locked if there is room.

    PyTorch rounds page-locked memory up to a power of two, and it cannot be swapped out: it is
    used only if everything needed later fits as well.

    Args:
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.
        beside: Bytes of host memory needed later.
        sharing: Number of processes of the job that do the same.

    Returns:
        A CPU tensor, pinned or not.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    rounded = 1 << max(0, nbytes - 1).bit_length()
    free = int(_SHARE * free_memory(torch.device("cpu")))
    if sharing * (rounded + beside) > free:
        logger.debug(
            "%.3g GB of a basis are not pinned: %.3g GB of host memory are available, "
            "%.3g GB would be needed in total",
            nbytes / 1e9,
            free / 1e9,
            sharing * (rounded + beside) / 1e9,
        )
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:  # refused by the driver, or by the limit on locked memory
        logger.debug("%.3g GB of a basis are not pinned: %s", nbytes / 1e9, error)
        return torch.empty(shape, dtype=dtype, device="cpu")


def release_pinned() -> None:
    """Return unused page-locked memory to the system; PyTorch would cache it."""
    # Private: not every supported release of torch has a public name for it.
    release = getattr(torch._C, "_host_emptyCache", None)
    if release is not None:
        release()
