"""Total and free memory of devices."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

_UNKNOWN = 16 << 30  # assumed if the system does not report it


def device_memory(device: torch.device) -> int:
    """Return the total memory of a device in bytes, used or not.

    Sizes planned from it are the same in every run on a machine. 16 GiB if the system does not
    report it.
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
    """Return the chunk size, in entries, for algebra on long vectors.

    Small chunks suit a CPU's caches. A GPU needs enough work per launch: half a GB in float32, or
    1/64 of the memory of smaller ones.

    Args:
        device: Device of the vectors.
        on_host: Chunk size on CPUs.
    """
    if device.type != "cuda":
        return on_host
    return max(on_host, min(2**27, device_memory(device) // 256))


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes, reclaimable caches included.

    On a GPU: memory free in the driver plus memory that PyTorch's allocator holds unused. On the
    CPU: available memory as reported by the kernel, within the container's limit. The total memory
    if the system does not report it.
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


def used_memory(device: torch.device) -> int:
    """Return the memory in use in bytes: of tensors on a GPU, of this process on the CPU.

    0 if the system does not report it.
    """
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _container() -> tuple[int | None, int]:
    """Return the memory limit of the process's control group, and the memory it uses."""
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
        if most >= 1 << 60:  # cgroup v1 without a limit
            continue
        for line in stat.splitlines():
            if line.split()[0] == cached:
                now -= int(line.split()[1])  # the page cache is reclaimed on demand
        return most, now
    return None, 0


def memory_budget(device: torch.device, wanted: int | None) -> int:
    """Return the memory budget in bytes: the given one, or a fraction of the device's memory.

    A fraction of the total, not the free memory, so that runs are reproducible: a quarter on a GPU,
    an eighth on the CPU.

    Raises:
        ValueError: If `wanted` is not a positive int.
    """
    if wanted is not None:
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted <= 0:
            raise ValueError(f"expected memory_budget in bytes, a positive int, got {wanted!r}")
        return wanted
    return device_memory(device) // (4 if device.type == "cuda" else 8)
