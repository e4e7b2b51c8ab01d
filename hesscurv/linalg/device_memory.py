"""How much memory a device has, and how much of it is free."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_UNKNOWN = 16 << 30  # what is assumed where it cannot be found out


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has in all, not what is free now.

    Sizes that are planned from it are the same in every run on one machine. 16 GiB where it
    cannot be found out.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return _UNKNOWN
    limit, _ = _container()
    return min(total, limit or total)


def chunk_entries(device: torch.device, on_host: int) -> int:
    """Return how many entries of long vectors are best worked on at once.

    A CPU's caches want few. A GPU wants enough work for each launch: half a GB in float32, a
    sixty-fourth of the memory of smaller ones.

    Args:
        device: Where they are.
        on_host: The number for CPUs.
    """
    if device.type != "cuda":
        return on_host
    return max(on_host, min(2**27, device_memory(device) // 256))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be taken on a device now, with those that caches would give up.

    For a GPU, what the driver has left and what PyTorch's own allocator holds unused; for the CPU,
    what the kernel calls available, within the container's limit. Where it cannot be found out, the
    memory in all.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    available = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    limit, used = _container()
    if limit is not None:
        left = max(0, limit - used)
        available = left if available is None else min(available, left)
    return device_memory(device) if available is None else available


def _container() -> tuple[int | None, int]:
    """Return the limit of the control group that the process runs in, and what it uses."""
    for limit, used, cached in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "file"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "total_cache",
        ),
    ):
        try:
            most = int(Path(limit).read_text())
            now = int(Path(used).read_text())
            stat = Path(limit).with_name("memory.stat").read_text()
        except (OSError, ValueError):
            continue
        if most >= 1 << 60:  # no limit, in the older files
            continue
        for line in stat.splitlines():
            if line.split()[0] == cached:
                now -= int(line.split()[1])  # file pages are given up on demand
        return most, now
    return None, 0


def memory_budget(device: torch.device, wanted: int | None) -> int:
    """Return the bytes to stay within: as wanted, or a share of the device's memory.

    The share is of the memory in all, not of what is free now, so that the same run takes the same
    steps every time: a quarter of a GPU's, an eighth of the machine's.

    Raises:
        ValueError: If `wanted` is not a positive int.
    """
    if wanted is not None:
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted <= 0:
            raise ValueError(f"expected memory_budget in bytes, a positive int, got {wanted!r}")
        return wanted
    return device_memory(device) // (4 if device.type == "cuda" else 8)
