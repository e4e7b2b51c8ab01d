"""Input covariances of linear and convolution layers.

For a weight matrix W (o, i), unfolded for a convolution, this is ``A = mean over samples of
sum over places a a^T``, the input factor of the Kronecker-factored Gauss-Newton matrix. The mean
weights samples as the task does; within a sample all places count, even tokens whose targets are
masked, which a forward pass cannot identify.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hesscurv.objective.data.batches import select, split
from hesscurv.objective.objective import Objective
from hesscurv.pruning.curvature.sample_weights import WeighedBatch
from hesscurv.pruning.weight_axes import REVERSED, find_axes
from hesscurv.pruning.weights import Weight, current_parameter

# Small, since images unfold to nine times their size and more.
_SAMPLES_AT_ONCE = 64


def has_covariance(weight: Weight) -> bool:
    """Whether a weight belongs to a linear layer or ungrouped Conv2d, stored (outputs, inputs)."""
    module, name = weight
    if name != "weight" or find_axes(module, name) == REVERSED:
        return False
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and isinstance(module.padding, tuple)
    return isinstance(module, nn.Linear)


def has_input_rows(weight: Weight) -> bool:
    """Whether `input_covariances` supports the layer of a weight."""
    module, name = weight
    if name != "weight" or (axes := find_axes(module, name)) is None or axes.groups > 1:
        return False
    return isinstance(module, (nn.Linear, _ConvNd)) or axes == REVERSED


def input_covariances(
    objective: Objective,
    params: tuple[Tensor, ...],
    samples: Iterable[WeighedBatch],
    weights: Mapping[str, Weight],
    largest: int,
    *,
    constant: bool = False,
) -> dict[str, Tensor]:
    """Return the input covariances of layers at some parameters, in blocks of limited size.

    Args:
        objective: The model and the task, refreshed.
        params: Values of its parameters.
        samples: Batches on the device, from `weigh`.
        weights: The weights by name, each with `has_input_rows`.
        largest: Maximal size of one block.
        constant: Whether to append an input that is always 1, for the intercept of the layer: its
            row holds the sums of the others, and the number of places.

    Returns:
        By name shape (c, i/c, i/c), not centred: c blocks of consecutive inputs, of equal size, in
        the order of the weight's matrix (outputs, inputs), see `WeightAxes`. Layers that do not
        run, or whose input is not rows of inputs, are omitted.

    Cost:
        A forward pass and ``i^2 / c`` operations per sample and place. Samples of equal weight are
        batched.
    """
    found: dict[str, Tensor] = {}
    total = weight = 0.0
    sizes = {name: num_columns(w) for name, w in weights.items()}

    def read(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(given, Tensor) or given.numel() == 0:
                return
            rows = unfolded(module, given.detach())
            if rows.shape[1] != sizes[name]:
                return  # a subclass that does not multiply its weight with its input
            if constant:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            c = num_blocks(rows.shape[1], largest)
            rows_cri = rows.view(len(rows), c, -1).transpose(0, 1)
            product = (rows_cri.mT @ rows_cri).mul_(weight)
            found[name] = product if name not in found else found[name].add_(product)

        return hook

    # no_grad inside: the environment enables gradients.
    with objective.environment(), torch.no_grad(), _pre_hooks(weights, read):
        for batch, weights_n in samples:
            total += float(weights_n.sum())
            # Rows of a layer cannot be assigned to samples, since a layer may have time first: run
            # samples of equal weight together instead.
            for weight in weights_n.unique().tolist():
                alike = select(batch, weights_n == weight)
                for part in split(alike, _SAMPLES_AT_ONCE):
                    objective.loss(params, part)
    return {name: product / total for name, product in found.items()}


def num_blocks(inputs: int, largest: int) -> int:
    """Return the least divisor of the number of inputs with blocks of at most `largest`."""
    return next(c for c in range(1, inputs + 1) if inputs % c == 0 and inputs // c <= largest)


def unfolded(module: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's inputs as rows (r, i), such that its outputs are rows times W^T."""
    if not isinstance(module, _ConvNd):
        return x.reshape(-1, x.shape[-1])
    x = x if x.ndim == len(module.kernel_size) + 2 else x[None]  # without a batch
    if isinstance(module, _ConvTransposeNd):
        # Equivalent to a convolution with the reversed kernel over inputs spread by the strides.
        stride = [1] * len(module.kernel_size)
        patches = _patches(_spread(module, x), module.kernel_size, stride, module.dilation)
        return patches.flip(tuple(range(2, patches.ndim))).flatten(1)
    padding: Any = module.padding
    if isinstance(module, nn.Conv2d) and isinstance(padding, tuple):
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        columns = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
        return columns.transpose(1, 2).flatten(0, 1)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    return _patches(x, module.kernel_size, module.stride, module.dilation).flatten(1)


def _patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the patches that a kernel reads, shape (r, channels, *kernel)."""
    d = len(kernel)
    for j in range(d):
        x = x.unfold(2 + j, dilation[j] * (kernel[j] - 1) + 1, stride[j])[..., :: dilation[j]]
    # From (n, channels, *places, *kernel).
    return x.movedim(1, 1 + d).flatten(0, d)


def _spread(module: _ConvTransposeNd, x: Tensor) -> Tensor:
    """Return a transposed convolution's inputs with zeros between and around them."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    places: tuple[Any, ...] = (..., *(slice(None, None, s) for s in module.stride))
    spread[places] = x
    around: list[int] = []
    for j in reversed(range(len(sizes))):
        reach = module.dilation[j] * (module.kernel_size[j] - 1)
        padding: Any = module.padding[j]
        around += [reach - padding, reach - padding + module.output_padding[j]]
    return F.pad(spread, around)


def num_columns(weight: Weight) -> int:
    """Return the number of inputs of a weight's matrix, kernel positions included."""
    axes = find_axes(*weight)
    assert axes is not None
    shape = current_parameter(*weight).shape
    return prod(shape) // shape[axes.outputs]


@contextmanager
def _pre_hooks(
    weights: Mapping[str, Weight], make: Callable[[str, nn.Module], Callable[..., None]]
) -> Iterator[None]:
    handles = [
        weight.module.register_forward_pre_hook(make(name, weight.module), with_kwargs=True)
        for name, weight in weights.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
