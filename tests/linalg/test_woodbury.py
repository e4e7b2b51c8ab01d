"""Solves with low rank plus blocks against dense matrices, on every kind of block and mask."""

import pytest
import torch

from hesscurv.linalg.woodbury import (
    DiagonalBlock,
    KroneckerBlock,
    LowRankPlusBlocks,
    PermutedBlock,
)

SEEDS = (0, 1, 2)
# float64 and conditions of some thousands: 1e-12 at best, three digits to spare.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
MASKS = ("none", "one", "some", "first block", "all")


def covariance(c, i, generator):
    """Of rank i - 1, as when an input is a sum of others."""
    a = torch.randn(c, i, i - 1, generator=generator, dtype=torch.float64)
    return a @ a.mT


def blocks_of(kind, g):
    """One block of the kind and its dense matrix, built entry by entry."""
    scale = torch.rand(3, generator=g, dtype=torch.float64)
    scale[1] = 0  # an output without gradient
    if kind == "diagonal":
        diagonal = torch.rand(12, generator=g, dtype=torch.float64) + 0.1
        return DiagonalBlock(diagonal), torch.diag(diagonal)
    if kind == "kronecker":
        a = covariance(1, 4, g)[0]
        dense = torch.kron(torch.diag(scale), a)
        return KroneckerBlock(a, scale, 0.3), dense + 0.3 * torch.eye(12).double()
    if kind == "permuted":
        # Stored as (inputs, outputs, kernel), the matrix is (outputs, inputs x kernel).
        a = covariance(1, 4, g)[0]
        block = PermutedBlock(KroneckerBlock(a, scale, 0.3), (2, 3, 2), (1, 0, 2))
        dense = torch.kron(torch.diag(scale), a) + 0.3 * torch.eye(12).double()
        places = [o * 4 + i * 2 + k for i in range(2) for o in range(3) for k in range(2)]
        return block, dense[places][:, places]
    a = covariance(2, 2, g)
    dense = torch.kron(torch.diag(scale), torch.block_diag(*a))
    return KroneckerBlock(a, scale, 0.3), dense + 0.3 * torch.eye(12).double()


KINDS = ("diagonal", "kronecker", "permuted", "block-kronecker")


def system(kinds, seed, n=5):
    g = torch.Generator().manual_seed(seed)
    made = [blocks_of(kind, g) for kind in kinds]
    rows = [torch.randn(n, b.numel, generator=g, dtype=torch.float64) for b, _ in made]
    H = LowRankPlusBlocks(rows, [b for b, _ in made])
    return H, torch.cat(rows, 1), torch.block_diag(*(dense for _, dense in made)), g


def mask_of(which, dim, g):
    mask = torch.zeros(dim, dtype=torch.bool)
    if which == "some":
        mask = torch.rand(dim, generator=g) < 0.5
    elif which == "one":
        mask[dim // 2] = True
    elif which != "none":
        mask[: 12 if which == "first block" else dim] = True
    return mask


def dense_solution(R, K, mu, mask, fixed, residual, gradient):
    """The constrained minimum from the normal equations on the mask."""
    H = R.T @ R + mu * K
    x = torch.where(mask, 0.0, fixed)
    right = R.T @ residual + gradient + H @ x
    x[mask] = -torch.linalg.solve(H[mask][:, mask], right[mask])
    return x


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kinds", [*[(k,) for k in KINDS], KINDS])
def test_products_and_diagonal_are_those_of_the_dense_matrix(kinds, seed):
    H, R, K, g = system(kinds, seed)
    x = torch.randn(len(K), generator=g, dtype=torch.float64)
    dense = R.T @ R + 0.7 * K
    assert H.shape == dense.shape
    torch.testing.assert_close(H.multiply(x, 0.7), dense @ x)
    torch.testing.assert_close(H.rows_times(x), R @ x)
    torch.testing.assert_close(H.diagonal(0.7), dense.diagonal())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("kinds", [*[(k,) for k in KINDS], KINDS])
def test_one_factorisation_solves_for_any_mu(kinds, which, seed):
    H, R, K, g = system(kinds, seed)
    mask = mask_of(which, len(K), g)
    fixed, gradient = torch.randn(2, len(K), generator=g, dtype=torch.float64)
    residual = torch.randn(len(R), generator=g, dtype=torch.float64)
    factored = H.restrict(mask, fixed)
    for mu in (0.01, 1.0, 30.0):
        x = factored.solve(mu, residual, gradient)
        torch.testing.assert_close(
            x, dense_solution(R, K, mu, mask, fixed, residual, gradient), **CLOSE
        )
        assert torch.equal(x[~mask], fixed[~mask])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("given", ["fixed", "residual", "gradient"])
def test_what_is_not_given_is_zero(given, seed):
    H, R, K, g = system(KINDS, seed)
    mask, zeros = mask_of("some", len(K), g), torch.zeros(len(K)).double()
    values = {"fixed": zeros, "residual": torch.zeros(len(R)).double(), "gradient": zeros}
    values[given] = torch.randn(len(values[given]), generator=g, dtype=torch.float64)
    x = H.restrict(mask, values["fixed"] if given == "fixed" else None).solve(
        0.5,
        values["residual"] if given == "residual" else None,
        values["gradient"] if given == "gradient" else None,
    )
    torch.testing.assert_close(x, dense_solution(R, K, 0.5, mask, **values), **CLOSE)


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_inverse_diagonal_is_that_of_the_submatrix(which, seed):
    H, R, K, g = system(KINDS, seed)
    mask = mask_of(which, len(K), g)
    for mu in (0.01, 2.0):
        expected = torch.zeros(len(K)).double()
        dense = (R.T @ R + mu * K)[mask][:, mask]
        expected[mask] = torch.linalg.inv(dense).diagonal()
        torch.testing.assert_close(H.restrict(mask).inverse_diagonal(mu), expected, **CLOSE)


def test_inverse_diagonal_stays_positive_where_rows_drown_the_rest():
    # One row of 1e5 against a diagonal of 1e-3, in float32: the difference is all rounding.
    H = LowRankPlusBlocks([torch.full((1, 1), 1e5)], [DiagonalBlock(torch.full((1,), 1e-3))])
    assert float(H.restrict(torch.ones(1, dtype=torch.bool)).inverse_diagonal(1.0)) > 0


def test_fixed_values_inside_the_mask_are_not_used():
    H, _, K, g = system(KINDS, 0)
    mask = mask_of("some", len(K), g)
    fixed = torch.randn(len(K), generator=g, dtype=torch.float64)
    other = torch.where(mask, float("nan"), fixed)
    assert torch.equal(H.restrict(mask, fixed).solve(1.0), H.restrict(mask, other).solve(1.0))


def test_small_matrices_factored_a_few_at_a_time_give_the_same(monkeypatch):
    H, _, K, g = system(("block-kronecker", "kronecker"), 0)
    mask = mask_of("some", len(K), g)
    gradient = torch.randn(len(K), generator=g, dtype=torch.float64)
    whole = H.restrict(mask).solve(1.0, None, gradient)
    monkeypatch.setattr("hesscurv.linalg.woodbury._BYTES_AT_ONCE", 1)
    torch.testing.assert_close(H.restrict(mask).solve(1.0, None, gradient), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiagonalBlock(torch.tensor([1.0, 0.0])), "positive and finite"),
        (lambda: DiagonalBlock(torch.tensor([1.0, float("nan")])), "positive and finite"),
        (lambda: KroneckerBlock(torch.eye(2), torch.tensor([-1.0]), 1.0), "not negative"),
        (lambda: KroneckerBlock(torch.eye(2) / 0, torch.ones(1), 1.0), "finite covariance"),
        (lambda: KroneckerBlock(torch.eye(2), torch.ones(1), 0.0), "positive damping"),
    ],
)
def test_blocks_that_are_not_positive_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_that_do_not_fit_the_blocks_are_refused():
    block = DiagonalBlock(torch.ones(3))
    with pytest.raises(ValueError, match="expected rows"):
        LowRankPlusBlocks([torch.ones(2, 4)], [block])
    with pytest.raises(ValueError, match="expected rows"):
        LowRankPlusBlocks([torch.ones(2, 3), torch.ones(1, 3)], [block, block])
    with pytest.raises(ValueError, match="finite rows"):
        LowRankPlusBlocks([torch.full((2, 3), float("inf"))], [block])


def test_the_damping_is_at_least_what_the_dtype_needs():
    ones, scale = torch.ones(300, 300), torch.tensor([1.0, 0.0])
    block = KroneckerBlock(ones, scale, 1e-9)
    x = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
    (found,), diagonal = block.solve(torch.ones(600, dtype=torch.bool), x)
    assert bool(found.isfinite().all())
    assert bool((diagonal > 0).all())
    # Solved for the matrix that it multiplies with: of condition 1 / (10 eps), to some percent.
    back = torch.stack([block.multiply(row) for row in found])
    assert float((back - x).norm() / x.norm()) < 0.2
    exact = KroneckerBlock(ones.double(), scale.double(), 1e-9)
    assert float(exact.diagonal()[-1]) == 1e-9
