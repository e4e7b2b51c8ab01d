"""Full float32 precision for matrix products, whatever the process has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hesscurv.linalg.process_settings import SharedSetting


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 matrix products in float32 inside this context.

    TF32 or bfloat16 products (`torch.set_float32_matmul_precision`) and autocast serve training,
    but their relative error of 1e-3 and more breaks orthonormality and Rayleigh quotients. They are
    off inside and as before afterwards. The settings are the process's own, so products in
    other threads run in full precision meanwhile.

    Args:
        device: The device that computes.
    """
    with torch.autocast(device.type, enabled=False), _IEEE_PRODUCTS.held():
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Set by the newer per-backend switches (torch 2.9), after which the older one is refused.
        backends = (
            torch.backends.cuda.matmul,
            torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        )
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
        return
    if setting == "highest":  # the default: nothing is written
        yield
        return
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(setting)


_IEEE_PRODUCTS = SharedSetting(_ieee_products)
