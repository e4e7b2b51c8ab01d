"""Parameter entries that torch-pruning removes with each channel.

A group of torch-pruning lists layers with the indices that each one loses. Here every such index
becomes a slice of a named parameter, and values of a parameter's entries are summed by channel. A
channel may remove several slices of one parameter (behind a flatten, or row c and column c of a
layer on a residual stream): an entry in two of them counts once.

Shapes: b rows of values, C channels of the group, E indices of an axis.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

_WIDTH = (("weight", 0), ("bias", 0))
# Attribute and axis pruned by torch-pruning's functions. Normalisation layers lose the same on both
# sides; for layer normalisation and bare parameters the graph's node gives the axis.
_AXES: dict[Any, tuple[tuple[str, int], ...]] = {
    tp.function.prune_conv_out_channels: _WIDTH,
    tp.function.prune_conv_in_channels: (("weight", 1),),
    tp.function.prune_depthwise_conv_out_channels: _WIDTH,
    tp.function.prune_linear_out_channels: _WIDTH,
    tp.function.prune_linear_in_channels: (("weight", 1),),
    tp.function.prune_batchnorm_out_channels: _WIDTH,
    tp.function.prune_groupnorm_out_channels: _WIDTH,
    tp.function.prune_instancenorm_out_channels: _WIDTH,
    tp.function.prune_layernorm_out_channels: _WIDTH,
    tp.function.prune_prelu_out_channels: (("weight", 0),),
    tp.function.prune_embedding_out_channels: (("weight", 1),),
}
_TYPES = tp.ops.OPTYPE
_DIVIDING = (_TYPES.SPLIT, _TYPES.SLICE)
READERS = (tp.function.prune_conv_in_channels, tp.function.prune_linear_in_channels)


@dataclass(frozen=True, eq=False)
class ChannelSlice:
    """The slices of one parameter along one axis, and the channel of each.

    Args:
        name: The parameter's dotted name in the model.
        shape: Its shape.
        axis: The axis of the slices.
        index: Shape (E,), int64: positions along the axis.
        channel: Shape (E,), int64: the channel of the group that removes each slice.
        blocks: In a grouped convolution, the number of equal parts of axis 0; slice e then lies
            within part ``block[e]``.
        block: Shape (E,), int64; unused for one part.
        entries: Shapes (E,) each: flat entries instead of slices, and their channels in `channel`.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    index: Tensor
    channel: Tensor
    blocks: int = 1
    block: Tensor | None = None
    entries: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all slices are whole, so that sums over the other axes suffice."""
        return self.blocks == 1 and self.entries is None

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Return the flat entries of the parameter, and the channel of each."""
        if self.entries is not None:
            return self.entries, self.channel
        flat = torch.arange(prod(self.shape), device="cpu").reshape(self.shape)
        if self.blocks == 1:
            taken = flat.movedim(self.axis, 0)[self.index].flatten(1)
        else:
            assert self.block is not None
            parts = flat.unflatten(0, (self.blocks, -1))  # block, row in it, axis 1, kernel
            taken = parts.movedim(self.axis + 1, 1)[self.block, self.index].flatten(1)
        return taken.flatten(), self.channel.repeat_interleave(taken.shape[1])


@dataclass(frozen=True, eq=False)
class GroupChannels:
    """A group's channels, with the slices that they remove from each layer.

    Args:
        root: The name of the group's first layer, for messages.
        count: C, the number of channels.
        layers: One list of slices for each layer, in torch-pruning's order.
    """

    root: str
    count: int
    layers: list[list[ChannelSlice]] = field(default_factory=list)


def read_group(group: Any, names: Mapping[int, str], readers_only: bool = False) -> GroupChannels:
    """Return the slices that each channel of a torch-pruning group removes.

    Args:
        group: A `torch_pruning.Group`, with all or some channels of its root.
        names: Maps the id of each of the model's parameters to its name.
        readers_only: Whether to include only the weights that read the channels: the input side of
            convolutions and dense layers. A group without any is included as a whole.

    Returns:
        The channels, in the order in which the pruner expects their scores.

    Raises:
        ValueError: If a layer's weight is computed from other parameters (masked by
            `torch.nn.utils.prune`, normalised or parametrised), or is not one of the model's.
    """
    root = group[0]
    found = GroupChannels(root.dep.target.name, len(root.idxs))
    items = _taken(group)
    if readers_only:
        items = [item for item in items if item[0].handler in READERS] or items
    for dep, kept in items:
        if not kept:
            continue
        index, channel = (torch.tensor(column, device="cpu") for column in zip(*kept, strict=True))
        slices = _slices_of(dep, index, channel, names)
        if slices:
            found.layers.append(slices)
    return found


def _taken(group: Any) -> list[tuple[Any, list[tuple[int, int]]]]:
    """Return each layer's indices in a group, with the position of the channel of each."""
    root = group[0]
    position = _positions(root.idxs)
    if not any(item.dep.target.type in _DIVIDING for item in group):
        # Where torch-pruning does not say the channel (grouped-query attention), it leaves the
        # layer out of its own importances as well.
        return [
            (
                item.dep,
                [
                    (i, position[r])
                    for i, r in zip(item.idxs, item.root_idxs, strict=True)
                    if r is not None
                ],
            )
            for item in group
        ]
    # Parts of one tensor that are combined again go together; torch-pruning names only one of them.
    order = [item.dep for item in group]
    kept: dict[Any, list[tuple[int, int]]] = {(dep.target, dep.handler): [] for dep in order}
    for i, place in position.items():
        for item in group._DG.get_pruning_group(root.dep.target.module, root.dep.handler, [i]):
            mine = kept.get((item.dep.target, item.dep.handler))
            if mine is not None:
                mine += [(index, place) for index in item.idxs]
    return [(dep, kept[dep.target, dep.handler]) for dep in order]


def check_inside(idxs: Tensor, size: int, layer: str) -> None:
    """Require indices within the channels of a layer.

    Raises:
        ValueError: If one is outside.
    """
    if len(idxs) and int(idxs.max()) >= size:
        raise ValueError(
            f"expected indices below {size}, the channels of {layer}, got {int(idxs.max())} from "
            "torch-pruning, which does not know what lies between (such as a pixel shuffle or a "
            "gate that halves its input); add the layer before it to the pruner's ignored_layers"
        )


def sum_along(values: Tensor, axis: int) -> Tensor:
    """Sum values (b, *shape) over all axes of the parameter except one: (b, shape[axis])."""
    moved = values.movedim(axis + 1, 1)
    return moved.flatten(2).sum(2) if moved.ndim > 2 else moved


def sum_by_channel(sums: Tensor, part: ChannelSlice, count: int) -> Tensor:
    """Sum the results of `sum_along` by channel: shape (b, C)."""
    out = sums.new_zeros(sums.shape[0], count)
    index, channel = part.index.to(sums.device), part.channel.to(sums.device)
    return out.index_add_(1, channel, sums.index_select(1, index))


def channel_sums(values: Tensor, parts: Sequence[ChannelSlice], count: int) -> Tensor:
    """Sum values of a parameter's entries by channel, each entry once.

    Args:
        values: Shape (b, *shape).
        parts: All slices of this parameter in the group.
        count: C.

    Returns:
        Shape (b, C).
    """
    if len(parts) == 1 and parts[0].is_plain:
        return sum_by_channel(sum_along(values, parts[0].axis), parts[0], count)
    found = [part.coordinates() for part in parts]
    entries = torch.cat([entry for entry, _ in found])
    channels = torch.cat([channel for _, channel in found])
    key = torch.unique(entries * count + channels).to(values.device)
    flat = values.flatten(1).index_select(1, key // count)
    return flat.new_zeros(len(flat), count).index_add_(1, key % count, flat)


def by_name(slices: Sequence[ChannelSlice]) -> dict[str, list[ChannelSlice]]:
    """Collect slices by parameter."""
    out: dict[str, list[ChannelSlice]] = {}
    for part in slices:
        out.setdefault(part.name, []).append(part)
    return out


def _positions(idxs: Sequence[int]) -> dict[int, int]:
    """Map a root index to its position among the scores.

    A group with all channels is scored by index, in any order; one with some of them in the given
    order.
    """
    if sorted(idxs) == list(range(len(idxs))):
        return {i: i for i in idxs}
    return {i: place for place, i in enumerate(idxs)}


def _slices_of(
    dep: Any, index: Tensor, channel: Tensor, names: Mapping[int, str]
) -> list[ChannelSlice]:
    layer, handler = dep.target.module, dep.handler
    if isinstance(layer, nn.Parameter):
        axis = dep.target.pruning_dim % layer.ndim
        return [_slice(layer, dep.target.name, axis, index, channel, names)]
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        return []  # one slope for all channels: none is removed
    axes = _AXES.get(handler)
    if axes is None:
        return (
            _probed(dep, index, channel, names)
            if next(layer.parameters(), None) is not None
            else []
        )
    if handler == tp.function.prune_layernorm_out_channels:
        axis = dep.target.pruning_dim
        if len(layer.normalized_shape) < -axis:
            return []
        axes = tuple((name, axis % len(layer.normalized_shape)) for name, _ in axes)
    out = []
    for attribute, axis in axes:
        value = getattr(layer, attribute, None)
        if value is None:
            continue
        if not isinstance(value, nn.Parameter):
            raise ValueError(_computed(layer, dep.target.name, attribute))
        is_conv = isinstance(layer, nn.modules.conv._ConvNd)
        if is_conv and layer.transposed and attribute == "weight":
            axis = 1 - axis
        if is_conv and attribute == "weight" and axis == 1 and layer.groups > 1:
            # Axis 1 has the channels of one group only; axis 0 determines which.
            size = value.shape[1]
            out.append(
                ChannelSlice(
                    _name(value, dep.target.name, names),
                    tuple(value.shape),
                    axis,
                    index % size,
                    channel,
                    layer.groups,
                    index // size,
                )
            )
        else:
            out.append(_slice(value, dep.target.name, axis, index, channel, names))
    return out


def _slice(
    value: nn.Parameter,
    layer: str,
    axis: int,
    index: Tensor,
    channel: Tensor,
    names: Mapping[int, str],
) -> ChannelSlice:
    check_inside(index, value.shape[axis], layer)
    return ChannelSlice(_name(value, layer, names), tuple(value.shape), axis, index, channel)


def _name(value: nn.Parameter, layer: str, names: Mapping[int, str]) -> str:
    if id(value) not in names:
        raise ValueError(
            f"expected a group of the model that this importance was made for, got a parameter of "
            f"{layer} which is not the model's; make the importance for the model that the pruner "
            "has"
        )
    return names[id(value)]


def _probed(
    dep: Any, index: Tensor, channel: Tensor, names: Mapping[int, str]
) -> list[ChannelSlice]:
    """Find the entries removed with each channel by pruning a copy filled with entry numbers.

    For layers with custom pruning functions, such as attention: one copy per channel.
    """
    layer = dep.target.module
    known = {attribute: names[id(p)] for attribute, p in layer.named_parameters() if id(p) in names}
    shapes = {attribute: tuple(p.shape) for attribute, p in layer.named_parameters()}
    numbered = copy.deepcopy(layer)
    for p in numbered.parameters():
        p.grad = None
        p.data = torch.arange(p.numel(), dtype=torch.float64, device="cpu").reshape(p.shape)
    entries: dict[str, list[Tensor]] = {attribute: [] for attribute in known}
    owners: dict[str, list[Tensor]] = {attribute: [] for attribute in known}
    for i, c in zip(index.tolist(), channel.tolist(), strict=True):
        left = copy.deepcopy(numbered)
        dep.handler.__self__.pruning_dim = dep.target.pruning_dim
        try:
            dep.handler(left, [i])
        except Exception as error:
            raise ValueError(
                f"torch-pruning failed to take channel {i} from {dep.target.name}: {error}; add "
                "the layer to ignored_layers"
            ) from error
        survivors = dict(left.named_parameters())
        for attribute in known:
            gone = torch.ones(prod(shapes[attribute]), dtype=torch.bool, device="cpu")
            gone[survivors[attribute].detach().long().flatten()] = False
            entries[attribute].append(gone.nonzero().squeeze(1))
            owners[attribute].append(torch.full_like(entries[attribute][-1], c))
    out = []
    for attribute, name in known.items():
        found, owner = torch.cat(entries[attribute]), torch.cat(owners[attribute])
        if len(found):
            nothing = found.new_empty(0)
            out.append(ChannelSlice(name, shapes[attribute], 0, nothing, owner, entries=found))
    return out


def _computed(layer: nn.Module, name: str, attribute: str) -> str:
    if f"{attribute}_orig" in dict(layer.named_parameters(recurse=False)):
        how = "is masked by torch.nn.utils.prune"
        remedy = f"call torch.nn.utils.prune.remove(module, {attribute!r}) first"
    else:
        how = "is computed from other parameters"
        remedy = "remove the parametrisation or the weight normalisation first"
    return (
        f"expected {attribute!r} of {name} to be a parameter, but it {how}, and torch-pruning, "
        f"which puts a smaller parameter in its place, would break the layer; {remedy}"
    )
