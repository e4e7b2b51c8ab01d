"""Layers of other libraries, told by their looks: none of these is imported for it."""

from __future__ import annotations

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is a `Conv1D` of transformers, whose weight is stored (inputs, outputs)."""
    weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
    return (
        any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
        and weight is not None
        and weight.ndim == 2
        and weight.shape[1] == getattr(module, "nf", None)
    )
