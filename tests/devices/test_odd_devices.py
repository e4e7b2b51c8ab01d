"""Devices without float64, models over several devices, and sums in another order."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hesscurv
from hesscurv.linalg.precision import require_float64

TASK = hesscurv.supervised(nn.CrossEntropyLoss())


class WithoutFloat64(TorchDispatchMode):
    """Refuse float64 as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as it is not supported")
        return out


@pytest.fixture
def without_float64():
    require_float64.cache_clear()
    with WithoutFloat64():
        yield
    require_float64.cache_clear()


def data():
    return [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]


@pytest.mark.parametrize(
    "kind", [hesscurv.HessianOperator, hesscurv.GGNOperator, hesscurv.EmpiricalFisherOperator]
)
def test_a_device_without_float64_is_refused_with_the_remedy(kind, without_float64):
    with pytest.raises(ValueError, match=r"in float64.*got cpu.*model.cpu\(\)"):
        kind(nn.Linear(3, 2), TASK, data())


def test_another_librarys_operator_there_is_refused_too(without_float64):
    class Foreign:
        shape, dtype, device = (3, 3), torch.float32, torch.device("cpu")

        def __matmul__(self, other):
            return other

    with pytest.raises(ValueError, match="computes in float64"):
        hesscurv.eigsh(Foreign(), 1)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: hesscurv.optim.PreconditionedOptimizer(
            torch.optim.SGD(m.parameters(), 0.1), m, TASK, data()
        ),
        lambda m: hesscurv.hooks.CurvatureMonitor(m, TASK, data(), k=2),
        lambda m: hesscurv.pruning.prune_model(m, TASK, data()),
        lambda m: hesscurv.optim.NewtonCG(m.parameters()),
    ],
    ids=["optimizer", "monitor", "pruning", "NewtonCG"],
)
def test_nothing_starts_there_that_would_fail_later(use, without_float64):
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="computes in float64"):
        use(model)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_model_over_several_devices_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, device="meta"))
    model.hf_device_map = {"0": "cpu", "1": "disk"}
    with pytest.raises(ValueError, match=r"meta device \(loaded with device_map, over .*'disk'"):
        hesscurv.HessianOperator(model, TASK, data())
    # A part that is not selected, but takes part in the loss, has no values either.
    with pytest.raises(ValueError, match="load it whole"):
        hesscurv.HessianOperator(model, TASK, data(), params=["0.weight"])


def test_a_closure_that_sums_in_another_order_has_not_changed():
    model, calls = nn.Linear(3, 1), [0]
    x = torch.randn(64, 3)

    def closure(model):
        calls[0] += 1
        order = torch.randperm(64, generator=torch.Generator().manual_seed(calls[0]))
        return model(x[order]).square().mean()

    H = hesscurv.HessianOperator(model, closure, check=False)
    v = torch.ones(H.shape[0])
    expected = H @ v
    set_up = calls[0]
    for _ in range(3):
        assert torch.allclose(H @ v, expected, rtol=1e-5)
    assert calls[0] - set_up == 3  # an evaluation each, and no gradient anew


def test_a_closure_that_drifts_slowly_is_noticed():
    model, scale = nn.Linear(3, 1).double(), [1.0]
    x = torch.randn(64, 3, dtype=torch.float64)
    H = hesscurv.HessianOperator(model, lambda m: scale[0] * m(x).square().mean())
    v = torch.ones(H.shape[0], dtype=torch.float64)
    expected = H @ v
    for _ in range(20):
        scale[0] *= 1 + 1e-15  # of these steps, none is more than rounding
        product = H @ v
    torch.testing.assert_close(product, scale[0] * expected, rtol=8e-15, atol=0)
