"""2:4 sparsity for sparse tensor cores: check of masks, and conversion of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hesscurv.objective.parameters import unwrap
from hesscurv.pruning.rollback import unchanged_on_error
from hesscurv.pruning.weight_axes import AS_LINEAR, REVERSED, find_axes
from hesscurv.pruning.weights import current_mask, current_parameter, pruned_weights, restore_hook_

_DTYPES = (torch.float16, torch.bfloat16)


def is_semi_structured(mask: Tensor, n: int = 2, m: int = 4, dim: int = 1) -> bool:
    """Whether at most n of every m consecutive entries along a dimension are nonzero.

    Args:
        mask: A mask or a weight of at least two dimensions, any dtype and device.
        n: Number of entries kept per group.
        m: Group size.
        dim: The dimension of the groups: 1 by default, the input dimension of linear and
            convolution layers; 0 for transposed convolutions and transformers' Conv1D.

    Returns:
        False also if m does not divide the size along `dim`.

    Raises:
        ValueError: If the tensor has no dimension `dim`, or not 1 <= n <= m.

    Cost:
        One pass over the tensor.

    Example:
        >>> hesscurv.pruning.is_semi_structured(torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]))
        True
    """
    if not 1 <= n <= m:
        raise ValueError(f"expected 1 <= n <= m, got n={n} and m={m}")
    if not -mask.ndim <= dim < mask.ndim:
        raise ValueError(f"expected a dimension of shape {tuple(mask.shape)}, got dim={dim}")
    if mask.shape[dim] % m:
        return False
    kept = (mask != 0).movedim(dim, -1).unflatten(-1, (-1, m)).sum(-1)
    return bool((kept <= n).all())


def to_semi_structured_(model: nn.Module) -> list[str]:
    """Convert 2:4 masked linear layers to the format of sparse tensor cores, permanently.

    The masked weight of each `nn.Linear` whose mask is 2:4 along its inputs becomes
    ``torch.sparse.to_sparse_semi_structured(weight)``, a frozen parameter: products with it take
    about half the memory and, for large layers, less time. For inference only. Other pruned weights
    are left unchanged, among them convolutions, for which torch has no such product, transformers'
    Conv1D, and output projections of `nn.MultiheadAttention`.

    Args:
        model: The module, on a CUDA device, in float16 or bfloat16; torch.compile and DDP wrappers
            are unwrapped.

    Returns:
        The dotted names of the converted weights.

    Raises:
        RuntimeError: If a weight is not on a CUDA device, or its device is not an NVIDIA GPU of
            compute capability 8.0 (Ampere) or later.
        TypeError: If a weight has another dtype.
        ValueError: If no linear layer has a 2:4 mask, or the format does not support a weight's
            shape. The model is left unchanged.

    Cost:
        A temporary copy of all weights to convert.

    Example:
        >>> hesscurv.pruning.to_semi_structured_(model.cuda())  # doctest: +SKIP
    """
    # An attention uses the weight directly, in operations that this format may not support.
    read_by_attention = {
        module.out_proj
        for module in unwrap(model).modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    chosen = {
        name: weight
        for name, weight in pruned_weights(model).items()
        if isinstance(weight.module, nn.Linear)
        and weight.name == "weight"
        and weight.module not in read_by_attention
        and find_axes(*weight) == AS_LINEAR
        and is_semi_structured(_mask_of(*weight))
    }
    if not chosen:
        reversed_ = [n for n, w in pruned_weights(model).items() if find_axes(*w) == REVERSED]
        raise ValueError(
            "expected linear layers with 2:4 masks, found none; prune them with "
            "curvature_nm(module, 'weight', 2, 4, scores)"
            + (
                f"; {reversed_[:8]} ({len(reversed_)} in all) lie the other way, as in "
                "transformers' Conv1D: put an nn.Linear with the transposed weight in their place"
                if reversed_
                else ""
            )
        )
    for name, weight in chosen.items():
        _check_support(name, current_parameter(*weight))
    converted = {}
    for name, (module, tensor) in chosen.items():
        dense = current_parameter(module, tensor).detach() * _mask_of(module, tensor)
        try:
            sparse = torch.sparse.to_sparse_semi_structured(dense.contiguous())
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the weight {name!r} of shape {tuple(dense.shape)} cannot be converted: {error}"
            ) from error
        converted[name] = nn.Parameter(sparse, requires_grad=False)
    with unchanged_on_error(weight.module for weight in chosen.values()):
        for name, (module, tensor) in chosen.items():
            restore_hook_(module, tensor)
            prune.remove(module, tensor)
            module.register_parameter(tensor, converted[name])
    return list(chosen)


def _mask_of(module: nn.Module, name: str) -> Tensor:
    mask = current_mask(module, name)
    assert mask is not None
    return mask


def _check_support(name: str, parameter: Tensor) -> None:
    if parameter.device.type != "cuda":
        raise RuntimeError(
            f"expected weights on a CUDA device, got {name!r} on {parameter.device}; sparse tensor "
            "cores are NVIDIA GPUs': move the model there first"
        )
    if torch.version.hip is not None or torch.cuda.get_device_capability(parameter.device) < (8, 0):
        raise RuntimeError(
            "expected an NVIDIA GPU of compute capability 8.0 (Ampere) or later, got "
            f"{torch.cuda.get_device_name(parameter.device)}; keep the masked dense weights there"
        )
    if parameter.dtype not in _DTYPES:
        raise TypeError(
            f"expected weights in float16 or bfloat16, got {name!r} in {parameter.dtype}; call "
            "model.half() or model.bfloat16() first"
        )
