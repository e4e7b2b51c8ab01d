"""The lines of the library that wait for the device: who reads a number, copies, or compares."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"),
    *("unique_consecutive", "_linalg_eigh", "_linalg_svd", "bincount"),
}


class WaitSites(TorchDispatchMode):
    """Collects the call chains of operations that wait for a device, inside this context.

    It sees what Python's dispatch shows, which costs time: use it to find where the waits come
    from that the device has counted.

    Args:
        folder: The part of a path that marks the code of interest.

    Attributes:
        sites: How often each chain of calls in that code waited, the innermost call first.
    """

    def __init__(self, folder: str = "/hesscurv/") -> None:
        super().__init__()
        self._folder = folder
        self.sites: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note its callers if the host has to wait for it."""
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        by_turns = (kwargs or {}).get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
        if not by_turns and self._waits(name, tensors, out):
            self.sites[f"{name}: {self._callers()}"] += 1
        return out

    @staticmethod
    def _waits(name: str, tensors: list[Tensor], out: Any) -> bool:
        on_device = [t.is_cuda for t in tensors]
        if name in READS:
            return any(on_device)
        if name in ("_to_copy", "copy_", "_copy_from"):
            placed = [*on_device, *([out.is_cuda] if isinstance(out, torch.Tensor) else [])]
            return any(placed) and not all(placed)
        if name in ("index", "index_put_", "index_put"):
            return any(on_device) and any(
                t.dtype in (torch.bool, torch.uint8) or not t.is_cuda for t in tensors[1:]
            )
        return False

    def _callers(self, most: int = 4) -> str:
        frames = [f for f in traceback.extract_stack() if self._folder in f.filename]
        named = [f"{f.filename.rpartition(self._folder)[2]}:{f.lineno}" for f in frames[::-1]]
        return " < ".join(named[:most])
