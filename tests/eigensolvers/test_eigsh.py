"""eigsh: what it accepts, what it refuses, and how."""

import math
import warnings

import numpy as np
import pytest
import torch

import hesscurv
from hesscurv import ConvergenceWarning, eigsh
from hesscurv.eigensolvers.krylov.block_krylov import block_krylov
from hesscurv.operators import DenseOperator, as_linear_operator

A = torch.diag(torch.tensor([1.0, -3.0, 2.0, 0.5]))


@pytest.mark.parametrize("method", ["block_krylov", "single_pass", "rayleigh_ritz"])
def test_every_method_finds_the_pairs_of_a_small_matrix(method):
    pairs = eigsh(A, 2, method)
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([-3.0, 2.0]), rtol=1e-5, atol=0)
    assert pairs.method == method


class OnlyWhatIsPromised:
    """Another library's operator: shape, dtype, device and @."""

    shape, dtype, device = (4, 4), torch.float32, torch.device("cpu")

    def __matmul__(self, other):
        return A @ other


def test_another_librarys_operator_is_accepted():
    torch.testing.assert_close(
        eigsh(OnlyWhatIsPromised(), 1).eigenvalues, torch.tensor([-3.0]), rtol=1e-5, atol=0
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, on import
def test_curvlinops_operator_is_accepted():
    curvlinops = pytest.importorskip("curvlinops")
    net = torch.nn.Linear(3, 2)
    data = [(torch.randn(5, 3), torch.randn(5, 2))]
    loss = torch.nn.MSELoss()
    theirs = curvlinops.HessianLinearOperator(
        net, loss, list(net.parameters()), data, check_deterministic=False
    )
    ours = hesscurv.HessianOperator(net, hesscurv.supervised(loss), data)
    torch.testing.assert_close(
        eigsh(theirs, 3).eigenvalues, eigsh(ours, 3).eigenvalues, rtol=1e-4, atol=1e-6
    )


def test_layout_of_the_operator_comes_with_the_pairs():
    net = torch.nn.Linear(3, 2)
    task = hesscurv.supervised(torch.nn.MSELoss())
    H = hesscurv.HessianOperator(net, task, [(torch.randn(5, 3), torch.randn(5, 2))])
    for method in ("block_krylov", "single_pass", "rayleigh_ritz"):
        assert eigsh(H, 2, method, tol=1.0).layout == H.layout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, r"1 <= k <= D = 4, got k=0"),
        ({"k": 5}, ValueError, r"1 <= k <= D = 4, got k=5"),
        ({"k": 2.0}, TypeError, "k to be an int, got float"),
        ({"k": True}, TypeError, "k to be an int, got bool"),
        ({"method": "lanczos"}, ValueError, "one of .*block_krylov.*got 'lanczos'"),
        ({"tol": -1.0}, ValueError, "finite tol >= 0"),
        ({"tol": float("nan")}, ValueError, "finite tol >= 0"),
        ({"max_matvecs": 1}, ValueError, "max_matvecs >= k = 2, got 1"),
        ({"max_matvecs": 8.5}, TypeError, "max_matvecs to be an int"),
        ({"generator": 3}, TypeError, r"torch.Generator\(\).manual_seed"),
        ({"initial": torch.randn(3, 2)}, ValueError, r"shape \(4, k0\).*\(3, 2\)"),
        ({"initial": torch.randn(4)}, ValueError, r"shape \(4, k0\)"),
        ({"initial": torch.full((4, 1), float("nan"))}, ValueError, "finite initial"),
        ({"initial": "warm"}, TypeError, "Eigenpairs or a floating tensor"),
        ({"initial": A, "method": "single_pass"}, ValueError, "cannot start from `initial`"),
        ({"power": 3}, TypeError, r"has no option \['power'\]; its options are .*block_size"),
        ({"H": torch.ones(2, 3)}, ValueError, r"square matrix \(D, D\), got \(2, 3\)"),
        ({"H": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, ValueError, "symmetric.*symmetrise"),
        ({"H": torch.eye(3, dtype=torch.int64)}, TypeError, "real floating matrix"),
        ({"H": torch.full((3, 3), float("inf"))}, ValueError, "finite matrix"),
        ({"H": torch.eye(3, dtype=torch.bfloat16)}, TypeError, "float32 or float64"),
        ({"H": "hessian"}, TypeError, "operator with shape, dtype, device and @"),
    ],
)
def test_bad_arguments_are_refused_with_a_remedy(arguments, error, message):
    arguments = {"H": A, "k": 2, **arguments}
    with pytest.raises(error, match=message):
        eigsh(**arguments)


def test_nan_from_a_foreign_operator_is_an_error_not_a_result():
    class Broken(OnlyWhatIsPromised):
        def __matmul__(self, other):
            return A @ other * float("nan")

    for method in ("block_krylov", "single_pass", "rayleigh_ritz"):
        with pytest.raises(ValueError, match="NaN or inf"):
            eigsh(Broken(), 2, method)


def test_bad_arguments_cost_no_product():
    H = DenseOperator(A)
    with pytest.raises(TypeError):
        eigsh(H, 2, power=1)
    assert H.num_matvecs == 0


METHODS = {
    "auto": {},
    "single_pass": {"outer": 60, "inner": 60},
    "rayleigh_ritz": {"num_measurements": 60},
}


def symmetric(size=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return A + A.mT


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e290])
@pytest.mark.parametrize("method", METHODS)
def test_operators_whose_squares_leave_the_floating_range(method, scale, which):
    A = symmetric()
    expected = eigsh(A, 5, method, which, **METHODS[method])
    pairs = eigsh(A * scale, 5, method, which, **METHODS[method])
    assert bool(pairs.converged.all())
    # Residuals of 1e-3 make errors of Ritz values of about 1e-6.
    torch.testing.assert_close(
        pairs.eigenvalues / scale, expected.eigenvalues, rtol=1e-5, atol=1e-5
    )
    gaps = (A @ pairs.eigenvectors - pairs.eigenvectors * (pairs.eigenvalues / scale)).norm(dim=0)
    assert float(gaps.max()) < 2e-3 * float(expected.eigenvalues.abs().max())
    # The noise that residuals are given with is at most as large as they are.
    assert float((pairs.residuals / scale).max()) < 2e-3 * float(expected.eigenvalues.abs().max())


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_float32_operators_far_from_one(scale):
    A = symmetric().float()
    expected, pairs = eigsh(A, 5), eigsh(A * scale, 5)
    assert bool(pairs.converged.all())
    torch.testing.assert_close(pairs.eigenvalues / scale, expected.eigenvalues, rtol=1e-4, atol=0)


def test_a_tiny_operator_goes_on_from_its_checkpoint(tmp_path):
    A = symmetric(200) * 1e-300
    expected = eigsh(A, 8, block_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        eigsh(A, 8, block_size=2, max_matvecs=30, checkpoint=tmp_path)
    pairs = eigsh(A, 8, block_size=2, checkpoint=tmp_path)
    assert bool(pairs.converged.all())
    torch.testing.assert_close(pairs.eigenvalues, expected.eigenvalues, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="another problem"):
        eigsh(2 * A, 8, block_size=2, checkpoint=tmp_path)


def test_solvers_by_themselves_say_how_to_scale():
    with pytest.raises(ValueError, match=r"multiply the operator .* by .* = 2\^600"):
        block_krylov(as_linear_operator(symmetric() * 1e-300), 3)


def test_filters_of_noisy_products_stop_before_they_overflow():
    """Products of random noise make a Chebyshev filter grow without an end."""
    A = symmetric(126, seed=3) / 20

    class Noisy(hesscurv.LinearOperator):
        generator = torch.Generator().manual_seed(0)

        def _matmat(self, vectors_DB):
            out = A.float() @ vectors_DB
            noise = torch.randn(out.shape, generator=self.generator)
            return out + 1e-2 * out.norm() * noise / out.numel() ** 0.5

    for seed in range(8):
        Noisy.generator.manual_seed(seed)
        H = Noisy(126, torch.float32, torch.device("cpu"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            pairs = eigsh(H, 13, which="LA", tol=1e-5, block_size=2, max_basis=25, max_matvecs=144)
        assert bool(pairs.eigenvalues.isfinite().all())


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr"])
def test_sparse_matrices_are_operators(layout):
    A = symmetric() * (symmetric(seed=1) > 1.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # torch's own, of a beta state
        sparse = {
            "coo": A.to_sparse,
            "csr": A.to_sparse_csr,
            "csc": A.to_sparse_csc,
            "bsr": lambda: A.to_sparse_bsr((5, 5)),
        }[layout]()
    pairs, expected = eigsh(sparse, 4, tol=1e-8), eigsh(A, 4, tol=1e-8)
    torch.testing.assert_close(pairs.eigenvalues, expected.eigenvalues, rtol=1e-10, atol=0)
    assert eigsh(torch.eye(50).to_sparse(), k=3).eigenvalues.tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(5, 4), "square"),
        (torch.eye(5).roll(1, 0), "symmetric matrix.*symmetrise"),
        (torch.diag(torch.tensor([1.0, math.inf, 1.0])), "finite"),
        (torch.eye(5, dtype=torch.int64), "floating"),
    ],
)
def test_sparse_matrices_that_are_no_operators(matrix, message):
    with pytest.raises((ValueError, TypeError), match=message):
        eigsh(matrix.to_sparse(), k=1)


def test_a_sparse_checkpoint_knows_its_entries(tmp_path):
    A = symmetric().to_sparse()
    eigsh(A, 3, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="what differs: entries"):
        eigsh(2 * A, 3, checkpoint=tmp_path)


def test_arrays_of_other_libraries_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"NumPy array; pass torch.from_numpy"):
        eigsh(np.eye(5), k=1)
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"SciPy's .* torch.sparse_csr_tensor"):
        eigsh(sparse.eye(5).tocsr(), k=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [np.int64(2), np.int32(2), torch.tensor(2)])
def test_k_may_be_any_integer(k, method):
    pairs = eigsh(symmetric(), k, method, **METHODS[method])
    assert len(pairs) == 2
    assert type(pairs.num_matvecs) is int


@pytest.mark.parametrize("k", [True, np.bool_(True), torch.tensor(True), 2.0, "2", None])
def test_what_is_no_integer_is_no_k(k):
    with pytest.raises(TypeError, match="expected k to be an int, got"):
        eigsh(symmetric(), k)
