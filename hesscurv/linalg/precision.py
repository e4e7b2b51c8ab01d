"""Full precision of products, whatever the process has switched on, and float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

from hesscurv.linalg.process_settings import SharedSetting

# torch's switches by backend and operation (from 2.9 on), those that others inherit from first.
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
_INHERITED_FROM = 3  # the first so many


@cache
def require_float64(device: torch.device) -> None:
    """Require a device on which float64 works, which sums and small matrices are kept in.

    Raises:
        ValueError: If it does not, as on MPS and on some XPUs.
    """
    if device.type == "meta":  # it may be given values yet
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

    TF32 and bfloat16 serve training, but their relative error of 1e-3 and more breaks
    orthonormality, Rayleigh quotients and residuals. cuDNN's convolutions take TF32 by default,
    whatever `torch.set_float32_matmul_precision` says. All of it is off inside, and autocast, and
    as before afterwards. The settings are the process's own, so products in other threads run in
    full precision meanwhile.

    Args:
        device: The device that computes.
    """
    with torch.autocast(device.type, enabled=False), _IEEE_PRODUCTS.held():
        yield


@contextmanager
def reduced_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Compute a model's products in fewer digits inside this context, for speed.

    Args:
        device: The device that computes.
        precision: "tf32": matrix products and convolutions on tensor cores, 11 bits; "bf16":
            autocast to bfloat16, 8 bits.
    """
    if precision == "bf16":
        # Without the cache, which keeps casts of weights that others stand in for.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
        return
    with torch.autocast(device.type, enabled=False), _TF32_PRODUCTS.held():
        yield


# The unit of rounding of what products may be computed in, beside the dtype's own.
ROUNDING = {"highest": 0.0, "tf32": 2.0**-11, "bf16": 2.0**-8}


@contextmanager
def _tf32_products() -> Iterator[None]:
    with _ieee_products():  # all switches, so that none is left as it was found
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
            # The older switch of matrix products, put back, would switch the CPU's on as well.
            stack.callback(_write, "mkldnn", "matmul", _read("mkldnn", "matmul"))
        mixed = False
        for read, write, ieee in _OLDER:
            try:
                before = read()
            except RuntimeError:  # set by the newer switches, after which the older are refused
                mixed = True
                continue
            if before != ieee:
                stack.callback(write, before)
                write(ieee)
        # With the older switches where these work: code that reads them inside is refused nothing.
        own = _SWITCHES[_INHERITED_FROM:] if mixed else _SWITCHES[-2:]
        for backend, operation in own if newer else ():
            _write_ieee(stack, backend, operation)
        yield


def _write_ieee(stack: ExitStack, backend: str, operation: str) -> None:
    """Switch one operation of a backend to full precision, until the stack closes.

    What it inherits is full precision by now, so that another value is its own.
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


# Reading, writing, and the value of full precision.
_OLDER: tuple[tuple[Callable[[], Any], Callable[[Any], None], Any], ...] = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (lambda: torch.backends.cudnn.allow_tf32, _set_cudnn, False),
)

_IEEE_PRODUCTS = SharedSetting(_ieee_products)
_TF32_PRODUCTS = SharedSetting(_tf32_products)
