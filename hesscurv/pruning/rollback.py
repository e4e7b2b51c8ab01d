"""Rollback of changes to modules after an error."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import PruningContainer

# Containers that pruning modifies in place. Recurrent modules keep weights in `_flat_weights`.
_CONTENTS = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_flat_weights",
)


@contextmanager
def unchanged_on_error(modules: Iterable[nn.Module], *, values: bool = False) -> Iterator[None]:
    """Restore modules if the body raises: parameters, buffers and their order, hooks, attributes.

    ``torch.nn.utils.prune`` itself does not: an error in a second pruning of a tensor drops the
    hook of the first, and one in a first pruning moves the parameter to the end of the module.

    Args:
        modules: The modules, without their submodules.
        values: Whether to also restore tensors that are written in place.

    Raises:
        BaseException: Any error of the body, after the modules are restored.

    Cost:
        A few references for each tensor; with `values` a copy of all parameters and buffers.
    """
    saved = [_Snapshot(module, values) for module in dict.fromkeys(modules)]
    try:
        yield
    except BaseException:
        for snapshot in saved:
            snapshot.restore()
        raise


class _Snapshot:
    """A module's own state, by reference."""

    def __init__(self, module: nn.Module, values: bool) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        self.contents: dict[str, Any] = {
            key: copy.copy(module.__dict__[key]) for key in _CONTENTS if key in module.__dict__
        }
        self.methods = {
            hook: hook._pruning_methods
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, PruningContainer)
        }
        # prune.remove assigns new memory to the parameter.
        self.memory = [(p, p.data) for p in module._parameters.values() if p is not None]
        tensors = [*module._parameters.values(), *module._buffers.values()] if values else []
        self.values: list[tuple[Tensor, Tensor]] = [
            (tensor, tensor.detach().clone()) for tensor in tensors if tensor is not None
        ]

    def restore(self) -> None:
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for key, content in self.contents.items():
            # In place: handles of hooks refer to this very dictionary.
            target = self.module.__dict__[key]
            target.clear()
            target.extend(content) if isinstance(target, list) else target.update(content)
        for container, methods in self.methods.items():
            container._pruning_methods = methods
        for parameter, memory in self.memory:
            parameter.data = memory
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)
