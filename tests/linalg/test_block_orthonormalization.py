import pytest
import torch

from hesscurv.linalg.block_norms import BlockSize
from hesscurv.linalg.orthogonalization import complete_, orthonormalize_, orthonormalize_against_
from hesscurv.linalg.projections import inner_products, project_out_

DTYPES = [torch.float32, torch.float64]
# Rounding of entries, of sums and of the transformation: a few eps each.
FEW_EPS = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.fixture(params=["looking", "ahead"], autouse=True)
def order(request, monkeypatch):
    """Both ways: the host looks at each number, or, as on a GPU, at none before the first pass."""
    if request.param == "ahead":
        monkeypatch.setattr(BlockSize, "is_read", property(lambda size: size._read is not None))


def deviation(Q_rD):
    """Largest entry of |Q^T Q - I|, itself summed in float64 in short pieces."""
    pieces = Q_rD.double().split(512, dim=1)
    gram = sum(piece @ piece.mT for piece in pieces)
    return (gram - torch.eye(len(Q_rD))).abs().max().item()


def random_orthonormal(m, dim, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(dim, m, dtype=torch.float64)).Q.mT.contiguous().to(dtype)


def block_of_condition(b, dim, condition, dtype=torch.float64):
    """b dense vectors with singular values from 1 to 1 / condition, evenly in the exponent."""
    sigma = torch.logspace(0, -float(torch.tensor(condition).log10()), b, dtype=torch.float64)
    left = random_orthonormal(b, b)
    return ((left * sigma) @ random_orthonormal(b, dim)).to(dtype)


def assert_factored(W_BD, Q_rD, R_rb, tolerance):
    assert (R_rb.mT @ Q_rD.double() - W_BD.double()).norm() <= tolerance * W_BD.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "dim"), [(1, 1), (1, 5), (5, 5), (7, 4096), (12, 4097), (3, 10_000), (64, 9000)]
)
def test_the_result_is_orthonormal_and_factors_the_block(b, dim, dtype):
    W = torch.randn(b, dim, dtype=dtype)
    Q, R = orthonormalize_(W.clone())
    assert Q.shape == (b, dim)
    assert R.shape == (b, b)
    assert R.dtype == torch.float64
    assert deviation(Q) <= FEW_EPS[dtype]
    assert_factored(W, Q, R, FEW_EPS[dtype])


def test_a_well_conditioned_block_gets_a_triangular_factor_like_qr():
    W = torch.randn(6, 500, dtype=torch.float64)
    Q, R = orthonormalize_(W.clone())
    expected_Q, expected_R = torch.linalg.qr(W.mT)
    signs = expected_R.diagonal().sign()
    torch.testing.assert_close(R, signs[:, None] * expected_R)
    torch.testing.assert_close(Q.mT, expected_Q * signs)


@pytest.mark.parametrize("b", [4, 40])
@pytest.mark.parametrize(
    ("dtype", "condition"),
    [(torch.float32, 10.0**i) for i in (2, 4, 5, 6)]
    + [(torch.float64, 10.0**i) for i in (4, 8, 12, 14)],
)
def test_an_ill_conditioned_block_keeps_its_rank(b, dtype, condition):
    W = block_of_condition(b, 3000, condition, dtype)
    Q, R = orthonormalize_(W.clone())
    assert len(Q) == b
    assert deviation(Q) <= FEW_EPS[dtype]
    assert_factored(W, Q, R, FEW_EPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "rank"), [(2, 1), (16, 5), (100, 99), (40, 1)])
def test_dependent_vectors_are_dropped(b, rank, dtype):
    # Products of entries that are exact in float32, so that the rank is exact too.
    W = torch.randint(-3, 4, (b, rank)).to(dtype) @ torch.randint(-9, 10, (rank, 5000)).to(dtype)
    Q, R = orthonormalize_(W.clone())
    assert len(Q) == torch.linalg.matrix_rank(W.double())
    assert deviation(Q) <= FEW_EPS[dtype]
    assert_factored(W, Q, R, 4 * FEW_EPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_vectors_than_dimensions_give_a_basis_of_the_space(dtype):
    W = torch.randn(30, 7, dtype=dtype)
    Q, R = orthonormalize_(W.clone())
    assert Q.shape == (7, 7)
    assert deviation(Q) <= FEW_EPS[dtype]
    assert_factored(W, Q, R, FEW_EPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors_are_dropped(dtype):
    W = torch.randn(5, 800, dtype=dtype)
    W[[1, 4]] = 0
    Q, R = orthonormalize_(W.clone())
    assert len(Q) == 3
    assert R[:, [1, 4]].abs().max() == 0
    Q, R = orthonormalize_(torch.zeros(4, 800, dtype=dtype))
    assert Q.shape == (0, 800)
    assert R.shape == (0, 4)


def test_an_empty_block_stays_empty():
    Q, R = orthonormalize_(torch.zeros(0, 8))
    assert Q.shape == (0, 8)
    assert R.shape == (0, 0)


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e25, 1e37])
def test_the_scale_does_not_matter_though_squares_leave_the_range_of_float32(scale):
    W = torch.randn(8, 2000).clamp(-4, 4) * scale / 4
    Q, R = orthonormalize_(W.clone())
    assert len(Q) == 8
    assert deviation(Q) <= FEW_EPS[torch.float32]
    # 1e-36 / 4 times a small normal number is subnormal, with fewer digits; hence not a few eps.
    assert_factored(W, Q, R, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_directions_at_or_below_the_floor_are_dropped(dtype):
    sigma = torch.tensor([4.0, 1.0, 1e-2, 1e-3], dtype=torch.float64)
    W = ((random_orthonormal(4, 4) * sigma) @ random_orthonormal(4, 900)).to(dtype)
    Q, R = orthonormalize_(W.clone(), floor=5e-3)
    assert len(Q) == 3
    torch.testing.assert_close(torch.linalg.svdvals(R), sigma[:3], rtol=0, atol=5e-3)
    error = torch.linalg.matrix_norm(R.mT @ Q.double() - W.double(), ord=2)
    assert error <= 5e-3


@pytest.mark.parametrize(("b", "dim"), [(4, 1_000_000), (16, 300_000)])
def test_long_float32_vectors_are_orthonormal_to_rounding(b, dim):
    # A plain float32 product of this shape is off by up to 6e-5.
    Q, _ = orthonormalize_(torch.randn(b, dim))
    assert deviation(Q) <= 3e-7


def test_the_work_is_done_in_place():
    W = torch.randn(6, 700)
    Q, _ = orthonormalize_(W)
    assert Q.data_ptr() == W.data_ptr()
    assert Q.is_contiguous()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_entries_that_are_not_finite_are_refused(bad):
    W = torch.randn(3, 100)
    W[1, 50] = bad
    with pytest.raises(ValueError, match="expected finite vectors"):
        orthonormalize_(W)


def test_wrong_dtypes_and_shapes_are_refused():
    with pytest.raises(TypeError, match="expected float32 or float64 vectors"):
        orthonormalize_(torch.zeros(3, 10, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"expected a block of shape \(b, D\), got \(10,\)"):
        orthonormalize_(torch.zeros(10))
    with pytest.raises(ValueError, match=r"slabs of shape \(m, 10\).*got \(2, 9\)"):
        project_out_(torch.zeros(3, 10), [torch.zeros(2, 9)])


def nasty_blocks(basis, dtype):
    """Blocks that lose most of their norm, or most of their rank, when the basis is taken out."""
    m, dim = basis.shape
    inside = torch.randn(12, m, dtype=torch.float64) @ basis.double() / m**0.5
    outside = torch.randn(12, dim, dtype=torch.float64) / dim**0.5
    small = {torch.float32: (1e-3, 1e-5, 1e-6), torch.float64: (1e-6, 1e-10, 1e-14)}[dtype]
    blocks = {f"inside but {size:g}": inside + size * outside for size in small}
    common = torch.randn(12, 1, dtype=torch.float64) @ outside[:1]
    blocks["inside and parallel"] = inside + small[0] * (common + small[0] * outside)
    blocks["graded"] = torch.logspace(0, -20, 12, dtype=torch.float64)[:, None] * (inside + outside)
    blocks["mostly inside"] = torch.cat([inside[:9], outside[:3]])
    blocks["repeated"] = outside[:3].repeat(4, 1) + inside[:3].repeat(4, 1)
    blocks["in the basis"] = basis[:12].double()
    blocks["inside"] = inside
    blocks["outside"] = outside
    return {name: block.to(dtype) for name, block in blocks.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [12, 300])
def test_nasty_blocks_come_out_orthonormal_to_the_basis_and_within(m, dtype):
    basis, _ = orthonormalize_(torch.randn(m, 6000, dtype=dtype))
    for name, W in nasty_blocks(basis, dtype).items():
        Q, C, R = orthonormalize_against_(W.clone(), [basis[:5], basis[5:]])
        if len(Q):
            assert deviation(Q) <= FEW_EPS[dtype], name
            assert inner_products(basis, Q).abs().max() <= FEW_EPS[dtype], name
        # W = B C + Q R, up to the directions that were dropped: within (4 + sqrt(m) / 2) eps each.
        rebuilt = C.mT @ basis.double() + R.mT @ Q.double()
        assert (rebuilt - W.double()).norm() <= 12 * FEW_EPS[dtype] * W.double().norm(), name
        torch.testing.assert_close(
            C, inner_products(basis, W), rtol=0, atol=2 * FEW_EPS[dtype] * W.norm().item()
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [12, 300])
def test_the_rank_is_that_of_what_the_basis_leaves(m, dtype):
    basis, _ = orthonormalize_(torch.randn(m, 6000, dtype=dtype))
    ranks = {
        name: len(orthonormalize_against_(W.clone(), [basis])[0])
        for name, W in nasty_blocks(basis, dtype).items()
    }
    assert ranks["outside"] == 12
    assert ranks["mostly inside"] == 3
    assert ranks["repeated"] == 3
    assert ranks["inside"] == 0
    assert ranks["in the basis"] == 0
    smallest_kept = {torch.float32: "inside but 1e-05", torch.float64: "inside but 1e-10"}[dtype]
    assert ranks[smallest_kept] == 12


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_twice_leaves_nothing_of_the_basis(dtype):
    basis, _ = orthonormalize_(torch.randn(50, 5000, dtype=dtype))
    W = torch.randn(8, 50, dtype=dtype) @ basis + 1e-5 * torch.randn(8, 5000, dtype=dtype)
    left = W.clone()
    C = project_out_(left, [basis[:20], basis[20:]])
    cosines = inner_products(basis, left).abs() / left.norm(dim=1).double()
    assert cosines.max() <= FEW_EPS[dtype]
    rebuilt = C.mT @ basis.double() + left.double()
    assert (rebuilt - W.double()).norm() <= FEW_EPS[dtype] * W.double().norm()


def test_projection_on_no_basis_changes_nothing():
    W = torch.randn(3, 40)
    left = W.clone()
    assert project_out_(left, []).shape == (0, 3)
    assert torch.equal(left, W)


def test_a_basis_may_be_stored_in_another_dtype():
    basis = random_orthonormal(10, 5000)
    W = torch.randn(4, 5000)
    slabs = [basis[:6], basis[6:].float()]
    Q, C, _ = orthonormalize_against_(W.clone(), slabs)
    assert inner_products(basis.float(), Q).abs().max() <= FEW_EPS[torch.float32]
    torch.testing.assert_close(C, basis @ W.double().mT, rtol=0, atol=1e-4)


def test_a_float32_basis_grown_to_2000_vectors_is_orthonormal_to_1e_5():
    dim, m, b = 5000, 2000, 50
    basis = torch.empty(m, dim)
    # Each block is a smooth function of the last one, as in a Krylov space: they turn parallel.
    weights = torch.linspace(0, 1, dim) ** 8
    block = torch.randn(b, dim)
    for start in range(0, m, b):
        Q, _, _ = orthonormalize_against_(block, [basis[:start]])
        if len(Q) < b:
            fill = torch.randn(b, dim)
            fill[: len(Q)] = Q
            Q, _, _ = orthonormalize_against_(fill, [basis[:start]])
        basis[start : start + b] = Q
        block = weights * Q
    assert deviation(basis) <= 1e-6  # the promise is 1e-5


@pytest.mark.parametrize(("rank", "m", "dim"), [(0, 3, 3), (0, 1, 1), (4, 9, 500), (9, 10, 10)])
def test_completing_a_basis_keeps_it_and_adds_orthonormal_directions(rank, m, dim):
    basis = torch.zeros(m, dim, dtype=torch.float64)
    basis[:rank] = random_orthonormal(rank, dim) if rank else 0
    before = basis.clone()
    complete_(basis, rank, torch.Generator().manual_seed(1))
    assert torch.equal(basis[:rank], before[:rank])
    assert deviation(basis) <= 1e-14
    with pytest.raises(ValueError, match="expected at most"):
        complete_(torch.zeros(4, 3), 0, torch.Generator())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 4095, 4096, 4097, 20_000])
def test_inner_products_agree_with_float64(dim, dtype):
    A, B = torch.randn(5, dim, dtype=dtype), torch.randn(3, dim, dtype=dtype)
    result = inner_products(A, B)
    assert result.dtype == torch.float64
    expected = A.double() @ B.double().mT
    tolerance = FEW_EPS[dtype] * dim  # of the norms, each about sqrt(dim)
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)
