"""Conversion between state dicts of pruned and dense models, and masks by name.

A pruned weight has two entries, ``weight_orig`` and ``weight_mask``, a dense one has ``weight``.
After a plain `load_state_dict`, ``module.weight`` is stale until the next forward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hesscurv.objective.parameters import unwrap
from hesscurv.pruning.attention import prepare_attention_
from hesscurv.pruning.masks.methods import apply_mask_
from hesscurv.pruning.rollback import unchanged_on_error
from hesscurv.pruning.weights import (
    Weight,
    current_mask,
    current_parameter,
    find_weights,
    pruned_weights,
    refresh_,
    restore_hook_,
)


def dense_state_dict(model: nn.Module) -> OrderedDict[str, Any]:
    """Return the state dict of a pruned model in dense form.

    Masked weights have their plain names and are multiplied by their masks; masks are omitted. A
    dense model of the same class loads it with `load_state_dict` and computes the same.

    Args:
        model: The module, pruned or not; torch.compile and DDP wrappers are unwrapped, and
            leave no prefix in the names.

    Returns:
        A state dict. Masked weights are new tensors; all others share the model's memory, as in
        ``model.state_dict()``.

    Cost:
        A copy of the masked weights.

    Example:
        >>> net = copy.deepcopy(model)
        >>> hesscurv.pruning.apply_masks_(net, {"0.weight": torch.arange(12).reshape(3, 4) > 2})
        >>> "0.weight_orig" in net.state_dict()
        True
        >>> "0.weight_orig" in hesscurv.pruning.dense_state_dict(net)
        False
    """
    model = unwrap(model)
    masked = _masked_names(model)
    state = model.state_dict()
    dense: OrderedDict[str, Any] = OrderedDict()
    products: dict[tuple[int, torch.Size], Tensor] = {}
    for key, value in state.items():
        name = key.removesuffix("_orig")
        if key.endswith("_orig") and name in masked:
            # A module that occurs twice has one weight with two names.
            identity = (value.data_ptr(), value.shape)
            if identity not in products:
                products[identity] = value * state[f"{name}_mask"].to(value.dtype)
            dense[name] = products[identity]
        elif not (key.endswith("_mask") and key.removesuffix("_mask") in masked):
            dense[key] = value
    dense._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    return dense


def load_pruned_(
    model: nn.Module, state_dict: Mapping[str, Any], *, keep_masks: bool = True
) -> None:
    """Load a state dict into a model, either of which may be pruned or dense.

    Weights masked in the state dict are masked in the model afterwards, by the same masks, whether
    or not they were before. The parameters stay the same objects, so an optimizer keeps working;
    ``module.weight`` is up to date without a forward.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.
        state_dict: A state dict of a dense or pruned model of the same class, without the prefix
            of a wrapper. It must be complete.
        keep_masks: Whether weights masked only in the model keep their masks, which then apply to
            the loaded values, or become dense.

    Raises:
        TypeError: If `state_dict` is not a mapping.
        ValueError: If names are missing or unknown, a shape differs, a mask has other values than
            0 and 1, or a weight to be masked cannot be pruned; see `find_weights`. The model is
            left unchanged.

    Cost:
        A copy of all parameters and buffers, for the rollback after an error.

    Example:
        >>> net = copy.deepcopy(model)
        >>> hesscurv.pruning.apply_masks_(net, {"0.weight": torch.arange(12).reshape(3, 4) > 2})
        >>> other = copy.deepcopy(model)
        >>> hesscurv.pruning.load_pruned_(other, net.state_dict())
        >>> torch.equal(other(inputs), net(inputs))
        True
    """
    model = unwrap(model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"expected a state dict, got {type(state_dict).__name__}")
    values, masks = _split(state_dict)
    _check_fit(values, masks, _split(model.state_dict(), _masked_names(model))[0])
    with unchanged_on_error(model.modules(), values=True):
        if not keep_masks:
            for dotted, (module, name) in pruned_weights(model).items():
                if dotted not in masks:
                    restore_hook_(module, name)
                    prune.remove(module, name)
        for dotted, (module, name) in _weights_to_mask(model, masks).items():
            mask = masks[dotted]
            parameter = current_parameter(module, name)
            if current_mask(module, name) is None:
                apply_mask_(module, name, mask.to(parameter.device))
            else:
                module._buffers[f"{name}_mask"] = mask.to(parameter.device, parameter.dtype)
        fitting: OrderedDict[str, Any] = OrderedDict(values)
        masked_now = _masked_names(model)
        own = model.state_dict()
        for name in masked_now:
            fitting[f"{name}_orig"] = fitting.pop(name)
            fitting[f"{name}_mask"] = own[f"{name}_mask"]
        if (metadata := getattr(state_dict, "_metadata", None)) is not None:
            fitting._metadata = metadata  # type: ignore[attr-defined]
        model.load_state_dict(fitting)
        for module, name in pruned_weights(model).values():
            refresh_(module, name)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of a pruned model by dotted dense name.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.

    Returns:
        A dict from name, such as "conv1.weight", to a new bool tensor of the weight's shape, on
        its device, True where it is kept. Weights that are not pruned are not in it.

    Cost:
        A byte for each entry of the pruned weights.

    Example:
        >>> net = copy.deepcopy(model)
        >>> hesscurv.pruning.apply_masks_(net, {"0.weight": torch.arange(12).reshape(3, 4) > 2})
        >>> hesscurv.pruning.masks_of(net)["0.weight"][0]
        tensor([False, False, False,  True])
    """
    found = {}
    for dotted, weight in pruned_weights(model).items():
        mask = current_mask(*weight)
        assert mask is not None
        found[dotted] = mask
    return found


def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Prune weights of a model by masks, in addition to their present ones.

    Attentions whose output projection is masked are prepared, see `prepare_attention_`.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.
        masks: A dict from dotted dense name, such as "conv1.weight", to a bool tensor of the
            weight's shape, on any device, True where it is kept; as returned by `masks_of`.

    Raises:
        TypeError: If `masks` is not a mapping, or a mask not a bool tensor.
        ValueError: If a name is unknown, a shape differs, or a weight cannot be pruned; see
            `find_weights`. The model is left unchanged.

    Cost:
        A mask in the dtype of each weight.

    Example:
        >>> net = copy.deepcopy(model)
        >>> hesscurv.pruning.apply_masks_(net, {"0.weight": torch.arange(12).reshape(3, 4) > 2})
        >>> int((net[0].weight == 0).sum())
        3
    """
    model = unwrap(model)
    if not isinstance(masks, Mapping):
        raise TypeError(f"expected masks as a dict from name to mask, got {type(masks).__name__}")
    for dotted, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"expected a bool tensor as the mask of {dotted!r}, got {got}")
    with unchanged_on_error(model.modules()):
        weights = _weights_to_mask(model, masks)
        for dotted, weight in weights.items():
            _check_shape(dotted, masks[dotted], current_parameter(*weight))
        for dotted, weight in weights.items():
            mask = masks[dotted].to(current_parameter(*weight).device)
            before = current_mask(*weight)
            if before is None or bool((before & ~mask).any()):  # avoids a redundant hook
                apply_mask_(*weight, mask)


def write_pruned_(
    model: nn.Module,
    weights: Mapping[str, Weight],
    values: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
) -> None:
    """Write weights and prune them by masks; on an error the model is restored bit for bit.

    Args:
        model: The module.
        weights: The weights to write, by dotted dense name.
        values: Their new values, by the same names; rounded to each parameter's dtype.
        masks: As in `apply_masks_`.
    """
    own = [weight.module for weight in weights.values()]
    with unchanged_on_error(model.modules()), unchanged_on_error(own, values=True):
        with torch.no_grad():
            for name, weight in weights.items():
                current_parameter(*weight).copy_(values[name])
        apply_masks_(model, masks)
        for weight in weights.values():
            refresh_(*weight)


def _weights_to_mask(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Weight]:
    """The weights named by the masks, ready to be pruned."""
    if not masks:
        return {}
    if any(name.endswith("out_proj.weight") for name in masks):
        prepare_attention_(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    prunable = set(find_weights(model, list(masks)).values())
    found: dict[Weight, str] = {}
    for dotted in masks:
        path, _, name = dotted.rpartition(".")
        weight = Weight(modules[path], name)
        if weight not in prunable:
            raise ValueError(f"expected full names of weights in the masks, got {dotted!r}")
        # A module that occurs twice has two names; their masks must agree.
        first = found.setdefault(weight, dotted)
        if not torch.equal(masks[dotted], masks[first]):
            raise ValueError(
                f"expected one mask for {dotted!r} and {first!r}, which are the same weight, got "
                "two different ones"
            )
    return {dotted: weight for weight, dotted in found.items()}


def _masked_names(model: nn.Module) -> set[str]:
    """All dotted names of pruned weights in a state dict, including those of repeated modules."""
    pruned: dict[nn.Module, list[str]] = {}
    for module, name in pruned_weights(model).values():
        pruned.setdefault(module, []).append(name)
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in pruned.get(module, [])
    }


def _split(
    state: Mapping[str, Any], masked: Iterable[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values by dense name, and the masks, of a pruned or dense state dict."""
    if masked is None:
        originals = [key.removesuffix("_orig") for key in state if key.endswith("_orig")]
        masked = [name for name in originals if f"{name}_mask" in state]
    masked = set(masked)
    values, masks = {}, {}
    for key, value in state.items():
        name = key.removesuffix("_orig")
        if key.endswith("_orig") and name in masked:
            values[name] = value
        elif key.endswith("_mask") and key.removesuffix("_mask") in masked:
            name = key.removesuffix("_mask")
            if not bool(((value == 0) | (value == 1)).all()):
                raise ValueError(f"expected a mask of zeros and ones in {key!r}, got other values")
            masks[name] = value != 0
        else:
            values[key] = value
    return values, masks


def _check_fit(
    values: Mapping[str, Any], masks: Mapping[str, Tensor], own: Mapping[str, Any]
) -> None:
    missing = [name for name in own if name not in values]
    unknown = [name for name in values if name not in own]
    if missing or unknown:
        raise ValueError(
            f"expected a state dict of this model, got one that lacks {missing[:8]} "
            f"({len(missing)} in all) and has {unknown[:8]} ({len(unknown)} in all) besides; "
            "remove a wrapper's prefix, such as 'module.', from the names"
        )
    for name, value in values.items():
        if isinstance(own[name], Tensor):
            if not isinstance(value, Tensor):
                raise ValueError(f"expected a tensor for {name!r}, got {type(value).__name__}")
            _check_shape(name, value, own[name])
    for name, mask in masks.items():
        _check_shape(f"{name}_mask", mask, own[name])


def _check_shape(name: str, value: Tensor, own: Tensor) -> None:
    if value.shape != own.shape:
        raise ValueError(
            f"expected shape {tuple(own.shape)} for {name!r}, got {tuple(value.shape)}"
        )
