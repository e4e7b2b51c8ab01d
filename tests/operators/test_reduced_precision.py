"""Products in fewer digits, for who asks for them: residuals say what that costs."""

import functools
import warnings

import cases
import oracles
import pytest
import torch
from tensor_cores import TensorCores

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}


def problem():
    return cases.build("conv_bn", batches=1).cast(torch.float32)


@functools.cache
def exact(kind):
    return oracles.MATRICES[kind](problem().cast(torch.float64))


def gap(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


# Of TF32's 11 and bfloat16's 8 bits, after some ten roundings.
SIZES = {"tf32": (1e-5, 2e-2), "bf16": (1e-4, 2e-1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", SIZES)
def test_products_have_fewer_digits_and_the_process_its_settings(precision, kind):
    least, most = SIZES[precision]
    A = exact(kind)
    V = torch.randn(len(A), 8)
    for way in ("auto", *KINDS[kind].ways):
        if way == "linearized_batched" and torch.__version__ < "2.7":
            continue  # its vmap cannot look at the bits that the pretended cores round
        with TensorCores():
            H = problem().operator(KINDS[kind], precision=precision, way=way)
            try:
                found = gap(H @ V, A @ V.double())
            except ValueError as error:  # autocast has no forward mode
                assert (precision, way in ("retained", "batched")) == ("bf16", False), error  # noqa: PT017
                continue
        assert least < found < most, way
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("precision", SIZES)
@pytest.mark.parametrize("tol", [1e-1, 1e-3])
def test_residuals_include_the_error_of_products(precision, tol):
    A = exact("hessian")
    with TensorCores(), warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        H = problem().operator(HessianOperator, precision=precision)
        pairs = hesscurv.eigsh(H, 6, tol=tol)
        products = H.num_matvecs
    V, values = pairs.eigenvectors.double(), pairs.eigenvalues.double()
    true = (A @ V - V * values).norm(dim=0)
    # The error is measured on four of the six.
    assert bool((true <= 1.5 * pairs.residuals).all())
    assert bool((pairs.residuals <= tol * values.abs())[pairs.converged].all())
    assert pairs.info["product_error"] > 0
    assert products == pairs.num_matvecs  # the measurement does not count


def test_pairs_that_the_error_takes_away_are_warned_of():
    with TensorCores(), pytest.warns(hesscurv.ConvergenceWarning, match="reduced precision"):
        hesscurv.eigsh(problem().operator(HessianOperator, precision="bf16"), 6, tol=3e-2)


def test_full_precision_measures_nothing():
    H = problem().operator(HessianOperator)
    pairs = hesscurv.eigsh(H, 3)
    assert "product_error" not in pairs.info
    assert H.product_errors(pairs.eigenvectors) is None


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision among \['highest', 'tf32', 'bf16'\]"):
        problem().operator(HessianOperator, precision="fp8")
