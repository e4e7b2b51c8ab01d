import contextlib

import pytest
import torch

from hesscurv.linalg.orthogonalization import orthonormalize_
from hesscurv.linalg.precision import full_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before():
    yield
    # The newer switches are written back through the older one, which resets both.
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_setting_is_highest_inside_and_as_before_outside(setting):
    torch.set_float32_matmul_precision(setting)
    with full_precision(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == setting
    with contextlib.suppress(KeyError), full_precision(CPU):
        raise KeyError
    assert torch.get_float32_matmul_precision() == setting


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="switches of torch 2.9"
)
def test_the_newer_switches_are_respected_too():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with full_precision(CPU):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_autocast_is_off_inside():
    a = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(CPU):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_orthonormality_does_not_suffer_from_low_precision_products(setting):
    torch.set_float32_matmul_precision(setting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Q, _ = orthonormalize_(torch.randn(64, 5000))
    torch.set_float32_matmul_precision("highest")
    assert (Q.double() @ Q.double().mT - torch.eye(64)).abs().max() <= 1e-6
