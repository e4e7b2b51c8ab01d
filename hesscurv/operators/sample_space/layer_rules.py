"""What a layer's parameters get as gradients, from its input and the slopes in its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from hesscurv.objective.layer_kinds import is_conv1d


@dataclass(frozen=True)
class Factors:
    """Factors of a parameter's rows on one batch.

    Args:
        inputs: a, shape (n, T, i); None where the rows are the slopes themselves.
        slopes: g, shape (c, n, T, o) with `inputs`, else the rows (c, n, numel).
        is_transposed: Whether the parameter is stored (i, o).
    """

    inputs: Tensor | None
    slopes: Tensor
    is_transposed: bool = False


# From the input, as it was seen, and slopes (c, *output.shape): factors by the parameter's name.
Rule = Callable[[Any, Tensor, Tensor], dict[str, Factors]]


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule of a layer's type, or None where there is none.

    Subclasses with a forward of their own have none: they may do anything.
    """
    for kind, rule in _RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return rule
    if is_conv1d(module) and type(module).__name__ == "Conv1D":
        return _conv1d
    return None


def _linear(module: Any, x: Tensor, slopes: Tensor) -> dict[str, Factors]:
    return _affine_map(x, slopes, is_transposed=False)


def _conv1d(module: Any, x: Tensor, slopes: Tensor) -> dict[str, Factors]:
    return _affine_map(x, slopes, is_transposed=True)


def _affine_map(x: Tensor, slopes: Tensor, *, is_transposed: bool) -> dict[str, Factors]:
    n = len(x)
    a = x.reshape(n, -1, x.shape[-1])
    g = slopes.reshape(len(slopes), n, -1, slopes.shape[-1])
    return {"weight": Factors(a, g, is_transposed), "bias": Factors(None, g.sum(2))}


def _conv2d(module: Any, x: Tensor, slopes: Tensor) -> dict[str, Factors]:
    if module.groups > 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return {}
    unfolded = F.unfold(
        x, module.kernel_size, module.dilation, module.padding, module.stride
    )  # (n, i, T)
    g = slopes.flatten(3).transpose(2, 3)  # (c, n, T, o)
    return {"weight": Factors(unfolded.mT, g), "bias": Factors(None, g.sum(2))}


def _layer_norm(module: Any, x: Tensor, slopes: Tensor) -> dict[str, Factors]:
    normalized = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    count = len(module.normalized_shape)
    return _scale_and_shift(
        (slopes * normalized).flatten(-count), slopes.flatten(-count), channels_last=True
    )


def _batch_norm(module: Any, x: Tensor, slopes: Tensor) -> dict[str, Factors]:
    if module.training or module.running_mean is None:
        return {}  # samples depend on each other
    normalized = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    return _scale_and_shift(slopes * normalized, slopes, channels_last=False)


def _group_norm(module: Any, x: Tensor, slopes: Tensor) -> dict[str, Factors]:
    normalized = F.group_norm(x, module.num_groups, eps=module.eps)
    return _scale_and_shift(slopes * normalized, slopes, channels_last=False)


def _scale_and_shift(scaled: Tensor, slopes: Tensor, *, channels_last: bool) -> dict[str, Factors]:
    def sums(t: Tensor) -> Tensor:
        c, n = t.shape[:2]
        if channels_last:
            return t.reshape(c, n, -1, t.shape[-1]).sum(2)
        return t.reshape(c, n, t.shape[2], -1).sum(3)

    return {"weight": Factors(None, sums(scaled)), "bias": Factors(None, sums(slopes))}


def _embedding(module: Any, ids: Tensor, slopes: Tensor) -> dict[str, Factors]:
    if module.max_norm is not None or module.scale_grad_by_freq:
        return {}
    n = len(ids)
    words = F.one_hot(ids.reshape(n, -1), module.num_embeddings).to(slopes)
    if module.padding_idx is not None:
        words[..., module.padding_idx] = 0
    g = slopes.reshape(len(slopes), n, -1, slopes.shape[-1])
    return {"weight": Factors(words, g, is_transposed=True)}


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    _BatchNorm: _batch_norm,
    nn.Embedding: _embedding,
}
