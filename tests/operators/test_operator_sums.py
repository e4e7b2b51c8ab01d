"""Sums, multiples and shifts of operators against the same of their dense matrices."""

import cases
import oracles
import pytest
import torch

import hesscurv
from hesscurv import GGNOperator, HessianOperator
from hesscurv.operators import DenseOperator, OperatorSum, as_linear_operator

# Products are summed in float64: a few eps of the largest term.
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def dense(kind="hessian"):
    return oracles.dense("conv_bn", kind)


@pytest.fixture
def H():
    return cases.build("conv_bn").operator(HessianOperator)


@pytest.fixture
def G():
    return cases.build("conv_bn").operator(GGNOperator)


EXPRESSIONS = {
    "multiple": (lambda H, G: 2 * H, lambda A, B, eye: 2 * A),
    "multiple from the right": (lambda H, G: H * -0.5, lambda A, B, eye: -0.5 * A),
    "quotient": (lambda H, G: H / 4, lambda A, B, eye: A / 4),
    "negative": (lambda H, G: -H, lambda A, B, eye: -A),
    "sum": (lambda H, G: H + G, lambda A, B, eye: A + B),
    "difference": (lambda H, G: H - G, lambda A, B, eye: A - B),
    "shift": (lambda H, G: H - 0.3, lambda A, B, eye: A - 0.3 * eye),
    "shift from the left": (lambda H, G: 0.3 - H, lambda A, B, eye: 0.3 * eye - A),
    "nested": (
        lambda H, G: -(2 * (H - 1) + G / 2) + 0.1,
        lambda A, B, eye: -(2 * (A - eye) + B / 2) + 0.1 * eye,
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_of_operators_is_that_of_their_matrices(H, G, name):
    of_operators, of_matrices = EXPRESSIONS[name]
    A, B = dense(), dense("ggn")
    expected = of_matrices(A, B, torch.eye(len(A), dtype=A.dtype))
    torch.testing.assert_close(of_operators(H, G).to_dense(), expected, **CLOSE)


def test_eigenpairs_of_a_shifted_sum_are_those_of_the_matrix(H, G):
    A = H + 3 * G - 0.2
    pairs = hesscurv.eigsh(A, k=5, tol=1e-8)
    values = torch.linalg.eigvalsh(dense() + 3 * dense("ggn") - 0.2 * torch.eye(A.shape[0]))
    largest = values[values.abs().argsort(descending=True)][:5]
    torch.testing.assert_close(pairs.eigenvalues, largest, rtol=1e-8, atol=0)
    assert pairs.layout == H.layout  # so that metrics and pruning find the parameters


def test_products_count_in_the_sum_and_in_its_terms(H, G):
    A = H + G
    A @ torch.ones(A.shape[0], 3, dtype=A.dtype)
    assert (A.num_matvecs, H.num_matvecs, G.num_matvecs) == (3, 3, 3)


def test_terms_of_sums_are_not_nested(H, G):
    assert len((2 * (H + G) - H).terms) == 3
    assert "2 HessianOperator" in repr(2 * H + G - 1)


def test_operators_that_do_not_fit_are_refused(H):
    small = DenseOperator(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="operators of one shape"):
        H + small
    single = as_linear_operator(torch.eye(3))
    with pytest.raises(ValueError, match="operators of one dtype"):
        small + single
    for wrong in ("2", None, torch.ones(2), True):
        with pytest.raises(TypeError):
            small * wrong
        with pytest.raises(TypeError):
            small + wrong
        with pytest.raises(TypeError):
            wrong - small


def test_a_restriction_is_the_principal_submatrix(H, G):
    name = H.layout.names[0]
    span = H.layout.slices()[name]
    part = H.restrict([name])
    assert part.layout.names == (name,)
    torch.testing.assert_close(part.to_dense(), dense()[span, span], **CLOSE)
    both = (H - 2 * G + 1).restrict([name])
    expected = (dense() - 2 * dense("ggn"))[span, span] + torch.eye(part.shape[0])
    torch.testing.assert_close(both.to_dense(), expected, **CLOSE)
    with pytest.raises(ValueError, match="among those of this operator"):
        part.restrict(None)
    with pytest.raises(TypeError, match="no parameters"):
        DenseOperator(torch.eye(2)).restrict(None)


def test_the_protocol_tells_what_an_eigensolver_takes(H):
    class Foreign:
        shape, dtype, device = (3, 3), torch.float32, torch.device("cpu")

        def __matmul__(self, vectors):
            return 2 * vectors

    for operator in (H, 2 * H, Foreign()):
        assert isinstance(operator, hesscurv.SymmetricOperator)
    assert not isinstance(object(), hesscurv.SymmetricOperator)
    assert hesscurv.eigsh(Foreign(), k=2).eigenvalues.tolist() == [2.0, 2.0]


def test_a_solve_of_a_scaled_operator_goes_on_and_another_factor_is_noticed(H, tmp_path):
    folder = tmp_path / "solve"
    first = hesscurv.eigsh(2 * H, k=4, checkpoint=folder)
    again = hesscurv.eigsh(2 * H, k=4, checkpoint=folder)
    torch.testing.assert_close(again.eigenvalues, first.eigenvalues, rtol=0, atol=0)
    with pytest.raises(ValueError, match="another problem"):
        hesscurv.eigsh(3 * H, k=4, checkpoint=folder)


def test_sums_are_operator_sums(H, G):
    assert all(type(A) is OperatorSum for A in (2 * H, H + G, H - 1, -H, H / 2))


def test_products_and_rows_are_scaled_and_counted_once():
    matrix = torch.randn(6, 6, dtype=torch.float64)
    inner = DenseOperator(matrix + matrix.T)
    A = 2.0**10 * inner
    V = torch.randn(6, 3, dtype=torch.float64)
    expected = (inner @ V) * 2.0**10  # a power of two scales without rounding
    inner.num_matvecs = 0
    assert torch.equal(A @ V, expected)
    assert (A.num_matvecs, inner.num_matvecs) == (3, 3)
    assert torch.equal(A.product_rows(V), expected)
    assert (A.num_matvecs, inner.num_matvecs) == (6, 6)
