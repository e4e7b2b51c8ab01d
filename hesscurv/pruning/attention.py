"""Pruning of the output projection of `nn.MultiheadAttention`, whose hook torch never runs.

A pruned module computes ``weight = weight_orig * weight_mask`` in a hook before its forward. An
attention reads ``out_proj.weight`` without calling `out_proj`: after an optimizer step it would use
the old weight, and a second backward pass would fail.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.prune import BasePruningMethod

from hesscurv.objective.parameters import unwrap

_MARK = "refreshed_by_attention"


class _OutProjectionHook:
    """Forward pre-hook of an attention that runs the pruning hooks of its output projection."""

    def __call__(self, attention: nn.MultiheadAttention, inputs: Any) -> None:
        for hook in attention.out_proj._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                hook(attention.out_proj, inputs)


def prepare_attention_(model: nn.Module) -> None:
    """Make the output projection of each `nn.MultiheadAttention` prunable.

    Registers a forward pre-hook on each attention, once. It does nothing while ``out_proj.weight``
    is not pruned; like any hook it disables torch's fused inference path of
    `nn.TransformerEncoderLayer`. Copies of the model keep it.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.

    Example:
        >>> attention = torch.nn.MultiheadAttention(4, 2)
        >>> hesscurv.pruning.prepare_attention_(attention)
        >>> "out_proj.weight" in hesscurv.pruning.find_weights(attention)
        True
    """
    for module in unwrap(model).modules():
        if isinstance(module, nn.MultiheadAttention) and is_unprepared(module.out_proj):
            module.register_forward_pre_hook(_OutProjectionHook())
            module.out_proj.__dict__[_MARK] = True


def is_unprepared(module: nn.Module) -> bool:
    """Whether a module is an attention's output projection whose pruning hook would never run."""
    return isinstance(module, NonDynamicallyQuantizableLinear) and not module.__dict__.get(_MARK)
