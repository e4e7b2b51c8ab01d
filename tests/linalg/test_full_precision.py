import contextlib

import pytest
import torch

from hesscurv.linalg import precision
from hesscurv.linalg.orthogonalization import orthonormalize_
from hesscurv.linalg.precision import full_precision

CPU = torch.device("cpu")


NEWER = hasattr(torch._C, "_get_fp32_precision_getter")  # switches of torch 2.9


def settings():
    """All that torch says of precision; the older switches refuse once the newer differ."""

    def read(switch):
        try:
            return switch()
        except RuntimeError:
            return "mixed"

    older = [torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32]
    return [read(switch) for switch in older], newer_settings()


def newer_settings():
    if not NEWER:
        return []
    return [torch._C._get_fp32_precision_getter(*switch) for switch in precision._SWITCHES]


@pytest.fixture(autouse=True)
def as_before():
    yield
    if NEWER:
        for switch in precision._SWITCHES:
            torch._C._set_fp32_precision_setter(*switch, "none")
    # The older ones write the newer ones, too.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_setting_is_highest_inside_and_as_before_outside(setting):
    torch.set_float32_matmul_precision(setting)
    with full_precision(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == setting
    with contextlib.suppress(KeyError), full_precision(CPU):
        raise KeyError
    assert torch.get_float32_matmul_precision() == setting


def set_of(module, **values):
    def write():
        for name, value in values.items():
            setattr(module, name, value)

    return write


WRITES = {
    "nothing": lambda: None,
    "matrix products high": lambda: torch.set_float32_matmul_precision("high"),
    "matrix products medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuBLAS": set_of(torch.backends.cuda.matmul, allow_tf32=True),
    "not cuDNN": set_of(torch.backends.cudnn, allow_tf32=False),
}
if NEWER:
    WRITES |= {
        "all": set_of(torch.backends, fp32_precision="tf32"),
        "all of CUDA": set_of(torch.backends.cudnn, fp32_precision="tf32"),
        "all of the CPU": set_of(torch.backends.mkldnn, fp32_precision="bf16"),
        "new cuBLAS": set_of(torch.backends.cuda.matmul, fp32_precision="tf32"),
        "new cuDNN": set_of(torch.backends.cudnn.conv, fp32_precision="ieee"),
        "products of the CPU": set_of(torch.backends.mkldnn.matmul, fp32_precision="bf16"),
        "convolutions of the CPU": set_of(torch.backends.mkldnn.conv, fp32_precision="bf16"),
    }


@pytest.mark.parametrize("first", WRITES)
def test_every_switch_is_off_inside_and_as_before_outside(first, as_before):
    for second in WRITES.values():
        WRITES[first]()
        try:
            second()
        except RuntimeError:  # torch refuses the older switches after the newer ones
            continue
        before = settings()
        with full_precision(CPU):
            older, newer = settings()
            assert set(newer) <= {"none", "ieee"}
            # Where both kinds were mixed, only the newer ones count.
            assert older == ["highest", False] or "mixed" in before[0]
        assert settings() == before


@pytest.mark.skipif(not NEWER, reason="switches of torch 2.9")
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
