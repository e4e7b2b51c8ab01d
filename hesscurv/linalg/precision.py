"""Control of TF32, bfloat16 and autocast for matrix products; requirement of float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

from hesscurv.linalg.process_settings import SharedSetting

# torch's switches by backend and operation (since 2.9); the first ones are inherited by the others.
_SWITCHES = (
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
)
_INHERITED_FROM = 3  # number of leading entries that others inherit from


@cache
def require_float64(device: torch.device) -> None:
    """Require a device that supports float64, the dtype of sums and small matrices.

    Raises:
        ValueError: If it does not, as MPS and some XPUs.
    """
    if device.type == "meta":  # may be materialised elsewhere later
        return
    try:
        one = torch.ones(1, dtype=torch.float64, device=device)
        works = float(one + one) == 2
    except (TypeError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        works = False
    if not works:
        raise ValueError(
            f"expected a device that computes in float64, which sums, small matrices and residuals "
            f"need, got {device}; move the model and the data to the CPU (model.cpu()) or to a "
            "CUDA device for curvature"
        )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32 inside this context: matrices, convolutions, RNNs.

    TF32 and bfloat16 suffice for training, but their relative error of 1e-3 and more breaks
    orthonormality, Rayleigh quotients and residuals. cuDNN's convolutions use TF32 by default,
    whatever `torch.set_float32_matmul_precision` says. All of it, and autocast, is disabled inside
    and restored afterwards. The settings are per process: other threads run in full precision
    meanwhile.

    Args:
        device: The computing device.
    """
    with torch.autocast(device.type, enabled=False), _IEEE_PRODUCTS.held():
        yield


@contextmanager
def reduced_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Compute a model's products in reduced precision inside this context, for speed.

    Args:
        device: The computing device.
        precision: "tf32": matrix products and convolutions on tensor cores, 11 bits; "bf16":
            autocast to bfloat16, 8 bits.
    """
    if precision == "bf16":
        # Without the cache: it would reuse casts of weights that have since been substituted.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
        return
    with torch.autocast(device.type, enabled=False), _TF32_PRODUCTS.held():
        yield


# Unit roundoff of each precision, in addition to that of the dtype.
ROUNDING = {"highest": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8}


@contextmanager
def _tf32_products() -> Iterator[None]:
    with _ieee_products():  # saves and restores every switch, whatever is set below
        try:
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")


@contextmanager
def _ieee_products() -> Iterator[None]:
    with ExitStack() as stack:
        newer = hasattr(torch._C, "_get_fp32_precision_getter")
        if newer:
            for backend, operation in _SWITCHES[:_INHERITED_FROM]:
                _write_ieee(stack, backend, operation)
            # Restoring the legacy matmul switch would also set that of the CPU backend.
            stack.callback(_write, "mkldnn", "matmul", _read("mkldnn", "matmul"))
        mixed = False
        for read, write, ieee in _OLDER:
            try:
                before = read()
            except RuntimeError:  # torch refuses the legacy switches once the new ones are set
                mixed = True
                continue
            if before != ieee:
                stack.callback(write, before)
                write(ieee)
        # Prefer the legacy switches where they work: code that reads them inside must not raise.
        own = _SWITCHES[_INHERITED_FROM:] if mixed else _SWITCHES[-2:]
        for backend, operation in own if newer else ():
            _write_ieee(stack, backend, operation)
        yield


def _write_ieee(stack: ExitStack, backend: str, operation: str) -> None:
    """Switch one operation of a backend to full precision until the stack closes.

    The inherited value is full precision already, so any other value was set explicitly.
    """
    before = _read(backend, operation)
    if before not in ("none", "ieee"):
        stack.callback(_write, backend, operation, before)
        _write(backend, operation, "ieee")


def _read(backend: str, operation: str) -> str:
    return str(torch._C._get_fp32_precision_getter(backend, operation))


def _write(backend: str, operation: str, precision: str) -> None:
    if _read(backend, operation) != precision:
        torch._C._set_fp32_precision_setter(backend, operation, precision)


def _set_cudnn(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed


# Getter, setter, and the value that means full precision.
_OLDER: tuple[tuple[Callable[[], Any], Callable[[Any], None], Any], ...] = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (lambda: torch.backends.cudnn.allow_tf32, _set_cudnn, False),
)

_IEEE_PRODUCTS = SharedSetting(_ieee_products)
_TF32_PRODUCTS = SharedSetting(_tf32_products)
