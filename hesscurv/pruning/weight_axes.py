"""Output and input dimensions of a layer's weight, for all layer types.

N:M patterns, removal of whole rows, input covariances and output scales follow the matrix that a
layer multiplies with, ``(outputs, inputs)``. Layers store it differently: `nn.Linear` as it is,
transposed convolutions and the `Conv1D` of transformers transposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hesscurv.objective.layer_kinds import is_conv1d


@dataclass(frozen=True)
class WeightAxes:
    """The dimensions of a weight; all others, such as those of a kernel, count as inputs.

    Args:
        outputs: The output dimension.
        inputs: The input dimension, along which N:M patterns lie.
        groups: Number of groups of a grouped convolution, which share no inputs and no outputs.
        grouped: The dimension that runs over all groups in turn; the other one has the entries of
            a single group.
    """

    outputs: int
    inputs: int
    groups: int = 1
    grouped: Literal["outputs", "inputs"] = "outputs"

    def num_inputs(self, shape: tuple[int, ...]) -> int:
        """Return the number of consecutive inputs that belong to one output."""
        return shape[self.inputs] // (self.groups if self.grouped == "inputs" else 1)

    def to_matrix(self, stored: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as a matrix (outputs, inputs), one group only."""
        return stored.permute(self.order(stored.ndim)).flatten(1)

    def order(self, ndim: int) -> tuple[int, ...]:
        """Return the stored dimensions in the order outputs, inputs, all others."""
        first = (self.outputs, self.inputs)
        return (*first, *(d for d in range(ndim) if d not in first))


AS_LINEAR = WeightAxes(outputs=0, inputs=1)
REVERSED = WeightAxes(outputs=1, inputs=0)


def _linear(module: Any) -> WeightAxes:
    # Flag of subclasses in loralib and older PEFT: the weight is stored transposed.
    return REVERSED if getattr(module, "fan_in_fan_out", False) else AS_LINEAR


def _convolution(module: Any) -> WeightAxes:
    return WeightAxes(0, 1, module.groups, "outputs")


def _transposed(module: Any) -> WeightAxes:
    return WeightAxes(1, 0, module.groups, "inputs")


# Layer type, pattern of tensor names, and their axes. An embedding (tokens, width) has the axes of
# the output layer that is often tied to it.
_Axes = WeightAxes | Callable[[Any], WeightAxes]
_TABLE: list[tuple[type[nn.Module], str, _Axes]] = [
    (nn.Linear, "weight", _linear),
    (nn.Bilinear, "weight", AS_LINEAR),
    (_ConvTransposeNd, "weight", _transposed),
    (_ConvNd, "weight", _convolution),
    (nn.Embedding, "weight", AS_LINEAR),
    (nn.EmbeddingBag, "weight", AS_LINEAR),
    (nn.MultiheadAttention, "in_proj_weight|[qkv]_proj_weight", AS_LINEAR),
    (nn.RNNBase, r"weight_(ih|hh|hr)_l\d+(_reverse)?", AS_LINEAR),
    (nn.RNNCellBase, "weight_(ih|hh)", AS_LINEAR),
]
_REGISTERED: dict[type[nn.Module], dict[str, WeightAxes]] = {}


def find_axes(module: nn.Module, name: str) -> WeightAxes | None:
    """Return the output and input dimensions of a weight, or None if unknown.

    Args:
        module: The module that owns the tensor.
        name: The tensor's name when dense, such as "weight".
    """
    for cls in type(module).__mro__:
        if name in _REGISTERED.get(cls, {}):
            return _REGISTERED[cls][name]
    if name == "weight" and is_conv1d(module):
        return REVERSED
    for cls, pattern, axes in _TABLE:
        if isinstance(module, cls) and re.fullmatch(pattern, name):
            return axes if isinstance(axes, WeightAxes) else axes(module)
    return None


def axes_of(module: nn.Module, name: str, dotted: str | None = None) -> WeightAxes:
    """Return the output and input dimensions of a weight.

    Args:
        module: The module that owns the tensor.
        name: The tensor's name when dense, such as "weight".
        dotted: Its name in the model, for the message.

    Raises:
        ValueError: If the layer's type is unknown, or the tensor is not one of its matrices.
    """
    axes = find_axes(module, name)
    if axes is None:
        registered = [cls.__name__ for cls in _REGISTERED]
        raise ValueError(
            f"expected a weight of one of {[*_KNOWN, *registered]}, whose inputs and outputs are "
            f"known, got {dotted or name!r} of a {type(module).__name__}; leave it out, pass `dim` "
            f"where there is one, or call hesscurv.pruning.register_weight_axes("
            f"{type(module).__name__}, {name!r}, outputs=..., inputs=...)"
        )
    return axes


def output_dimension(module: nn.Module, name: str, parameter: Tensor) -> int:
    """Return the dimension whose slices are the outputs of a layer.

    Raises:
        ValueError: If the layer's type is unknown, or no dimension has single outputs as slices.
    """
    if parameter.ndim < 2:
        return 0
    axes = axes_of(module, name)
    if axes.grouped == "inputs" and axes.groups > 1:
        raise ValueError(
            f"expected a dimension whose slices are single outputs, got {name!r} of a "
            f"{type(module).__name__} with groups={axes.groups}, whose slices along dimension "
            f"{axes.outputs} have an output of each group; pass dim={axes.outputs} to prune these "
            "together"
        )
    return axes.outputs


def check_groups_of_inputs(
    module: nn.Module, name: str, parameter: Tensor, dim: int, m: int
) -> None:
    """Refuse patterns of m entries along `dim` that would straddle two groups of inputs."""
    axes = find_axes(module, name)
    if axes is None or dim != axes.inputs:
        return
    if (inputs := axes.num_inputs(tuple(parameter.shape))) % m:
        raise ValueError(
            f"expected a number of inputs of each group that m={m} divides, got {inputs} for "
            f"{name!r} of a {type(module).__name__} with groups={axes.groups}; choose another m or "
            "leave this weight out"
        )


_KNOWN = (
    *("Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d"),
    *("ConvTranspose3d", "Embedding", "EmbeddingBag", "MultiheadAttention", "RNN", "LSTM", "GRU"),
    *("RNNCell", "LSTMCell", "GRUCell", "transformers' Conv1D"),
)


def register_weight_axes(
    layer_type: type[nn.Module], name: str = "weight", *, outputs: int, inputs: int
) -> None:
    """Register the output and input dimensions of a weight of a custom layer type.

    Used by N:M patterns, which lie along the inputs, and by structured pruning of outputs. The
    entry applies to subclasses, precedes the built-in table, and lasts until the process ends.

    Args:
        layer_type: A subclass of `nn.Module`.
        name: The tensor's name when dense.
        outputs: The output dimension, nonnegative.
        inputs: The input dimension, different from `outputs`.

    Raises:
        TypeError: If `layer_type` is not a module type, or a dimension not an int.
        ValueError: If a dimension is negative, or both are equal.

    Example:
        >>> class Transposed(torch.nn.Linear):  # stores its weight as (inputs, outputs)
        ...     pass
        >>> hesscurv.pruning.register_weight_axes(Transposed, outputs=1, inputs=0)
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise TypeError(f"expected a subclass of torch.nn.Module, got {layer_type!r}")
    for what, dim in (("outputs", outputs), ("inputs", inputs)):
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"expected {what} as an int, got {dim!r}")
        if dim < 0:
            raise ValueError(f"expected {what} as a dimension that is not negative, got {dim}")
    if outputs == inputs:
        raise ValueError(f"expected two dimensions, got {outputs} for both outputs and inputs")
    _REGISTERED.setdefault(layer_type, {})[name] = WeightAxes(outputs, inputs)
