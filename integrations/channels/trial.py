"""Trial removal: test that a model without some channels agrees with those channels at zero.

Both are run on copies before anything is changed. A channel is zeroed wherever it is read: in the
inputs of convolutions and dense layers and, for other readers such as the product of queries and
keys, in the outputs of the layers that write it. Layer and group normalisation use statistics over
the remaining channels.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from hesscurv.integrations.channels.groups import keep_scale_
from hesscurv.integrations.channels.slices import READERS
from hesscurv.objective.data.batches import part_of
from hesscurv.objective.objective import Objective

_logger = logging.getLogger(__name__)
_SAMPLES = 8

_TYPES = tp.ops.OPTYPE
_BY_CHANNEL = (_TYPES.CONV, _TYPES.DEPTHWISE_CONV, _TYPES.BN, _TYPES.IN, _TYPES.PRELU)
_NO_LAYERS = (
    _TYPES.CONCAT,
    _TYPES.SPLIT,
    _TYPES.ELEMENTWISE,
    _TYPES.RESHAPE,
    _TYPES.UNBIND,
    _TYPES.EXPAND,
    _TYPES.SLICE,
    _TYPES.OUTPUT,
)


@dataclass(frozen=True)
class Verdict:
    """Outcome of a trial.

    Args:
        kind: "same"; "differs", in numbers; "shape", if outputs lose channels; "fails", if the
            smaller model does not run; or "unknown", if the trial is impossible.
        why: The finding, for a message.
    """

    kind: Literal["same", "differs", "shape", "fails", "unknown"]
    why: str = ""


def try_removal(
    objective: Objective,
    batch: Any,
    groups: Sequence[Any],
    adapt: Callable[[nn.Module], None] | None = None,
) -> Verdict:
    """Remove groups from a copy of the model, and compare it with a copy where they are zero.

    Args:
        objective: The model and the task; the model has the groups' layers.
        batch: A batch, on the device.
        groups: Groups of torch-pruning, all made for the present model, in order of removal.
        adapt: Adapts a model after the removal of channels.

    Cost: two copies of the model and two forward passes.
    """
    try:
        smaller, zeroed = _Copy(objective.model), _Copy(objective.model)
    except Exception as error:
        return Verdict("unknown", f"the model cannot be copied ({error})")
    steps = [
        (dep, sorted(set(map(int, idxs))))
        for group in groups
        for dep, idxs in group
        if dep.target.type not in _NO_LAYERS and len(idxs)
    ]
    for dep, idxs in steps:
        if not zeroed.set_to_zero(dep, idxs):
            return Verdict("unknown", f"{dep.target.name} is of an unknown kind")
    try:
        wanted = _outputs(objective, zeroed.model, batch)
    except Exception as error:
        return Verdict("unknown", f"the model does not run on a batch ({error})")
    try:
        for dep, idxs in steps:
            smaller.remove(dep, idxs)
        if adapt is not None:
            adapt(smaller.model)
        got = _outputs(objective, smaller.model, batch)
    except Exception as error:
        return Verdict("fails", f"{type(error).__name__}: {error}")
    if got.shape != wanted.shape:
        return Verdict("shape", f"outputs of shape {tuple(got.shape)}, not {tuple(wanted.shape)}")
    if not bool(wanted.isfinite().all()):
        return Verdict("unknown", "outputs are not finite")
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    off = float((got - wanted).abs().max()) if wanted.numel() else 0.0
    # Rounding grows through the layers; a misplaced channel changes leading digits.
    if not off <= 8 * torch.finfo(wanted.dtype).eps ** 0.5 * scale:
        return Verdict("differs", f"outputs differ by {off:.1e}, of {scale:.1e} at most")
    return Verdict("same")


def check_removal(
    objective: Objective,
    groups: Sequence[Any],
    adapt: Callable[[nn.Module], None] | None = None,
    *,
    must_run: bool,
) -> None:
    """Refuse groups whose removal differs from setting them to zero.

    Args:
        objective: The model and the task.
        groups: Groups of torch-pruning, made for the present model.
        adapt: Adapts a model after the removal of channels.
        must_run: Whether to also refuse failures that `adapt` or the caller may fix: views of fixed
            sizes, such as in attention, and outputs that lose channels.

    Raises:
        ValueError: If they differ; nothing has been changed.
    """
    batch = part_of(next(iter(objective.batches.first_pass())), 0, _SAMPLES)
    verdict = try_removal(objective, batch, groups, adapt)
    may_be_mended = verdict.kind == "shape" or (
        verdict.kind == "fails" and "is invalid for input of size" in verdict.why
    )
    if verdict.kind == "same":
        return
    if verdict.kind == "unknown" or (may_be_mended and not must_run):
        _logger.warning(
            "the removal of channels of %s was not checked: %s", _names_of(groups), verdict.why
        )
        return
    if len(groups) > 1:
        alone = [g for g in groups if try_removal(objective, batch, [g], adapt).kind != "same"]
        groups = alone or groups
    remedy = "leave them out of pruning (ignored_layers)"
    if verdict.kind == "shape":
        remedy = "add the layers whose outputs are the model's to ignored_layers"
    elif may_be_mended:
        remedy = "set the sizes that the model's code keeps, such as head_dim, in `adapt`"
    raise ValueError(
        f"expected a model that without channels of {_names_of(groups)} computes what it does with "
        f"them at zero, got {verdict.why}; its code counts on their number (chunks, slices, "
        "heads without num_heads, a scale), or torch-pruning does not see where they are read: "
        f"{remedy}"
    )


class _Copy:
    """A copy of a model, with a map from modules to their copies."""

    def __init__(self, model: nn.Module) -> None:
        memo: dict[int, Any] = {}
        self.model = copy.deepcopy(model, memo)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._of = memo
        self._gone: dict[Any, set[int]] = {}

    def remove(self, dep: Any, idxs: list[int]) -> None:
        """Remove channels from a layer as `torch_pruning.Group.prune`, at their present indices."""
        node, axis = dep.target, (dep.target.module, dep.handler)
        gone = self._gone.setdefault(axis, set())
        new = set(idxs) - gone
        idxs = [i - sum(g < i for g in gone) for i in sorted(new)]
        gone |= new
        if not idxs:
            return
        dep.handler.__self__.pruning_dim = node.pruning_dim
        module = self._of[id(node.module)]
        head_dim = getattr(module, "head_dim", 0)
        result = dep.handler(module, list(idxs))
        if node.type == _TYPES.MHA:
            keep_scale_(module, head_dim)
        if node.type == _TYPES.PARAMETER:
            path, _, name = self._names[id(node.module)].rpartition(".")
            setattr(self.model.get_submodule(path), name, result)
            self._of[id(node.module)] = result

    @torch.no_grad()
    def set_to_zero(self, dep: Any, idxs: list[int]) -> bool:
        """Zero channels of a layer where they are read; return whether that is supported."""
        node, module = dep.target, self._of[id(dep.target.module)]
        index = torch.tensor(idxs, device="cpu")
        if node.type == _TYPES.PARAMETER:
            module.index_fill_(node.pruning_dim % module.ndim, index.to(module.device), 0)
        elif dep.handler in READERS:
            zero_inputs_(module, index.to(module.weight.device))
        elif node.type == _TYPES.GN or (
            node.type == _TYPES.LN and len(module.normalized_shape) == 1
        ):
            module.register_forward_hook(_normalized_without(index))
        elif node.type in _BY_CHANNEL:
            module.register_forward_hook(_zeroed(index, None))
        elif node.type in (_TYPES.LINEAR, _TYPES.EMBED):
            module.register_forward_hook(_zeroed(index, -1))
        elif node.type == _TYPES.MHA and module.in_proj_weight is not None:
            width = module.embed_dim
            rows = torch.cat([index + k * width for k in range(3)]).to(module.in_proj_weight.device)
            module.in_proj_weight[rows] = 0
            if module.in_proj_bias is not None:
                module.in_proj_bias[rows] = 0
            zero_inputs_(module.out_proj, rows[: len(index)])
            # The remaining channels do not depend on them.
            module.in_proj_weight[:, rows[: len(index)]] = 0
            module.register_forward_hook(_zeroed(index, -1))
        else:
            return False
        return True


def _outputs(objective: Objective, model: nn.Module, batch: Any) -> Tensor:
    """Return the task's outputs on a batch, or its loss, in eval mode with fixed random numbers."""
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    other = Objective(
        model, objective.task, [batch], names, training=False, compute_dtype=None, budget=None
    )
    other.refresh()
    values = other.parameters()
    with other.environment(), torch.no_grad():
        torch.manual_seed(0)
        if callable(getattr(other.task, "outputs", None)):
            try:
                return other.outputs(values, batch)
            except TypeError:  # several outputs
                pass
        return other.loss(values, batch)


def zero_inputs_(layer: Any, index: Tensor) -> None:
    """Zero the weights of a convolution or dense layer that read some inputs."""
    weight = layer.weight
    if getattr(layer, "transposed", False):
        weight[index] = 0
    elif getattr(layer, "groups", 1) > 1:
        size = weight.shape[1]
        blocks = weight.unflatten(0, (layer.groups, -1))
        blocks[index // size, :, index % size] = 0
    else:
        weight[:, index] = 0


def _zeroed(index: Tensor, axis: int | None) -> Any:
    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):  # attention, which also returns its weights
            return out[0].index_fill(-1, index.to(out[0].device), 0), *out[1:]
        places = len(getattr(module, "kernel_size", ()))
        # In an unbatched convolution the channels are the first axis.
        along = axis if axis is not None else (0 if places and out.ndim == places + 1 else 1)
        return out.index_fill(along, index.to(out.device), 0)

    return hook


def _normalized_without(index: Tensor) -> Any:
    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        x, is_layer = args[0], isinstance(module, nn.LayerNorm)
        along = x.ndim - 1 if is_layer else 1
        kept = torch.ones(x.shape[along], dtype=torch.bool, device="cpu")
        kept[index] = False
        left = kept.nonzero().squeeze(1).to(x.device)
        weight, bias = (
            None if p is None else p.index_select(0, left) for p in (module.weight, module.bias)
        )
        x = x.index_select(along, left)
        if is_layer:
            values = F.layer_norm(x, (len(left),), weight, bias, module.eps)
        else:
            values = F.group_norm(x, module.num_groups, weight, bias, module.eps)
        return torch.zeros_like(out).index_copy(along, left, values)

    return hook


def _names_of(groups: Sequence[Any]) -> str:
    """Return the roots of groups, for messages."""
    names = [group[0].dep.target.name for group in groups]
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
