"""Snapshots of the state that a step may change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RandomState:
    """The state of torch's random number generators, the CPU's and one device's.

    Args:
        device: The device; where it has no generator of its own, the CPU's alone is kept.
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Put the generators back to where they were."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Snapshot:
    """Weights, gradients, flags and random numbers, to put back what a failed step has changed.

    Args:
        params: The parameters, on one device.

    Memory: the weights and, where there are gradients, these: 2 D numbers at most.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._params = list(params)
        self._weights = [p.detach().clone() for p in params]
        self._flags = [p.requires_grad for p in params]
        # The tensor itself too, since others may hold it, and its values, since zero_grad may have
        # filled it with zeros.
        self._gradients = [None if p.grad is None else (p.grad, p.grad.clone()) for p in params]
        self._random = RandomState(params[0].device)

    def weights_of(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the weights that some of the parameters had."""
        kept = {id(p): weight for p, weight in zip(self._params, self._weights, strict=True)}
        return [kept[id(p)] for p in params]

    def restore(self) -> None:
        """Put everything back, bit for bit."""
        with torch.no_grad():
            for p, weight, flag, gradient in zip(
                self._params, self._weights, self._flags, self._gradients, strict=True
            ):
                p.requires_grad_(flag)
                p.copy_(weight)
                p.grad = None
                if gradient is not None:
                    kept, values = gradient
                    if kept.layout == torch.strided:
                        kept.copy_(values)
                    p.grad = kept
        self._random.restore()
