"""Where the basis lives, and in which dtype, changes a result's rounding and nothing else."""

import logging
import warnings

import cases
import pytest
import torch
from planted import by_magnitude, indefinite, planted

import hesscurv

K, DIM = 20, 1000
EIGENVALUES = indefinite(200)

# Largest residual of a pair relative to its eigenvalue, with room above what was measured: rounding
# to 11 and 8 bits, and its growth along the spectrum.
ROUNDED = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def solve(H, **options):
    return hesscurv.eigsh(H, K, **{"tol": 1e-5, "block_size": 5, **options})


def true_residuals(H, pairs):
    V, values = pairs.eigenvectors.double(), pairs.eigenvalues.double()
    return (H.matrix.double() @ V - V * values).norm(dim=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("max_basis", [None, K + 20])
def test_a_basis_on_disk_gives_the_pairs_of_one_in_memory(seed, max_basis, tmp_path, monkeypatch):
    monkeypatch.setattr("hesscurv.storage.placement._MAPPED_ROWS", 3)  # several pieces of a slab
    H = planted(EIGENVALUES, DIM, seed)
    near, far = (solve(H, storage=s, max_basis=max_basis) for s in ("device", tmp_path))
    torch.testing.assert_close(far.eigenvalues, near.eigenvalues, rtol=1e-12, atol=0)
    assert far.num_matvecs == near.num_matvecs
    assert hesscurv.overlap(near, far) > 1 - 1e-9
    assert far.info["storage"] == "disk"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("max_basis", [None, K + 20])
def test_half_precision_storage_costs_digits_as_stated(seed, dtype, max_basis, tmp_path):
    H = planted(EIGENVALUES, DIM, seed, dtype=torch.float32)
    tol = 4 * ROUNDED[dtype]
    pairs = solve(H, storage=tmp_path, storage_dtype=dtype, max_basis=max_basis, tol=tol)
    assert pairs.eigenvectors.dtype == dtype
    assert pairs.eigenvalues.dtype == torch.float32
    assert bool(pairs.converged.all())
    gaps = true_residuals(H, pairs)
    assert bool((gaps <= tol * pairs.eigenvalues.abs()).all())
    # Estimated residuals tell the rounding: never less than half of what is there.
    assert bool((gaps <= 2 * pairs.residuals).all())
    # Ritz values err by the square of the residuals over gaps.
    expected = by_magnitude(EIGENVALUES)[:K].float()
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=tol / 4, atol=0)


@pytest.mark.parametrize("method", ["single_pass", "rayleigh_ritz"])
def test_a_sketch_on_disk_is_the_one_in_memory(method, tmp_path):
    H = planted(EIGENVALUES, DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        near, far = (hesscurv.eigsh(H, K, method, storage=s) for s in ("device", tmp_path))
    assert torch.equal(far.eigenvalues, near.eigenvalues)
    assert torch.equal(far.eigenvectors, near.eigenvectors)


@pytest.mark.parametrize("method", ["single_pass", "rayleigh_ritz", "block_krylov"])
def test_what_cannot_fit_is_refused_before_the_first_product(method, monkeypatch):
    H = planted(EIGENVALUES, DIM)
    monkeypatch.setattr("hesscurv.storage.placement._free", lambda *_: 10 * 8 * DIM)
    with pytest.raises(ValueError, match="fits nowhere"):
        hesscurv.eigsh(H, K, method, storage="device")
    assert H.num_matvecs == 0


def test_half_precision_cannot_reach_a_tolerance_beyond_it_and_says_so():
    H = planted(EIGENVALUES, DIM, dtype=torch.float32)
    with pytest.warns(hesscurv.ConvergenceWarning, match="noise"):
        pairs = solve(H, storage_dtype=torch.bfloat16, tol=1e-4)
    assert not bool(pairs.converged.any())
    assert pairs.num_matvecs < 20 * K


def test_float16_is_eight_times_as_accurate_as_bfloat16():
    H = planted(EIGENVALUES, DIM, dtype=torch.float32)
    low, high = (
        true_residuals(H, solve(H, storage_dtype=dtype, tol=5e-3, max_matvecs=150))
        .div(EIGENVALUES[:K].abs())
        .median()
        for dtype in (torch.float16, torch.bfloat16)
    )
    assert 5 < high / low < 12


def test_the_plan_is_logged_and_in_the_result(caplog):
    H = planted(EIGENVALUES, DIM)
    with caplog.at_level(logging.INFO, "hesscurv"):
        pairs = solve(H, max_basis=70)
    assert "up to 70 vectors of 1,000 entries in float64: 0.00056 GB on cpu" in caplog.text
    assert pairs.info["planned_bytes"] == 70 * DIM * 8
    assert (pairs.info["storage"], pairs.info["storage_dtype"]) == ("device", "float64")


def test_the_plan_is_shown_with_the_progress_bar(terminal):
    solve(planted(EIGENVALUES, DIM), progress=True)
    shown = terminal.readouterr()
    assert "basis of up to" in shown.out + shown.err


def test_a_result_half_precision_works_with_metrics_and_files(tmp_path):
    H = planted(EIGENVALUES, DIM, dtype=torch.float32)
    pairs = solve(H, storage_dtype=torch.float16, tol=1e-2)
    exact = solve(H)
    assert hesscurv.overlap(pairs, exact) == pytest.approx(1, abs=1e-3)
    pairs.save(tmp_path / "pairs.pt")
    again = hesscurv.Eigenpairs.load(tmp_path / "pairs.pt")
    assert torch.equal(again.eigenvectors, pairs.eigenvectors)
    warm = solve(H, initial=pairs, tol=1e-4)
    torch.testing.assert_close(warm.eigenvalues, exact.eigenvalues, rtol=1e-5, atol=1e-5)


def test_a_small_basis_stays_where_little_is_free(monkeypatch):
    """What is set aside is what products take, not the budget that they would have to keep to."""
    monkeypatch.setattr("hesscurv.linalg.device_memory.device_memory", lambda device: 8 << 30)
    problem = cases.build("mlp")
    H = problem.operator(hesscurv.HessianOperator)
    assert H.objective.budget == 1 << 30
    assert 0 < H.memory_needed(4) < H.memory_needed(16) < 1 << 20
    monkeypatch.setattr("hesscurv.storage.placement.free_memory", lambda device: 64 << 20)
    assert hesscurv.eigsh(H, 3).info["storage"] == "device"
