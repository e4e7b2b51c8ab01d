"""Tensor cores played by the CPU: inputs are rounded to TF32 where torch's switches say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution.default: 2, aten.convolution_backward.default: 3}
PRODUCTS = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2)}


def rounded(x: Any) -> Any:
    """Round float32 to TF32's 10 bits of mantissa, to nearest even."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    bits = x.clone(memory_format=torch.contiguous_format).view(torch.int32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32)


class TensorCores(TorchDispatchMode):
    """Round the inputs of convolutions and matrix products, as a GPU does by the same switches.

    Attributes:
        rounded: How many operations were rounded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places: Any = ()
        if func in CONVOLUTIONS and torch.backends.cudnn.allow_tf32:
            places = range(CONVOLUTIONS[func])
        if func in PRODUCTS and torch.backends.cuda.matmul.allow_tf32:
            places = PRODUCTS[func]
        if places:
            self.rounded += 1
            args = [rounded(a) if i in places else a for i, a in enumerate(args)]
        return func(*args, **(kwargs or {}))
