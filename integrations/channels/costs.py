"""Cost of weight entries in multiply-adds, for ranking channels by loss per cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.objective.parameters import unwrap
from hesscurv.objective.running.environment import preserved


def macs_per_entry(model: nn.Module, example_inputs: Any) -> dict[str, float]:
    """Return the multiply-adds per entry of each weight for one sample.

    An entry of a convolution kernel is used once per output position, one of a dense layer once per
    row of its input. Pruning channels changes neither, so one measurement serves all steps of
    iterative pruning.

    Args:
        model: The module; wrappers of torch.compile and DDP are unwrapped.
        example_inputs: Inputs of the model: a tensor, a tuple of arguments or a dict of keyword
            arguments, with the samples along the first axis of their first tensor.

    Returns:
        A dict from dotted names of weights to multiply-adds per entry and sample, for convolutions
        and dense layers. Other parameters have no cost.

    Raises:
        TypeError: If the model is not a module.
        ValueError: If no convolution or dense layer is called.

    Cost: one forward pass without gradients. The model is left as it was.

    Example:
        >>> hesscurv.integrations.macs_per_entry(torch.nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8))
        {'weight': 36.0}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, float] = {}

    def hook(layer: Any, args: Any, out: Tensor) -> None:
        # A kernel is applied at each input of a transposed convolution, each output of others.
        seen = args[0] if getattr(layer, "transposed", False) else out
        # The number of positions is the numel over the width, the first axis of the weight.
        if id(layer.weight) in names:
            name = names[id(layer.weight)]
            found[name] = found.get(name, 0.0) + seen.numel() / layer.weight.shape[0]

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    device = next(model.parameters()).device
    hooks = []
    with preserved(model, device, False), torch.no_grad():
        try:
            hooks = [layer.register_forward_hook(hook) for layer in layers]
            n = _call(model, example_inputs)
        finally:
            for handle in hooks:
                handle.remove()
    if not found:
        raise ValueError("expected a model that calls a convolution or a dense layer, got none")
    return {name: positions / n for name, positions in found.items()}


def check_costs(costs: Mapping[str, float] | None) -> None:
    """Require finite nonnegative costs.

    Raises:
        ValueError: If one is negative or not finite.
    """
    for name, cost in (costs or {}).items():
        if not 0 <= cost < float("inf"):
            raise ValueError(f"expected finite costs of at least 0, got {cost} for {name!r}")


def _call(model: nn.Module, inputs: Any) -> int:
    """Run the model on copies of its buffers, and return the number of samples."""
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    else:
        args, kwargs = (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.func.functional_call(model, buffers, args, kwargs)
    first = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    return first.shape[0]
