"""eigsh: what it accepts, what it refuses, and how."""

import pytest
import torch

import hesscurv
from hesscurv import eigsh
from hesscurv.operators import DenseOperator

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
