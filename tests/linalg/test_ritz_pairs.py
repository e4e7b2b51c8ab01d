import pytest
import torch

from hesscurv.linalg import ritz as rayleigh_ritz
from hesscurv.linalg.ritz import ritz_pairs, rotate_


def test_pairs_come_by_magnitude_with_both_signs():
    values = torch.tensor([0.5, -3.0, 2.0, 0.0, -1.0], dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    T = (Q * values) @ Q.mT
    theta, Y = ritz_pairs(T)
    torch.testing.assert_close(theta, torch.tensor([-3.0, 2.0, -1.0, 0.5, 0.0]).double())
    torch.testing.assert_close((Y * theta) @ Y.mT, T)
    torch.testing.assert_close(Y.mT @ Y, torch.eye(5, dtype=torch.float64))


def test_equal_magnitudes_keep_the_order_of_their_values():
    theta, _ = ritz_pairs(torch.diag(torch.tensor([2.0, -2.0, 1.0, 2.0, -2.0])))
    assert theta.tolist() == [-2.0, -2.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_work_is_done_in_float64(dtype):
    theta, Y = ritz_pairs(torch.eye(3, dtype=dtype))
    assert theta.dtype == Y.dtype == torch.float64


def test_only_the_symmetric_part_counts():
    T = torch.randn(6, 6, dtype=torch.float64)
    theta, Y = ritz_pairs(T)
    torch.testing.assert_close((Y * theta) @ Y.mT, (T + T.mT) / 2)


def test_an_empty_problem_has_no_pairs():
    theta, Y = ritz_pairs(torch.zeros(0, 0))
    assert theta.shape == (0,)
    assert Y.shape == (0, 0)


def test_bad_matrices_are_refused():
    with pytest.raises(ValueError, match=r"expected a square matrix, got shape \(2, 3\)"):
        ritz_pairs(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="NaN or inf"):
        ritz_pairs(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


@pytest.mark.parametrize("dim", [1, 1024, 3000])
@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_rotation_in_place_is_the_product(dim, k, monkeypatch):
    monkeypatch.setattr(rayleigh_ritz, "_TEMPORARY_NUMEL", 1)  # the least chunk: 1024
    basis = torch.randn(7, dim, dtype=torch.float64)
    Y = torch.randn(7, k, dtype=torch.float64)
    expected = Y.mT @ basis
    V = rotate_(basis, Y)
    torch.testing.assert_close(V, expected)
    assert V.shape == (k, dim)
    assert k == 0 or V.data_ptr() == basis.data_ptr()


def test_rotation_of_a_float32_basis_keeps_it_orthonormal():
    basis = torch.linalg.qr(torch.randn(4000, 800, dtype=torch.float64)).Q.mT.float().contiguous()
    Y = torch.linalg.qr(torch.randn(800, 800, dtype=torch.float64)).Q
    V = rotate_(basis, Y[:, :300]).double()
    assert (V @ V.mT - torch.eye(300)).abs().max() <= 1e-6


def test_rotation_refuses_what_does_not_fit():
    for shape in [(3, 2), (4, 5), (4,)]:
        with pytest.raises(ValueError, match=r"expected coefficients of shape \(4, k\)"):
            rotate_(torch.zeros(4, 10), torch.zeros(shape))
