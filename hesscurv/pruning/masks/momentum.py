"""Masking of optimizer state for pruned weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hesscurv.pruning.weights import current_mask, current_parameter, pruned_weights


def mask_optimizer_state_(optimizer: Optimizer, model: nn.Module) -> int:
    r"""Set an optimizer's running averages to zero where weights are pruned, in place.

    ``s_i <- m_i s_i`` for every tensor s of a parameter's state that has the parameter's shape,
    such as momentum, and its mask m. Gradients of pruned entries are zero, but earlier averages are
    not: they keep moving ``weight_orig`` under the mask, which shows as soon as a mask changes or a
    norm of the parameters is computed. `PreconditionedOptimizer` and other wrappers (Lookahead,
    SAM, accelerate's) are unwrapped, and their own state is masked too.

    Args:
        optimizer: Any optimizer of the model's parameters. Parameters that it does not have are
            skipped.
        model: The module, pruned by ``torch.nn.utils.prune``; wrappers are unwrapped.

    Returns:
        The number of masked tensors.

    Raises:
        TypeError: If `optimizer` is not an optimizer.

    Cost:
        A pass over the states of the pruned weights, and a mask of one of them at a time.

    Not supported: states that are not tensors of the parameter's shape, such as quantised ones or
    the flat history of L-BFGS, which are left unchanged.

    Example:
        >>> net = copy.deepcopy(model)
        >>> hesscurv.pruning.apply_masks_(net, {"0.weight": torch.arange(12).reshape(3, 4) > 2})
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> task(net, batches[0]).backward()
        >>> sgd.step()
        >>> hesscurv.pruning.mask_optimizer_state_(sgd, net)
        1
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    states, masked = _states(optimizer), set()
    with torch.no_grad():
        for module, name in pruned_weights(model).values():
            parameter, mask = current_parameter(module, name), current_mask(module, name)
            assert mask is not None
            for state in states:
                if parameter not in state:  # optimizer.state is a defaultdict
                    continue
                for value in state[parameter].values():
                    if (
                        isinstance(value, Tensor)
                        and value.shape == parameter.shape
                        and value.ndim
                        and id(value) not in masked
                    ):
                        # Not a product with the mask: 0 times inf is NaN.
                        value.masked_fill_(~mask.to(value.device), 0)
                        masked.add(id(value))
    return len(masked)


def _states(optimizer: Any) -> list[Any]:
    """Return the states of an optimizer and of the optimizers it wraps; tensors may be shared."""
    seen: list[Any] = []
    while optimizer is not None and not any(optimizer is other for other in seen):
        seen.append(optimizer)
        held = (vars(optimizer).get(name) for name in ("base", "optimizer", "base_optimizer"))
        optimizer = next((x for x in held if hasattr(x, "param_groups")), None)
    return [state for x in seen if (state := getattr(x, "state", None)) is not None]
