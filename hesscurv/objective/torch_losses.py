"""Divisors of the means in torch's losses, by which batches are weighted.

The loss over all data is ``sum_b (w_b / W) L_b`` only if w_b is the divisor of batch b's mean: for
a cross-entropy the sum of the class weights of its targets, without ignored ones; for a squared
error its elements. See https://docs.pytorch.org/docs/stable/nn.html#loss-functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CLASSES, _ELEMENTS, _ROWS, _LABELS = "classes", "elements", "rows", "labels"

# The unit counted by each module and function of (outputs, targets).
_MODULES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: _CLASSES,
    nn.NLLLoss: _CLASSES,
    nn.BCELoss: _ELEMENTS,
    nn.BCEWithLogitsLoss: _ELEMENTS,
    nn.MSELoss: _ELEMENTS,
    nn.L1Loss: _ELEMENTS,
    nn.SmoothL1Loss: _ELEMENTS,
    nn.HuberLoss: _ELEMENTS,
    nn.KLDivLoss: _ELEMENTS,
    nn.PoissonNLLLoss: _ELEMENTS,
    nn.SoftMarginLoss: _ELEMENTS,
    nn.HingeEmbeddingLoss: _ELEMENTS,
    nn.MultiMarginLoss: _ELEMENTS,  # its targets are classes, one per sample
    nn.MultiLabelMarginLoss: _LABELS,
    nn.MultiLabelSoftMarginLoss: _LABELS,
}
_FUNCTIONS: dict[Any, str] = {
    F.cross_entropy: _CLASSES,
    F.nll_loss: _CLASSES,
    F.binary_cross_entropy: _ELEMENTS,
    F.binary_cross_entropy_with_logits: _ELEMENTS,
    F.mse_loss: _ELEMENTS,
    F.l1_loss: _ELEMENTS,
    F.smooth_l1_loss: _ELEMENTS,
    F.huber_loss: _ELEMENTS,
    F.kl_div: _ELEMENTS,
    F.poisson_nll_loss: _ELEMENTS,
    F.gaussian_nll_loss: _ELEMENTS,
    F.soft_margin_loss: _ELEMENTS,
    F.hinge_embedding_loss: _ELEMENTS,
    F.multi_margin_loss: _ELEMENTS,
    F.multilabel_margin_loss: _LABELS,
    F.multilabel_soft_margin_loss: _LABELS,
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13
    _MODULES[nn.LinearCrossEntropyLoss] = _CLASSES
_OPTIONS = ("weight", "ignore_index", "label_smoothing", "reduction")
_DIVERGENCES = (nn.KLDivLoss, F.kl_div)


@dataclass(frozen=True)
class TorchLoss:
    """Weighting of one of torch's losses.

    Args:
        counted: The unit that the mean divides by.
        weight: Class weights, shape (C,), or None.
        ignore_index: The class of ignored targets.
        is_smoothed: Whether labels are smoothed, so that a target of weight 0 has a loss.
    """

    counted: str
    weight: Tensor | None = None
    ignore_index: int = -100
    is_smoothed: bool = False

    def weigh(self, targets: Tensor) -> float:
        """Return the divisor of the loss's mean over some targets; 0 if none is valid.

        Raises:
            ValueError: If the mean is infinite: valid targets have no weight, and yet a loss.
        """
        if self.counted == _CLASSES and not targets.is_floating_point():
            total = float(self._of_classes(targets).sum())
            if self.is_smoothed and total == 0 and bool((targets != self.ignore_index).any()):
                raise ValueError(
                    "expected a positive class weight for some target of each batch, got 0 for "
                    "all: with label_smoothing their mean loss is infinite; give each class a "
                    "positive weight, or take larger batches"
                )
            return total
        return targets.numel() / self._divisor(targets)

    def weigh_rows(self, targets: Tensor) -> Tensor | None:
        """Return the same for each row of targets, shape (n,); None if all are equal."""
        if self.counted != _CLASSES or targets.is_floating_point() or targets.ndim == 0:
            return None
        return self._of_classes(targets).reshape(len(targets), -1).sum(1)

    def _of_classes(self, targets: Tensor) -> Tensor:
        valid = targets != self.ignore_index
        if self.weight is None:
            return valid.double()
        weight = self.weight.detach().to(targets.device, torch.float64)
        return weight[targets.where(valid, 0).long()] * valid

    def _divisor(self, targets: Tensor) -> int:
        if targets.ndim == 0:
            return 1
        if self.counted == _CLASSES:  # probabilities, classes in dimension 1
            return max(1, targets.shape[min(1, targets.ndim - 1)])
        if self.counted == _ROWS:
            return max(1, targets.numel() // max(1, len(targets)))
        return max(1, targets.shape[-1]) if self.counted == _LABELS else 1


def torch_loss_of(loss_fn: Any) -> TorchLoss | None:
    """Recognise one of torch's losses, with its options; None for any other.

    Functions may have options bound by `functools.partial`. Losses that may compute anything else
    are not recognised: subclasses that override forward, modules with hooks, reductions other than
    the mean.
    """
    options: dict[str, Any]
    if isinstance(loss_fn, functools.partial):
        if loss_fn.args:
            return None
        function, options = loss_fn.func, loss_fn.keywords
        if isinstance(function, nn.Module):
            return None if options else torch_loss_of(function)
        kind = function if function in _FUNCTIONS else None
        counted = _FUNCTIONS.get(function)
    elif isinstance(loss_fn, nn.Module):
        loss_fn = getattr(loss_fn, "_orig_mod", loss_fn)  # wrapped by torch.compile
        kind = next((k for k in _MODULES if _is_plain(loss_fn, k)), None)
        counted = None if kind is None else _MODULES[kind]
        options = {name: getattr(loss_fn, name, None) for name in _OPTIONS}
    else:
        kind, options = loss_fn, {}
        counted = _FUNCTIONS.get(loss_fn) if callable(loss_fn) and _is_hashable(loss_fn) else None
    if counted is None:
        return None
    reduction = reduction_of(options)
    if reduction == "batchmean" and kind in _DIVERGENCES:
        counted = _ROWS
    elif reduction != "mean":
        return None
    if counted != _CLASSES:
        return TorchLoss(counted)
    ignored = options.get("ignore_index")
    return TorchLoss(
        counted,
        options.get("weight"),
        -100 if ignored is None else int(ignored),
        bool(options.get("label_smoothing")),
    )


def reduction_of(options: Any) -> str:
    """Return the reduction from the options of a loss, including the legacy ones."""
    if options.get("size_average") is not None or options.get("reduce") is not None:
        if options.get("reduce") is False:
            return "none"
        return "sum" if options.get("size_average") is False else "mean"
    return str(options.get("reduction", "mean"))


def may_average(loss_fn: Callable[..., Any], reduction: str) -> bool:
    """Whether a loss's reduction can be a mean over samples."""
    if reduction in ("sum", "none"):
        return False
    return reduction == "mean" or torch_loss_of(loss_fn) is not None or not _is_of_torch(loss_fn)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is an unmodified instance of its torch class."""
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and type(module).__call__ is kind.__call__
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _is_of_torch(loss_fn: Any) -> bool:
    function = getattr(loss_fn, "func", loss_fn)
    return isinstance(function, tuple(_MODULES)) or (
        _is_hashable(function) and function in _FUNCTIONS
    )


def _is_hashable(value: Any) -> bool:
    return type(value).__hash__ is not None
