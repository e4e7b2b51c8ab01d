"""What an optimizer remembers of weights that are pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hesscurv.pruning.weights import current_mask, current_parameter, pruned_weights


def mask_optimizer_state_(optimizer: Optimizer, model: nn.Module) -> int:
    r"""Set an optimizer's running averages to zero where weights are pruned, in place.

    ``s_i <- m_i s_i`` for every tensor s of a parameter's state that has the parameter's shape,
    such as momentum, and its mask m. Gradients of pruned entries are zero, but what was averaged
    before is not: it goes on moving ``weight_orig`` under the mask, where it is seen as soon as a
    mask is changed, or a norm of the parameters is taken. `PreconditionedOptimizer` and other
    wrappers that have a `base` are looked through.

    Args:
        optimizer: Any optimizer of the model's parameters. Parameters that it does not have are
            passed over.
        model: The module, pruned by ``torch.nn.utils.prune``; wrappers are looked through.

    Returns:
        The number of tensors that were masked.

    Raises:
        TypeError: If `optimizer` is no optimizer.

    Cost:
        A pass over the states of the pruned weights, and a mask of one of them at a time.

    Not supported: states that are not kept as tensors of the parameter's shape, such as
    quantised ones, or the flat history of L-BFGS: these are left as they are.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    while isinstance(base := getattr(optimizer, "base", None), Optimizer):
        optimizer = base
    count = 0
    with torch.no_grad():
        for module, name in pruned_weights(model).values():
            parameter, mask = current_parameter(module, name), current_mask(module, name)
            assert mask is not None
            if parameter not in optimizer.state:  # a look would make an entry
                continue
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                    # Not a product: 0 times inf is NaN.
                    value.masked_fill_(~mask.to(value.device), 0)
                    count += 1
    return count
