"""Side-effect-free execution of a model: modes, attributes, RNG, grad mode, autocast."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from threading import RLock
from typing import Any
from weakref import finalize

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hesscurv.distributed.sharded import is_sharding_hook
from hesscurv.linalg.precision import full_precision, reduced_precision
from hesscurv.linalg.process_settings import LOCK, SharedSetting
from hesscurv.objective.running.unfused_cells import UnfusedCells, has_cells


@contextmanager
def differentiable(device: torch.device, precision: str = "highest") -> Iterator[None]:
    """Allow derivatives of any order, in full precision: inference mode, autocast and TF32 off.

    In "tf32" or "bf16" if requested.

    Fused attention and cuDNN's recurrent kernels have no second derivative, so plain attention is
    used and cuDNN disabled. torch's warnings of operations vectorised by a loop are silenced: see
    `without_fallback_warnings`.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if precision == "highest":
            stack.enter_context(full_precision(device))
        else:
            stack.enter_context(reduced_precision(device, precision))
        stack.enter_context(_PLAIN_AND_QUIET.held())
        yield


@contextmanager
def preserved(
    model: nn.Module, device: torch.device, training: bool | None, compiling: bool = False
) -> Iterator[None]:
    """Run the model in one mode and restore everything that running its code may change.

    Restored, also after an exception: the attributes of each module, including its `training` flag
    and the plain tensors that pruning, weight normalisation and recurrent layers set in every
    forward; and the random number generators of the CPU and the device. Parameters and buffers are
    not touched: the caller runs the model on substitutes. Disabled are backward hooks; FSDP's
    hooks, which would gather the substituted parameters; torch.compile, since compiled code cannot
    be differentiated twice; and accelerate's autocast.

    One thread at a time runs a model, since modes and substituted weights belong to the module.
    Process-wide settings are changed by the first thread and restored by the last one.

    Args:
        model: The module.
        device: The device whose generator is saved, in addition to the CPU's.
        training: The mode to run in; None leaves each module's own.
        compiling: Whether the caller compiles, so that torch.compile stays enabled.
    """
    modules = list(model.modules())
    with ExitStack() as stack:
        stack.enter_context(exclusive(model))
        flags = [m.training for m in modules]
        attributes = [dict(vars(m)) for m in modules]
        stack.enter_context(unchanged_random_state(device))
        if not compiling:
            stack.enter_context(compilation_suspended())
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in modules):
            stack.enter_context(_WITHOUT_CUDNN.held())
        if device.type == "cuda" and any(map(has_cells, modules)):
            stack.enter_context(UnfusedCells())
        if any(map(has_weight_norm, modules)):
            stack.enter_context(_PlainWeightNorm())
        try:
            for m in modules:
                if training is not None:
                    m.training = training
                # The user's gradient hooks must neither observe nor change these gradients.
                m._backward_hooks, m._backward_pre_hooks = OrderedDict(), OrderedDict()
                if has_own_autocast(m):
                    vars(m)["forward"] = vars(m)["_original_forward"]
                for name in ("_forward_pre_hooks", "_forward_hooks"):
                    hooks = vars(m)[name]
                    if any(map(is_sharding_hook, hooks.values())):
                        others = [(k, h) for k, h in hooks.items() if not is_sharding_hook(h)]
                        vars(m)[name] = OrderedDict(others)
            yield
        finally:
            for m, flag, before in zip(modules, flags, attributes, strict=True):
                m.training = flag
                for key in vars(m).keys() - before.keys():
                    del vars(m)[key]
                vars(m).update(before)


def has_weight_norm(module: nn.Module) -> bool:
    """Whether a module uses torch's weight normalisation, legacy or parametrization."""
    parts = (module, *module._forward_pre_hooks.values())
    return any(type(part).__name__ in ("WeightNorm", "_WeightNorm") for part in parts)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled, by torch.compile or its own `compile()`."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in vars(module)


def has_own_autocast(module: nn.Module) -> bool:
    """Whether accelerate has wrapped a module's forward in autocast, for mixed precision."""
    return "_original_forward" in vars(module) and "forward" in vars(module)


class _PlainWeightNorm(TorchFunctionMode):
    """Compute weight normalisation by its formula: torch 2.13 has a wrong double backward."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextmanager
def _without_cudnn() -> Iterator[None]:
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextmanager
def _quiet() -> Iterator[None]:
    # This switch of torch has no getter; it is on by default.
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


@contextmanager
def _plain_and_quiet() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), without_fallback_warnings():
        yield


_QUIET = SharedSetting(_quiet)
_PLAIN_AND_QUIET = SharedSetting(_plain_and_quiet)
_EAGER = SharedSetting(lambda: torch.compiler.set_stance("force_eager"))
_WITHOUT_CUDNN = SharedSetting(_without_cudnn)
_MODEL_LOCKS: dict[int, Any] = {}  # by id: a module that defines __eq__ has no hash


def exclusive(model: nn.Module) -> Any:
    """Return the reentrant lock held while a thread runs a model on substitutes."""
    with LOCK:
        key = id(model)
        if key not in _MODEL_LOCKS:
            _MODEL_LOCKS[key] = RLock()
            finalize(model, _MODEL_LOCKS.pop, key, None)
        return _MODEL_LOCKS[key]


@contextmanager
def compilation_suspended() -> Iterator[None]:
    """Run compiled modules uncompiled, since compiled code cannot be differentiated twice."""
    with _EAGER.held() if "torch._dynamo" in sys.modules else nullcontext():
        yield


@contextmanager
def without_fallback_warnings() -> Iterator[None]:
    """Silence torch's warning that vmap runs an operation without a batching rule in a loop.

    The caller did not request vmap and cannot change it. Other warnings pass, and warning filters
    are not modified, which would reset the record of warnings already shown.
    """
    with _QUIET.held():
        yield


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restore the generators of the CPU and a device when the last thread leaves."""
    with _random_state_of(device).held():
        yield


@cache
def _random_state_of(device: torch.device) -> SharedSetting:
    devices = [device] if device.type == "cuda" else []
    return SharedSetting(lambda: torch.random.fork_rng(devices))
