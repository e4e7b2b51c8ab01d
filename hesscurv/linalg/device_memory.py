"""How much memory a device has."""

from __future__ import annotations

import os

import torch


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has in all, not what is free now.

    Sizes that are planned from it are the same in every run on one machine. 16 GiB where it
    cannot be found out.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return 16 << 30
