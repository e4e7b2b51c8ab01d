"""Small matrices of the host, sent to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device_of(small: Tensor, like: Tensor) -> Tensor:
    """Return a small matrix of the host on another tensor's device, in its dtype.

    An ordinary copy to a GPU waits until all work before it is done, so that a solver which sends
    coefficients after each block would never have more than one block in its queue. From pinned
    memory the copy takes its turn in the queue.

    Args:
        small: A tensor of any device; of the CPU where the copy is not to wait.
        like: A tensor of the dtype and device to have.

    Returns:
        The same values, rounded to the dtype of `like`; `small` itself where nothing changes.

    Cost: for a GPU, two copies on the host.
    """
    if like.device.type != "cuda" or small.device.type != "cpu":
        return small.to(like)
    small = small.to(like.dtype).contiguous()
    try:
        # PyTorch keeps the pinned memory until the copy is done.
        return small.pin_memory().to(like.device, non_blocking=True)
    except RuntimeError:  # no more memory can be pinned: then the copy waits
        return small.to(like.device)


def all_finite(*tensors: Tensor) -> bool:
    """Whether no tensor has NaN or inf entries: one reading of each, and one of the device."""
    # NaN propagates to both bounds; no tensor of flags is made.
    bounds = [bound for t in tensors if t.numel() for bound in t.detach().aminmax()]
    return not bounds or bool(torch.stack(bounds).isfinite().all())
