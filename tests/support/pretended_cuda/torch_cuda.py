"""`torch.cuda` on the pretended device: what Python says of it, counts, limits.

To be imported, and `install` called, in a process that has the compiled device preloaded
(`PretendedDevice` starts such processes), before the code under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from support.pretended_cuda import streams

NAME = "pretended CUDA device"


@dataclass(frozen=True)
class Counts:
    """What the device did since `reset`.

    Attributes:
        waits: How often the host waited for the device: the sum of the item reads, the copies
            to and from the host that were not `non_blocking`, the operations whose kernels
            read a result on the host (`nonzero`, `equal`, `eigh`, ...) and synchronizations.
        launches: Kernels started, one for each operation.
        item_reads: `.item()`, `float(tensor)`, `if tensor:`.
        waiting_operations: `nonzero`, `equal`, `eigh` and the like.
        host_to_device, device_to_host, device_to_device: Copies.
        host_to_device_bytes, device_to_host_bytes: Their bytes.
        synchronizations: Of the device, a stream or an event.
        allocations: Tensors' memories allocated.
        used_bytes, peak_bytes: Memory in use now, and at most since `reset`, of all devices.
        by_operation: Calls by the operation's name, ``"aten::mm"``.
    """

    waits: int = 0
    launches: int = 0
    item_reads: int = 0
    waiting_operations: int = 0
    host_to_device: int = 0
    device_to_host: int = 0
    device_to_device: int = 0
    host_to_device_bytes: int = 0
    device_to_host_bytes: int = 0
    synchronizations: int = 0
    allocations: int = 0
    used_bytes: int = 0
    peak_bytes: int = 0
    by_operation: dict[str, int] = field(default_factory=dict)


def counts() -> Counts:
    """Return what the device did since `reset`."""
    read = dict(_device().counts())
    operations = {name: n for name, n in read.items() if "::" in name}
    return Counts(
        **{name: n for name, n in read.items() if name not in operations}, by_operation=operations
    )


def reset() -> None:
    """Set the counts to zero; the peak of memory to what is in use now."""
    _device().reset()


def set_limit(bytes_: int | None) -> None:
    """Set the devices' memory: beyond it allocations raise `torch.OutOfMemoryError`.

    Args:
        bytes_: Of both devices together; None sets the 8 GiB that it begins with.
    """
    _device().set_limit(bytes_ or 0)


def set_pinnable(bytes_: int | None) -> None:
    """Set how much host memory can be pinned in all; None sets the 8 GiB that it begins with."""
    _device().set_pinnable(-1 if bytes_ is None else bytes_)


@contextmanager
def waits_refused() -> Iterator[None]:
    """Let everything that waits for the device raise, as `set_sync_debug_mode("error")` does."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def install() -> None:
    """Let `torch.cuda` answer for the pretended device.

    Raises:
        RuntimeError: If the compiled device was not preloaded.
    """
    if not hasattr(torch.ops.pretended_cuda, "counts"):
        raise RuntimeError("the pretended device is not preloaded: set LD_PRELOAD to its library")
    for name, replacement in _replacements().items():
        setattr(torch.cuda, name, replacement)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch.backends.cudnn.is_acceptable = lambda _: False  # warns otherwise that it is missing
    torch.UntypedStorage.cuda = _storage_to_cuda  # type: ignore[method-assign]
    # Looks the device up in torch._C, which knows none.
    torch.serialization.register_package(5, lambda _: None, _deserialize)


def _device() -> Any:
    return torch.ops.pretended_cuda


def _index(device: Any = None) -> int:
    """The index of a device given as torch.cuda's functions take it."""
    if isinstance(device, int):
        return device if device >= 0 else _device().current_device()
    index = None if device is None else torch.device(device).index
    return _device().current_device() if index is None else index


def _replacements() -> dict[str, Any]:
    """All functions of torch.cuda that are replaced, by name."""
    device = _device()
    generators = tuple(device.default_generator(i) for i in range(device.device_count()))

    def used() -> int:
        return device.counts()["used_bytes"]

    def free() -> int:
        return max(0, device.limit() - used())

    def get_sync_debug_mode() -> int:
        return device.sync_debug_mode()

    def set_sync_debug_mode(mode: int | str) -> None:
        names = {"default": 0, "warn": 1, "error": 2}
        device.set_sync_debug_mode(names[mode] if isinstance(mode, str) else mode)

    def properties(_: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=NAME,
            total_memory=device.limit(),
            major=8,
            minor=0,
            multi_processor_count=16,
            gcnArchName="",
        )

    def manual_seed_all(seed: int) -> None:
        for generator in generators:
            generator.manual_seed(seed)

    def set_memory_fraction(fraction: float, _: Any = None) -> None:
        device.set_limit(int(fraction * device.limit()) if fraction < 1 else 0)

    return {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "_is_in_bad_fork": lambda: False,
        "_exchange_device": device.exchange_device,
        "_maybe_exchange_device": device.exchange_device,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": device.device_count,
        "current_device": device.current_device,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "stream": streams.stream,
        "current_stream": streams.current_stream,
        "default_stream": streams.default_stream,
        "set_device": lambda index: device.exchange_device(_index(index)),
        "get_device_name": lambda _=None: NAME,
        "get_device_capability": lambda _=None: (8, 0),
        "get_device_properties": properties,
        "synchronize": streams.synchronize,
        "empty_cache": lambda: None,
        "mem_get_info": lambda _=None: (free(), device.limit()),
        "memory_allocated": lambda _=None: used(),
        "memory_reserved": lambda _=None: used(),  # nothing is cached
        "max_memory_allocated": lambda _=None: device.counts()["peak_bytes"],
        "reset_peak_memory_stats": lambda _=None: device.reset(),
        "set_per_process_memory_fraction": set_memory_fraction,
        "get_sync_debug_mode": get_sync_debug_mode,
        "set_sync_debug_mode": set_sync_debug_mode,
        "default_generators": generators,
        "get_rng_state": lambda device="cuda": generators[_index(device)].get_state(),
        "set_rng_state": lambda state, device="cuda": generators[_index(device)].set_state(state),
        "manual_seed": lambda seed: generators[_index()].manual_seed(seed),
        "manual_seed_all": manual_seed_all,
        "initial_seed": lambda: generators[_index()].initial_seed(),
    }


def _storage_to_cuda(storage: Any, device: Any = None, non_blocking: bool = False) -> Any:
    """Copy a storage to the device through tensors: storages themselves know torch._C's alone."""
    there = torch.device("cuda", _index(device))
    bytes_ = torch.empty(0, dtype=torch.uint8).set_(storage)
    return bytes_.to(there, non_blocking=non_blocking).untyped_storage()


def _deserialize(storage: Any, location: str) -> Any:
    """Place a storage that `torch.load` reads for "cuda"; None for other locations."""
    if not str(location).startswith("cuda"):
        return None
    return _storage_to_cuda(storage, str(location))
