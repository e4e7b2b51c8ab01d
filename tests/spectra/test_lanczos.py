import pytest
import torch
from planted import PlainOperator, indefinite, planted

from hesscurv.spectra.lanczos import lanczos

every_seed = pytest.mark.parametrize("seed", [0, 1, 2])


def starts(b, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, dim, generator=generator, dtype=torch.float64).to(dtype)


def run(H, start, n, reorthogonalize=True, deflated=()):
    b, dim = start.shape
    basis = start.new_empty(b, n, dim) if reorthogonalize else None
    return lanczos(H, start.clone(), n, basis_bnD=basis, deflated=deflated), basis


@every_seed
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_the_quadrature_is_exact_up_to_degree_2n_minus_1(reorthogonalize, seed):
    H, n = planted(indefinite(80) / 10, 80, seed), 6
    start = starts(3, 80, seed)
    processes, _ = run(H, start, n, reorthogonalize)
    for v, process in zip(start / start.norm(dim=1, keepdim=True), processes, strict=True):
        nodes, weights = process.quadrature()
        assert len(nodes) == n
        assert (nodes.diff() > 0).all()
        power = v
        for degree in range(2 * n):
            expected = (v @ power).item()
            assert (weights * nodes**degree).sum().item() == pytest.approx(expected, abs=1e-13)
            power = H.matrix @ power
        # And not beyond: or the test could not tell.
        assert abs((weights * nodes ** (2 * n)).sum() - v @ power) > 1e-10


@every_seed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_basis_is_orthonormal_and_tridiagonalises(dtype, seed):
    # Eigenvalues that converge at once: without reorthogonalisation the basis is lost after 20.
    H = planted(100 * 0.5 ** torch.arange(60.0), 60, seed, dtype)
    processes, basis = run(H, starts(2, 60, seed, dtype), 18)
    eps = torch.finfo(dtype).eps
    for process, Q in zip(processes, basis.double(), strict=True):
        n = len(process.diagonal)
        Q = Q[:n]
        assert (Q @ Q.mT - torch.eye(n)).abs().max() <= 20 * eps
        T = torch.diag(process.diagonal)
        T += torch.diag(process.off_diagonal, 1) + torch.diag(process.off_diagonal, -1)
        assert (Q @ H.matrix.double() @ Q.mT - T).abs().max() <= 100 * 20 * eps


@every_seed
def test_processes_do_not_know_of_each_other(seed):
    H, start = planted(indefinite(50), 50, seed), starts(4, 50, seed)
    together, _ = run(H, start, 8)
    for i, process in enumerate(together):
        (alone,), _ = run(H, start[i : i + 1], 8)
        torch.testing.assert_close(alone.diagonal, process.diagonal, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone.off_diagonal, process.off_diagonal, rtol=1e-9, atol=0)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_each_process_ends_where_its_space_is_invariant(reorthogonalize):
    # Unit vectors: the products have no rounding, so that ends are sharp.
    H = PlainOperator(torch.diag(torch.tensor([3.0, -1.0, 2.0, 0.0, 5.0], dtype=torch.float64)))
    start = torch.zeros(3, 5, dtype=torch.float64)
    start[0, 4] = 7.0
    start[1, :2] = 1.0
    start[2] = 1.0
    processes, _ = run(H, start, 5, reorthogonalize)
    assert [len(p.diagonal) for p in processes] == [1, 2, 5]
    assert [len(p.off_diagonal) for p in processes] == [0, 1, 4]
    assert H.num_matvecs == 1 + 2 + 5
    for process, expected in zip(processes, ([5.0], [-1, 3], [-1, 0, 2, 3, 5]), strict=True):
        nodes, weights = process.quadrature()
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(nodes, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            weights, torch.full_like(weights, 1 / len(expected)), rtol=1e-10, atol=0
        )


@every_seed
def test_deflated_vectors_stay_out(seed):
    H = planted(indefinite(60), 60, seed)
    V = torch.linalg.qr(starts(5, 60, seed).mT).Q  # any space, not an invariant one
    E = torch.eye(60, dtype=torch.float64) - V @ V.mT
    processes, basis = run(H, starts(2, 60, seed + 9), 20, deflated=[V[:, :2].mT, V[:, 2:].mT])
    assert (basis @ V).abs().max() <= 1e-13
    projected = PlainOperator(E @ H.matrix @ E)
    expected, _ = run(projected, starts(2, 60, seed + 9) @ E, 20)
    for one, other in zip(processes, expected, strict=True):
        torch.testing.assert_close(one.diagonal, other.diagonal, rtol=1e-8, atol=1e-8)


def test_the_operators_own_storage_is_left_alone():
    class Constant(PlainOperator):
        def _matmat(self, vectors):
            return self.matrix[:, : vectors.shape[1]]

    matrix = torch.eye(6, dtype=torch.float64)
    run(Constant(matrix), starts(2, 6), 3)
    assert torch.equal(matrix, torch.eye(6, dtype=torch.float64))


def test_a_start_without_a_direction_is_refused():
    H = planted(indefinite(10), 10)
    V = torch.eye(10, dtype=torch.float64)[:3]
    for start, deflated in [(torch.zeros(1, 10), []), (torch.eye(10)[:1], [V])]:
        with pytest.raises(ValueError, match="outside of the span of the deflated"):
            run(H, start.double(), 3, deflated=deflated)
    assert H.num_matvecs == 0
