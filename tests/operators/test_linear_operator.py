"""Operators of any origin: dense, of other libraries, seen from SciPy."""

import sys

import cases
import pytest
import torch

from hesscurv import HessianOperator, eigsh
from hesscurv.operators import DenseOperator, LinearOperator, as_linear_operator


def symmetric(size=6, dtype=torch.float64):
    matrix = torch.randn(size, size, dtype=torch.float64)
    return (matrix + matrix.mT).to(dtype)


class Foreign:
    """What other libraries' operators have in common."""

    def __init__(self, matrix, **attributes):
        self.matrix = matrix
        self.shape = matrix.shape
        vars(self).update(attributes)

    def __matmul__(self, other):
        return self.matrix @ other


# -- dense ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_matrix_multiplies_from_both_sides(dtype):
    A = symmetric(dtype=dtype)
    operator = as_linear_operator(A)
    v, V = torch.randn(6, dtype=dtype), torch.randn(6, 3, dtype=dtype)
    torch.testing.assert_close(operator @ v, A @ v)
    torch.testing.assert_close(operator @ V, A @ V)
    torch.testing.assert_close(v @ operator, A @ v)
    torch.testing.assert_close(V.mT @ operator, V.mT @ A)
    torch.testing.assert_close(operator.T @ v, operator.adjoint() @ v)
    torch.testing.assert_close(operator.matvec(v), operator.matmat(v[:, None])[:, 0])
    assert operator.num_matvecs == 1 + 3 + 1 + 3 + 2 + 2
    assert (operator.shape, operator.dtype, operator.device.type) == ((6, 6), dtype, "cpu")


def test_a_matrix_multiplies_in_full_precision_under_autocast():
    A = symmetric(64, torch.float32)
    v = torch.randn(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = DenseOperator(A) @ v
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, A @ v)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.ones(3, 4), ValueError, r"square matrix.*got \(3, 4\)"),
        (torch.ones(3), ValueError, "square matrix"),
        (torch.ones(0, 0), ValueError, "square matrix"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, "real floating matrix"),
        (torch.ones(3, 3, dtype=torch.complex64), TypeError, "real floating matrix"),
        (torch.full((2, 2), float("nan")), ValueError, "finite matrix"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), ValueError, r"symmetric.*\(A \+ A.mT\) / 2"),
    ],
)
def test_what_is_no_symmetric_matrix_is_refused(matrix, error, message):
    with pytest.raises(error, match=message):
        DenseOperator(matrix)


@pytest.mark.parametrize("block_size", [1, 4, 6, 64])
def test_the_dense_matrix_is_recovered_in_blocks(block_size):
    A = symmetric()
    operator = DenseOperator(A)
    torch.testing.assert_close(operator.to_dense(block_size), A, rtol=0, atol=0)
    assert operator.num_matvecs == 6


@pytest.mark.parametrize("operand", [[1.0] * 6, 3.0, None, "v"])
def test_an_operand_of_another_type_is_refused_from_both_sides(operand):
    operator = DenseOperator(symmetric())
    with pytest.raises(TypeError, match=r"expected a torch.Tensor"):
        operator @ operand
    with pytest.raises(TypeError, match=r"expected a torch.Tensor"):
        operand @ operator


def test_a_numpy_operand_is_refused_with_a_remedy():
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"got ndarray; convert it with torch.as_tensor"):
        DenseOperator(symmetric()) @ numpy.ones(6)


# -- other libraries' -------------------------------------------------------------------------


def test_an_operator_is_itself():
    operator = DenseOperator(symmetric())
    assert as_linear_operator(operator) is operator


def test_an_object_with_a_shape_and_products_is_an_operator():
    A = symmetric()
    operator = as_linear_operator(Foreign(A, dtype=torch.float64, device="cpu"))
    assert isinstance(operator, LinearOperator)
    torch.testing.assert_close(operator.to_dense(), A, rtol=0, atol=0)
    assert operator.num_matvecs == 6


def test_a_product_by_autograd_records_its_graph_and_returns_none():
    A, w = symmetric(), torch.ones(6, dtype=torch.float64, requires_grad=True)

    class ByBackward(Foreign):
        def __matmul__(self, other):
            (slope,) = torch.autograd.grad(w @ A @ w / 2, w, create_graph=True)
            columns = other.unbind(1) if other.ndim == 2 else [other]
            found = [torch.autograd.grad(slope, w, c, create_graph=True)[0] for c in columns]
            return torch.stack(found, 1) if other.ndim == 2 else found[0]

    operator = as_linear_operator(ByBackward(A, dtype=A.dtype))
    V = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        product = operator @ V
    torch.testing.assert_close(product, A @ V)
    assert not product.requires_grad
    largest = torch.linalg.eigvalsh(A).abs().max()
    torch.testing.assert_close(eigsh(operator, 1).eigenvalues.abs()[0], largest)


def test_without_dtype_and_device_it_is_float32_on_the_cpu():
    operator = as_linear_operator(Foreign(symmetric(dtype=torch.float32)))
    assert (operator.dtype, operator.device.type) == (torch.float32, "cpu")
    assert operator.to_dense().dtype == torch.float32


@pytest.mark.parametrize(
    ("foreign", "error", "message"),
    [
        (object(), TypeError, "an operator with shape, dtype, device and @"),
        (Foreign(torch.ones(2, 3)), ValueError, r"square operator.*\(2, 3\)"),
        (Foreign(torch.ones(2)), ValueError, "square operator"),
    ],
)
def test_what_is_no_operator_is_refused(foreign, error, message):
    with pytest.raises(error, match=message):
        as_linear_operator(foreign)


@pytest.mark.parametrize(
    "product",
    [lambda V: None, lambda V: V[:1], lambda V: V.double(), lambda V: V.numpy()],
    ids=["none", "shape", "dtype", "numpy"],
)
def test_a_wrong_result_is_an_error(product):
    class Wrong(Foreign):
        def __matmul__(self, other):
            return product(other)

    operator = as_linear_operator(Wrong(symmetric(dtype=torch.float32)))
    with pytest.raises(ValueError, match=r"to return a tensor of shape \(6, 2\)"):
        operator @ torch.ones(6, 2)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own, in their import
def test_a_curvlinops_operator_multiplies():
    curvlinops = pytest.importorskip("curvlinops")
    problem = cases.build("mlp")
    params = list(problem.model.parameters())
    theirs = curvlinops.HessianLinearOperator(
        problem.model,
        torch.nn.CrossEntropyLoss(),
        params,
        problem.batches,
        check_deterministic=False,
    )
    operator = as_linear_operator(theirs)
    assert operator.dtype == torch.float64
    ours = problem.operator(HessianOperator)
    torch.testing.assert_close(operator.to_dense(), ours.to_dense(), rtol=1e-9, atol=1e-12)


def test_a_skerch_operator_multiplies():
    linops = pytest.importorskip("skerch.linops")
    diagonal = torch.arange(1.0, 5.0)
    operator = as_linear_operator(linops.DiagonalLinOp(diagonal))
    torch.testing.assert_close(operator.to_dense(), diagonal.diag())


def test_skerch_multiplies_with_ours():
    algorithms = pytest.importorskip("skerch.algorithms")
    A = symmetric(dtype=torch.float64)
    values, _ = algorithms.seigh(DenseOperator(A), torch.device("cpu"), torch.float64, 6)
    expected = torch.linalg.eigvalsh(A)
    torch.testing.assert_close(values.sort().values, expected, rtol=1e-8, atol=1e-8)


# -- SciPy ------------------------------------------------------------------------------------


def test_scipy_finds_our_eigenvalues():
    numpy = pytest.importorskip("numpy")
    linalg = pytest.importorskip("scipy.sparse.linalg")
    A = symmetric(20)
    theirs = DenseOperator(A).to_scipy()
    assert theirs.shape == (20, 20)
    assert theirs.dtype == numpy.float64
    largest = linalg.eigsh(theirs, k=1, which="LA", return_eigenvectors=False)[0]
    assert abs(largest - float(torch.linalg.eigvalsh(A)[-1])) < 1e-9
    block = numpy.ones((20, 3))[::-1]  # negative strides
    block.setflags(write=False)
    assert numpy.allclose(theirs @ block, A.numpy() @ block)
    assert numpy.allclose(theirs.H @ block[:, 0], A.numpy() @ block[:, 0])


def test_a_missing_scipy_is_named_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"pip install 'hesscurv\[bench\]'"):
        DenseOperator(symmetric()).to_scipy()
