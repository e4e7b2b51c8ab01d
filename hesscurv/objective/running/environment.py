"""Run a model's code and leave no trace: modes, attributes, RNG, grad mode, autocast."""

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

    In "tf32" or "bf16" where that is asked for.

    Fused attention has no second derivative, so attention takes its plain form, and cuDNN's
    recurrent kernels, which have none either, are left aside. torch does not warn of operations
    that it vectorises by a loop: see `without_fallback_warnings`.
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
    """Run the model in one mode and put back all that running its code may change.

    Put back, also after an exception: each module's attributes, among them its `training` flag and
    the plain tensors that pruning, weight normalisation and recurrent layers set in every forward;
    and the state of the CPU's and the device's random number generators. Parameters and buffers are
    not touched: the caller runs the model on substitutes. The modules' backward hooks are off, so
    are FSDP's, which would gather the very parameters that are substituted; torch.compile is
    suspended, since compiled code cannot be differentiated twice, and accelerate's autocast.

    One thread at a time runs a model: modes and substituted weights are the module's own. Settings
    of the process are changed by the first thread that needs them and put back by the last one.

    Args:
        model: The module.
        device: The device whose generator is saved beside the CPU's.
        training: The mode to run in; None leaves the modules' own.
        compiling: Whether the caller itself compiles, so that torch.compile is let through.
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
                # Hooks on gradients see and change what is not theirs to see here.
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
    """Whether a module is torch's weight normalisation, of the older or the newer kind."""
    parts = (module, *module._forward_pre_hooks.values())
    return any(type(part).__name__ in ("WeightNorm", "_WeightNorm") for part in parts)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs compiled: wrapped by torch.compile, or by its own `compile()`."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in vars(module)


def has_own_autocast(module: nn.Module) -> bool:
    """Whether accelerate has wrapped a module's forward in autocast, for mixed precision."""
    return "_original_forward" in vars(module) and "forward" in vars(module)


class _PlainWeightNorm(TorchFunctionMode):
    """Compute weight normalisation by its formula: torch 2.13's own has a wrong double backward."""

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
    # There is no reading this switch of torch's, which is on by default.
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
_MODEL_LOCKS: dict[int, Any] = {}  # by id: a module may define equality, and then has no hash


def exclusive(model: nn.Module) -> Any:
    """Return the lock that a thread holds while it runs a model on substitutes; reentrant."""
    with LOCK:
        key = id(model)
        if key not in _MODEL_LOCKS:
            _MODEL_LOCKS[key] = RLock()
            finalize(model, _MODEL_LOCKS.pop, key, None)
        return _MODEL_LOCKS[key]


@contextmanager
def compilation_suspended() -> Iterator[None]:
    """Run what torch.compile has wrapped as it was: compiled code is not differentiated twice."""
    with _EAGER.held() if "torch._dynamo" in sys.modules else nullcontext():
        yield


@contextmanager
def without_fallback_warnings() -> Iterator[None]:
    """Silence torch's warning that it vectorises an operation by a loop, for want of a rule.

    The caller did not ask for vmap, and can do nothing about it. Other warnings come through, and
    filters stay as they are: changing these would show again what was shown once.
    """
    with _QUIET.held():
        yield


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Put back the generators of the CPU and a device, when the last thread inside leaves."""
    with _random_state_of(device).held():
        yield


@cache
def _random_state_of(device: torch.device) -> SharedSetting:
    devices = [device] if device.type == "cuda" else []
    return SharedSetting(lambda: torch.random.fork_rng(devices))
