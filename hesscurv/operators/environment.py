"""Run a model's code and leave no trace: modes, buffers, attributes, RNG, grad mode, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesscurv.linalg.precision import full_precision


@contextmanager
def differentiable(device: torch.device) -> Iterator[None]:
    """Allow derivatives of any order, in full precision: inference mode, autocast and TF32 off.

    Fused attention has no second derivative, so attention takes its plain form, and cuDNN's
    recurrent kernels, which have none either, are left aside.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(full_precision(device))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def preserved(model: nn.Module, device: torch.device, training: bool | None) -> Iterator[None]:
    """Run the model in one mode and put back all that running its code may change.

    Put back, also after an exception: each module's `training` flag, plain tensor attributes (as
    pruning and weight normalisation set them in every forward), and the state of the CPU's and the
    device's random number generators. Parameters and buffers are not touched: the caller runs the
    model on substitutes. torch.compile is suspended, since compiled code cannot be differentiated
    twice.

    Args:
        model: The module.
        device: The device whose generator is saved beside the CPU's.
        training: The mode to run in; None leaves the modules' own.
    """
    modules = list(model.modules())
    flags = [m.training for m in modules]
    attributes = [{k: v for k, v in vars(m).items() if isinstance(v, Tensor)} for m in modules]
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in modules):
            stack.enter_context(_without_cudnn())
        try:
            if training is not None:
                for m in modules:
                    m.training = training
            yield
        finally:
            for m, flag, before in zip(modules, flags, attributes, strict=True):
                m.training = flag
                for key in [k for k, v in vars(m).items() if isinstance(v, Tensor)]:
                    if key not in before:
                        del vars(m)[key]
                vars(m).update(before)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled
