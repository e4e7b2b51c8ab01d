"""Prunable weights of a model, by name, and access to them while they are pruned.

Names are those of the dense model: "conv1.weight", even while ``torch.nn.utils.prune`` stores the
parameter as ``weight_orig`` together with a buffer ``weight_mask``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hesscurv.objective.parameters import unwrap
from hesscurv.pruning.attention import is_unprepared

WeightSelection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None


class Weight(NamedTuple):
    """A module and the name of one of its tensors, as ``torch.nn.utils.prune`` takes them.

    Equal to the plain tuple, and hashable: a key for the `importance_scores` of
    ``prune.global_unstructured``.

    Attributes:
        module: The module that owns the tensor.
        name: The tensor's name in it when dense, such as "weight".

    Example:
        >>> weight = hesscurv.pruning.Weight(model[0], "weight")
        >>> weight == (model[0], "weight")
        True
    """

    module: nn.Module
    name: str


def find_weights(model: nn.Module, names: WeightSelection = None) -> dict[str, Weight]:
    """Return the weights of a model that can be pruned, by dotted name, in the model's order.

    By default: every floating parameter of two or more dimensions that requires grad and has
    "weight" in its name, split at underscores: of linear and convolution layers, embeddings,
    attentions (``in_proj_weight``) and recurrent layers (``weight_ih_l0``). Biases and the
    weights of normalisation layers are excluded.

    Some weights cannot be pruned: those shared by two modules, since only one would be masked;
    those computed from others (`parametrize`, `weight_norm`, `spectral_norm`); and the output
    projection of an `nn.MultiheadAttention` before `prepare_attention_`. Selected by full name,
    they raise an error; otherwise they are skipped, with a warning that gives the reason.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.
        names: None for the default; a name or names, each the full dotted name of any floating
            parameter, even a bias or a frozen one, or of a submodule, which selects the default
            weights in it; or a predicate ``(name, parameter) -> bool`` over the default ones.

    Returns:
        A dict from dotted name to `Weight`. A module that occurs twice has its first name.

    Raises:
        ValueError: If a name is unknown, nothing is selected, a weight selected by its full name
            cannot be pruned, or a parameter is not initialised yet.
        TypeError: If `names` is none of the above, or a selected parameter is not floating.

    Warns:
        UserWarning: If default weights are left out because they cannot be pruned.

    Example:
        >>> list(hesscurv.pruning.find_weights(model))
        ['0.weight', '2.weight']
    """
    model = unwrap(model)
    candidates = _candidates(model)
    chosen: set[str] = set()
    if names is None:
        chosen = {c.dotted for c in candidates if c.is_default()}
    elif callable(names) and not isinstance(names, nn.Module):
        chosen = {c.dotted for c in candidates if c.is_default() and names(c.dotted, c.parameter)}
    else:
        modules = dict(model.named_modules(remove_duplicate=False))
        by_weight = {c.weight: c for c in candidates}
        for item in _as_names(names):
            found, is_full_name = _named(item, modules, by_weight)
            if is_full_name and (error := found[0].error) is not None:
                raise type(error)(f"cannot prune {item!r}: {error}")
            chosen |= {c.dotted for c in found}
    selected = [c for c in candidates if c.dotted in chosen]
    left_out = {c.dotted: c.error for c in selected if c.error is not None}
    weights = {c.dotted: c.weight for c in selected if c.error is None}
    reasons = "; ".join(f"{name!r}: {error}" for name, error in left_out.items())
    if not weights:
        raise ValueError(
            "expected a model with weights to prune, found none that `names` selects"
            + (f" and that can be pruned: {reasons}" if reasons else "")
            + f"; it has {_shorten(c.dotted for c in candidates)}"
        )
    if reasons:
        warnings.warn(f"left out of pruning: {reasons}", UserWarning, stacklevel=2)
    return weights


def pruned_weights(model: nn.Module) -> dict[str, Weight]:
    """Return the pruned weights, by dotted name, in the model's order.

    Args:
        model: The module; torch.compile and DDP wrappers are unwrapped.

    Returns:
        A dict from dotted name to `Weight`; empty for a dense model.

    Example:
        >>> net = copy.deepcopy(model)
        >>> hesscurv.pruning.apply_masks_(net, {"0.weight": torch.arange(12).reshape(3, 4) > 2})
        >>> list(hesscurv.pruning.pruned_weights(net))
        ['0.weight']
    """
    return {
        f"{path}.{name}" if path else name: Weight(module, name)
        for path, module in unwrap(model).named_modules()
        for name in _tensors_of(module)
        if current_mask(module, name) is not None
    }


def as_dense_name(name: str) -> str:
    """Return the name of a parameter in the dense model: without the suffix "_orig"."""
    return name.removesuffix("_orig")


def current_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Return the trained parameter: ``name_orig`` while pruned, otherwise ``name``.

    Args:
        module: The module that owns the tensor.
        name: The tensor's name when dense, such as "weight".

    Returns:
        The parameter, the same object before, during and after pruning.

    Raises:
        ValueError: If the module has no such parameter.
    """
    stored = f"{name}_orig" if f"{name}_mask" in module._buffers else name
    parameter = module._parameters.get(stored)
    if parameter is None:
        raise ValueError(
            f"expected a parameter {name!r} of a {type(module).__name__}, got none; it has "
            f"{_shorten(module._parameters)}"
        )
    return parameter


def current_mask(module: nn.Module, name: str) -> Tensor | None:
    """Return the mask of a tensor, True where it is kept, or None if it is not pruned.

    Args:
        module: The module that owns the tensor.
        name: The tensor's name when dense, such as "weight".

    Returns:
        A new bool tensor of the tensor's shape, on its device, or None.
    """
    mask = module._buffers.get(f"{name}_mask")
    if mask is None or module._parameters.get(f"{name}_orig") is None:
        return None
    return mask.detach() != 0


def refresh_(module: nn.Module, name: str) -> None:
    """Set ``module.name = name_orig * name_mask``, as the hook does before the next forward.

    After `load_state_dict`, or a write to ``name_orig``, the masked tensor is stale until then. It
    is set without a graph, so that `copy.deepcopy` of the module works; after a forward with
    gradients, whose hook attaches a graph, it fails.

    Args:
        module: The module that owns the tensor; nothing is done if it is not pruned.
        name: The tensor's name when dense, such as "weight".

    Example:
        >>> net = copy.deepcopy(model)
        >>> hesscurv.pruning.apply_masks_(net, {"0.weight": torch.arange(12).reshape(3, 4) > 2})
        >>> with torch.no_grad():
        ...     _ = net[0].weight_orig.fill_(1.0)
        >>> hesscurv.pruning.refresh_(net[0], "weight")
        >>> int(net[0].weight.sum())
        9
    """
    if current_mask(module, name) is None:
        return
    restore_hook_(module, name)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            with torch.no_grad():
                setattr(module, name, hook.apply_mask(module))


def restore_hook_(module: nn.Module, name: str) -> None:
    """Restore the hook of a pruned tensor, without which its mask is no longer applied.

    An error in a second pruning by ``torch.nn.utils.prune`` drops the hook of the first.
    """
    hooks = module._forward_pre_hooks.values()
    mask = current_mask(module, name)
    if mask is None or any(
        isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name for hook in hooks
    ):
        return
    hook = prune.CustomFromMask(mask)
    hook._tensor_name = name
    module.register_forward_pre_hook(hook)


def check_prunable(module: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter of a prunable tensor, or raise with the reason.

    Args:
        module: The module that owns the tensor.
        name: The tensor's name when dense, such as "weight".

    Raises:
        ValueError: If the module has no such parameter, it is not initialised, it is computed
            from others, or it is an attention's output projection before `prepare_attention_`.
        TypeError: If `module` is not a module, or the parameter is not floating.
    """
    if not isinstance(module, nn.Module) or not isinstance(name, str):
        raise TypeError(
            "expected a module and the name of its tensor, got "
            f"{type(module).__name__} and {type(name).__name__}"
        )
    if error := _error_of(module, name):
        raise type(error)(f"cannot prune {name!r} of a {type(module).__name__}: {error}")
    return current_parameter(module, name)


@dataclass
class _Candidate:
    """A tensor that may be selected for pruning, and the error if it cannot be pruned."""

    dotted: str
    weight: Weight
    parameter: nn.Parameter
    error: Exception | None

    def is_default(self) -> bool:
        """Whether `find_weights` selects it by default, prunable or not."""
        if "weight" not in self.weight.name.split("_") or not self.parameter.requires_grad:
            return False
        if isinstance(self.parameter, UninitializedParameter):
            raise ValueError(f"cannot prune {self.dotted!r}: {self.error}")
        is_norm = isinstance(self.weight.module, (nn.LayerNorm, nn.RMSNorm))
        return self.parameter.is_floating_point() and self.parameter.ndim >= 2 and not is_norm


def _candidates(model: nn.Module) -> list[_Candidate]:
    """All tensors of the model that are parameters, or computed from parameters."""
    tensors = [
        (f"{path}.{name}" if path else name, Weight(module, name), parameter)
        for path, module in model.named_modules()
        for name, parameter in _tensors_of(module).items()
    ]
    owners: dict[int, list[str]] = {}
    for dotted, weight, parameter in tensors:
        if not _is_computed(*weight):
            owners.setdefault(id(parameter), []).append(dotted)
    candidates = []
    for dotted, weight, parameter in tensors:
        error = _error_of(*weight)
        others = [other for other in owners.get(id(parameter), []) if other != dotted]
        if error is None and others:
            error = ValueError(
                f"it is the same parameter as {_shorten(others)}, and only one of them would be "
                "masked; give each module a parameter of its own, or leave it dense"
            )
        candidates.append(_Candidate(dotted, weight, parameter, error))
    return candidates


def _tensors_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own tensors by dense name, each with its (largest) underlying parameter."""
    found: dict[str, nn.Parameter] = {}
    for stored, parameter in module._parameters.items():
        if parameter is not None:
            name = _name_of(module, stored)
            if name not in found or parameter.ndim > found[name].ndim:
                found[name] = parameter
    if parametrize.is_parametrized(module):
        for name, parametrization in module.parametrizations.items():  # type: ignore[operator, union-attr]
            originals = [p for p in parametrization._parameters.values() if p is not None]
            found[name] = max(originals, key=lambda p: p.ndim)
    return found


def _name_of(module: nn.Module, stored: str) -> str:
    """The dense name of the tensor that a stored parameter belongs to."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)) and stored.startswith(f"{hook.name}_"):
            return hook.name
    dense = as_dense_name(stored)
    return stored if current_mask(module, dense) is None else dense


def _is_computed(module: nn.Module, name: str) -> bool:
    return parametrize.is_parametrized(module, name) or any(
        isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == name
        for hook in module._forward_pre_hooks.values()
    )


def _error_of(module: nn.Module, name: str) -> Exception | None:
    """Why a tensor cannot be pruned, except for sharing."""
    if _is_computed(module, name) or isinstance(module, parametrize.ParametrizationList):
        return ValueError(
            "it is computed from other parameters (parametrize, weight_norm or spectral_norm); "
            "remove the parametrization first, e.g. by parametrize.remove_parametrizations"
        )
    try:
        parameter = current_parameter(module, name)
    except ValueError as error:
        return error
    if isinstance(parameter, UninitializedParameter):
        return ValueError("it is not initialised yet; run the lazy model on one batch first")
    if not parameter.is_floating_point():
        return TypeError(
            f"expected a floating dtype, got {parameter.dtype}; prune before quantizing"
        )
    if name == "weight" and is_unprepared(module):
        return ValueError(
            "nn.MultiheadAttention reads it without running its pruning hook; call "
            "hesscurv.pruning.prepare_attention_(model) first, or leave it dense"
        )
    return None


def _as_names(names: object) -> list[str]:
    items = [names] if isinstance(names, str) else names
    if not isinstance(items, Iterable) or isinstance(items, nn.Module):
        raise TypeError(
            "expected `names` to be None, names or a predicate (name, parameter) -> bool, got "
            f"{type(names).__name__}"
        )
    items = list(items)
    for item in items:
        if not isinstance(item, str):
            raise TypeError(f"expected names in `names`, got a {type(item).__name__}")
    return items


def _named(
    item: str, modules: Mapping[str, nn.Module], candidates: Mapping[Weight, _Candidate]
) -> tuple[list[_Candidate], bool]:
    """The tensors that a name selects, and whether it is the full name of one tensor."""
    path, _, stored = item.rpartition(".")
    if path in modules:
        weight = Weight(modules[path], _name_of(modules[path], stored))
        if weight in candidates:
            return [candidates[weight]], True
    if item not in modules:
        raise ValueError(
            f"the model has no parameter or submodule {item!r}; it has "
            f"{_shorten(candidate.dotted for candidate in candidates.values())}"
        )
    inside = set(modules[item].modules())
    found = [c for w, c in candidates.items() if w.module in inside and c.is_default()]
    if not found:
        raise ValueError(
            f"the submodule {item!r} has no weight of two dimensions or more that requires grad; "
            "name its parameters in full to prune others"
        )
    return found, False


def _shorten(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    rest = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return "[" + ", ".join(repr(n) for n in names[:limit]) + rest + "]"
