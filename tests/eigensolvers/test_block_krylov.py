"""block_krylov against planted spectra: the oracle is the spectrum a matrix was made from."""

import math
import re
import warnings

import pytest
import torch
from torch import Tensor

from hesscurv import ConvergenceWarning, eigsh
from hesscurv.eigensolvers.progress import expected_matvecs
from hesscurv.operators import DenseOperator

SEEDS = (0, 1, 2)
DIM = 200


def planted(eigenvalues: Tensor, seed: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A symmetric matrix of a given spectrum, its eigenvalues by magnitude, its eigenvectors."""
    g = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    eigenvalues = eigenvalues.double()
    A = (Q * eigenvalues) @ Q.mT
    order = eigenvalues.abs().argsort(descending=True, stable=True)
    return ((A + A.mT) / 2).to(dtype), eigenvalues[order], Q[:, order]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying(n: int = DIM) -> Tensor:
    """|lambda_i| = i^-1.5 with every third one negative: like a Hessian's."""
    values = 1 / torch.arange(1, n + 1).double() ** 1.5
    values[1::3] *= -1
    return values


TEN_COPIES = torch.cat([torch.full((10,), 5.0), 0.8 ** torch.arange(290)])

SPECTRA = {
    "decaying, both signs": (decaying(), 20),
    "k = 1": (decaying(), 1),
    "k = D": (decaying(60), 60),
    "D = 1": (torch.tensor([-2.0]), 1),
    "D = 2": (torch.tensor([1.0, -3.0]), 2),
    "identity": (torch.ones(DIM), 7),
    "projector": (torch.cat([torch.ones(30), torch.zeros(DIM - 30)]), 12),
    "rank below k": (torch.cat([torch.tensor([5.0, 4, -3, 2]), torch.zeros(DIM - 4)]), 10),
    "rank k": (torch.cat([torch.linspace(5, 1, 10), torch.zeros(DIM - 10)]), 10),
    "rank one": (torch.cat([torch.tensor([-7.0]), torch.zeros(DIM - 1)]), 5),
    "40 copies, k within": (torch.cat([torch.full((40,), 5.0), torch.linspace(2, 0, 160)]), 25),
    "40 copies, k beyond": (torch.cat([torch.full((40,), 5.0), torch.linspace(2, 0, 160)]), 50),
    "three clusters": (
        torch.cat([torch.full((10,), v) for v in (3.0, -2.0, 1.0)] + [torch.zeros(170)]),
        30,
    ),
    "plus and minus": (
        torch.cat([torch.linspace(5, 4, 6), -torch.linspace(5, 4, 6), torch.linspace(1, 0, 188)]),
        12,
    ),
    "outlier 1e6 above": (torch.cat([torch.tensor([1e6]), torch.linspace(1, 0.1, DIM - 1)]), 4),
    "all negative": (-(torch.linspace(3, 0.1, DIM) ** 3), 10),
    "tiny scale": (1e-20 * decaying(), 10),
    "huge scale": (1e20 * decaying(), 10),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_eigenvalues_are_found_by_magnitude_with_both_signs(name, seed):
    spectrum, k = SPECTRA[name]
    A, values, _ = planted(spectrum, seed)
    pairs = eigsh(A, k, tol=1e-8, generator=seeded(seed))
    assert bool(pairs.converged.all())
    # A residual of 1e-8 |lambda| moves a Rayleigh quotient by less than that; 1e-12 |lambda_1| is
    # the rounding of the matrix itself.
    scale = values.abs().max()
    torch.testing.assert_close(
        pairs.eigenvalues.abs(), values[:k].abs(), rtol=1e-7, atol=float(1e-12 * scale)
    )
    # Signs are determined where no pair of opposite sign has the same magnitude.
    if name != "plus and minus":
        torch.testing.assert_close(
            pairs.eigenvalues, values[:k], rtol=1e-7, atol=float(1e-12 * scale)
        )
    V = pairs.eigenvectors
    torch.testing.assert_close(V.mT @ V, torch.eye(k, dtype=V.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reported_residuals_are_the_true_ones(dtype, seed):
    A, _, _ = planted(decaying(), seed, dtype)
    pairs = eigsh(A, 20, tol=1e-3, generator=seeded(seed))
    V, values = pairs.eigenvectors.double(), pairs.eigenvalues.double()
    true = (A.double() @ V - V * values).norm(dim=0)
    reported = pairs.residuals.double()
    # Estimates may be off by the noise of the products, which is measured on a block of pairs
    # and taken for all: a factor of 3, both ways, where they are not below the noise.
    eps = torch.finfo(dtype).eps * values[0].abs()
    assert bool((true <= 3 * reported + 3 * eps).all())
    assert bool((reported <= 3 * true + 10 * eps).all())


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_converged_means_residual_within_tol(tol):
    A, _, _ = planted(decaying(), 0)
    pairs = eigsh(A, 15, tol=tol)
    limit = (tol * pairs.eigenvalues.abs()).clamp(
        min=float(10 * torch.finfo(A.dtype).eps * pairs.eigenvalues[0].abs())
    )
    assert bool((pairs.residuals <= limit).all())
    assert bool(pairs.converged.all())


def test_zero_operator_has_k_orthonormal_vectors_of_eigenvalue_zero():
    pairs = eigsh(torch.zeros(30, 30), 4)
    assert bool((pairs.eigenvalues == 0).all())
    assert bool(pairs.converged.all())
    torch.testing.assert_close(pairs.eigenvectors.mT @ pairs.eigenvectors, torch.eye(4))


@pytest.mark.parametrize("seed", SEEDS)
def test_eigenspace_is_the_planted_one(seed):
    A, values, U = planted(decaying(), seed)
    k = 20
    pairs = eigsh(A, k, tol=1e-6, generator=seeded(seed))
    sines = torch.linalg.svdvals(pairs.eigenvectors - U[:, :k] @ (U[:, :k].mT @ pairs.eigenvectors))
    # Davis and Kahan: sin <= ||residual matrix|| / gap.
    gap = values[k - 1].abs() - values[k].abs()
    assert sines[0] <= math.sqrt(k) * 1e-6 * values[0].abs() / gap


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_basis", [44, 50, 70])
def test_thick_restart_finds_the_same_pairs_within_a_capped_basis(max_basis, seed):
    A, values, _ = planted(decaying(), seed)
    pairs = eigsh(A, 20, block_size=8, max_basis=max_basis, tol=1e-6, generator=seeded(seed))
    assert bool(pairs.converged.all())
    assert pairs.info["max_basis"] == max_basis
    assert (pairs.info["restarts"] > 0) == (pairs.num_matvecs > max_basis)
    torch.testing.assert_close(pairs.eigenvalues, values[:20], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_missed_copies_of_an_eigenvalue_are_found_in_a_capped_basis(seed):
    # Block size 4 sees four of the ten copies at first, and the basis never spans the space.
    A, values, _ = planted(TEN_COPIES, seed)
    pairs = eigsh(A, 12, block_size=4, max_basis=80, generator=seeded(seed))
    torch.testing.assert_close(pairs.eigenvalues[:10], values[:10], rtol=1e-4, atol=0)


def test_without_verification_missed_copies_stay_missed():
    """The property above is the search's doing: the test can fail."""
    A, values, _ = planted(TEN_COPIES, 0)
    pairs = eigsh(A, 12, block_size=4, max_basis=80, verify=False)
    assert not torch.allclose(pairs.eigenvalues[:10], values[:10], rtol=1e-2)


@pytest.mark.parametrize("seed", SEEDS)
def test_warm_start_near_the_solution_saves_products(seed):
    n, k = 400, 30
    A, _, _ = planted(1 / torch.arange(1, n + 1).double() ** 2, seed)
    pairs = eigsh(A, k, generator=seeded(seed))
    noise = torch.randn(n, generator=seeded(seed + 10), dtype=torch.float64)
    B = A + 1e-6 * torch.diag(noise)
    cold = eigsh(B, k, generator=seeded(seed))
    warm = eigsh(B, k, initial=pairs, generator=seeded(seed))
    assert bool(warm.converged.all())
    assert warm.num_matvecs < 0.8 * cold.num_matvecs
    # Converged to 1e-3, both: a Rayleigh quotient's error is of second order in the residual.
    torch.testing.assert_close(warm.eigenvalues, cold.eigenvalues, rtol=1e-4, atol=0)


@pytest.mark.parametrize("columns", [3, 20, 40])
@pytest.mark.parametrize("max_basis", [None, 45])
def test_any_initial_space_leads_to_the_same_pairs(columns, max_basis):
    A, values, _ = planted(decaying(), 0)
    start = torch.randn(DIM, columns, generator=seeded(5), dtype=torch.float64)
    kept = start.clone()
    pairs = eigsh(A, 20, initial=start, max_basis=max_basis, block_size=5, tol=1e-6)
    assert torch.equal(start, kept)
    torch.testing.assert_close(pairs.eigenvalues, values[:20], rtol=1e-6, atol=1e-12)


def test_an_exact_initial_space_without_the_top_vector_does_not_hide_it():
    A, values, U = planted(decaying(), 0)
    pairs = eigsh(A, 10, initial=U[:, 1:11].contiguous())
    torch.testing.assert_close(pairs.eigenvalues[0], values[0])


def test_out_of_products_returns_pairs_with_a_warning():
    A, _, _ = planted(torch.linspace(1, 2, DIM), 0)
    with pytest.warns(ConvergenceWarning, match=r"of 20 eigenpairs have converged.*max_matvecs"):
        pairs = eigsh(A, 20, max_matvecs=30)
    assert pairs.num_matvecs <= 30
    assert len(pairs) == 20
    assert not bool(pairs.converged.all())
    V = pairs.eigenvectors
    torch.testing.assert_close(V.mT @ V, torch.eye(20, dtype=V.dtype), rtol=0, atol=1e-12)
    true = (A @ V - V * pairs.eigenvalues).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_matvecs", [20, 21, 27])
def test_max_matvecs_is_never_exceeded(max_matvecs):
    A, _, _ = planted(torch.linspace(1, 2, DIM), 0)
    H = DenseOperator(A)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pairs = eigsh(H, 20, max_matvecs=max_matvecs)
    assert pairs.num_matvecs == H.num_matvecs <= max_matvecs


def test_num_matvecs_counts_every_product():
    H = DenseOperator(planted(decaying(), 0)[0])
    assert eigsh(H, 10).num_matvecs == H.num_matvecs


@pytest.mark.parametrize("block_size", [1, 2, 7, 16])
def test_block_size_changes_the_cost_not_the_result(block_size):
    A, values, _ = planted(decaying(), 0)
    pairs = eigsh(A, 10, block_size=block_size, tol=1e-8)
    assert pairs.info["block_size"] == block_size
    torch.testing.assert_close(pairs.eigenvalues, values[:10], rtol=1e-7, atol=1e-13)


def test_same_seed_same_bits_and_other_seed_other_bits():
    A, _, _ = planted(decaying(), 0, torch.float32)
    first, second = (eigsh(A, 10, generator=seeded(3)) for _ in range(2))
    other = eigsh(A, 10, generator=seeded(4))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(first.eigenvectors, second.eigenvectors)
    assert torch.equal(first.residuals, second.residuals)
    assert not torch.equal(first.eigenvectors, other.eigenvectors)


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    eigsh(planted(decaying(), 0)[0], 5)
    assert torch.equal(state, torch.get_rng_state())


def test_noisy_products_are_reported_as_noise():
    A, _, _ = planted(decaying(), 0)
    g = seeded(0)

    class Noisy(DenseOperator):
        def _matmat(self, vectors_DB):
            out = super()._matmat(vectors_DB)
            noise = torch.randn(out.shape, generator=g, dtype=out.dtype)
            return out + 1e-5 / math.sqrt(DIM) * noise  # a vector of norm 1e-5

    with pytest.warns(ConvergenceWarning, match="noise"):
        pairs = eigsh(Noisy(A), 10, tol=1e-8)
    # The noise of a product, and that of the earlier products in the Ritz vector.
    assert 0.5e-5 < pairs.info["noise"] < 5e-5
    assert bool((pairs.residuals > 0.2e-5).all())


@pytest.mark.slow  # an eigenproblem of size 2300
def test_float32_basis_of_2000_vectors_is_orthonormal_to_1e_5():
    n = 20_000
    diagonal = 1 / torch.arange(1, n + 1) ** 0.25  # slow decay: a large basis is needed

    class Diagonal(DenseOperator):
        def __init__(self):
            super().__init__(torch.eye(1))
            self.shape = torch.Size((n, n))

        def _matmat(self, vectors_DB):
            return (vectors_DB.mT * diagonal).mT

    with pytest.warns(ConvergenceWarning):
        pairs = eigsh(Diagonal(), 2000, block_size=100, max_basis=2300, max_matvecs=2300)
    V = pairs.eigenvectors
    gram = V.mT.double() @ V.double()
    assert (gram - torch.eye(2000, dtype=torch.float64)).abs().max() < 1e-5


def test_a_cap_that_is_too_small_is_refused_before_the_first_product():
    H = DenseOperator(planted(decaying(), 0)[0])
    with pytest.raises(ValueError, match=r"max_basis >= k \+ 3 block_size = 44, got 30"):
        eigsh(H, 20, block_size=8, max_basis=30)
    assert H.num_matvecs == 0


def test_a_basis_that_cannot_fit_the_memory_is_refused_before_the_first_product():
    class Vast(DenseOperator):
        def __init__(self):
            super().__init__(torch.eye(1))
            self.shape = torch.Size((10**12, 10**12))

    H = Vast()
    with pytest.raises(ValueError, match="fits nowhere"):
        eigsh(H, 1000)
    assert H.num_matvecs == 0


def test_progress_bar_shows_pairs_products_rate_and_memory(terminal):
    eigsh(planted(decaying(), 0)[0], 5, progress=True)
    shown = terminal.readouterr().err
    assert "5/5" in shown
    assert re.search(r"\d+ products, [\d.e+]+/s, .*[\d.]+ GB", shown)


def test_expected_products_of_a_solve():
    assert expected_matvecs(100, 0, (0, 0), (0, 0)) == pytest.approx(220)
    assert expected_matvecs(100, 300, (0, 0), (0, 0)) == pytest.approx(330)  # longer than expected
    # 40 of 100 pairs after 120 products, 60 after 140: one product for each further pair.
    assert expected_matvecs(100, 150, (120, 40), (140, 60)) == pytest.approx(180)
    assert expected_matvecs(100, 210, (120, 40), (200, 100)) == 210


def test_no_progress_by_default(capfd):
    eigsh(planted(decaying(), 0)[0], 5)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"block_size": 0}, ValueError),
        ({"block_size": -1}, ValueError),
        ({"block_size": 2.5}, TypeError),
        ({"max_basis": 200.5}, TypeError),
        ({"max_basis": True}, TypeError),
    ],
)
def test_sizes_that_are_none_are_refused(options, error):
    H = DenseOperator(torch.eye(300))
    with pytest.raises(error, match=f"expected {next(iter(options))}"):
        eigsh(H, 3, **options)
    assert H.num_matvecs == 0


@pytest.mark.parametrize("max_basis", [None, 30])
def test_another_default_device_changes_nothing(max_basis):
    A = torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64))
    expected = eigsh(A, 10, block_size=3, max_basis=max_basis)
    with torch.device("meta"):
        pairs = eigsh(A, 10, block_size=3, max_basis=max_basis)
        warm = eigsh(A, 10, block_size=3, max_basis=max_basis, initial=pairs)
    assert torch.equal(pairs.eigenvalues, expected.eigenvalues)
    # Both have residuals up to 1e-3, of which Ritz values err by the square.
    torch.testing.assert_close(warm.eigenvalues, expected.eigenvalues, rtol=1e-5, atol=0)
