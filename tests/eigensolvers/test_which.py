"""Ends of the spectrum: the largest magnitudes, the largest values, the smallest."""

import warnings

import pytest
import torch

import hesscurv


def planted(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    )[0]
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


def wanted(values, which, k):
    if which == "LM":
        return values[values.abs().argsort(descending=True)][:k]
    return values.sort(descending=which == "LA").values[:k]


SPECTRA = {
    "both signs": torch.cat([torch.linspace(1, 20, 40), -torch.linspace(0.5, 30, 80)]).double(),
    "few positive": torch.cat([torch.tensor([3.0, 2.0]), -torch.linspace(0.1, 50, 100)]).double(),
    "repeated": torch.cat([torch.full((7,), 4.0), torch.full((5,), -6.0), torch.rand(90)]).double(),
    "negative": -torch.linspace(0.1, 10, 60).double(),
}


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_wanted_end_is_found_in_its_order(name, which):
    values = SPECTRA[name]
    pairs = hesscurv.eigsh(planted(values), k=6, which=which, tol=1e-6)
    assert bool(pairs.converged.all())
    expected = wanted(values, which, 6)
    # An eigenvalue errs by less than its residual, at most 1e-6 of the largest magnitude.
    scale = float(values.abs().max())
    assert float((pairs.eigenvalues - expected).abs().max()) < 1e-6 * scale


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_what_is_called_converged_was_not_missed(which):
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        i = torch.arange(1, 401, dtype=torch.float64)
        signs = torch.where(torch.rand(400, generator=generator) < 0.4, -1.0, 1.0).double()
        values = 20 * i**-0.9 * signs
        values[10 : 10 + seed] = values[10].clone()  # repeated up to 14 times
        matrix = torch.diag(values[torch.randperm(400, generator=generator)])
        pairs = hesscurv.eigsh(matrix, k=20, which=which, tol=1e-3, block_size=1 + seed % 4)
        expected = wanted(values, which, 20)
        gaps = (pairs.eigenvalues - expected).abs()[pairs.converged]
        assert float(gaps.max()) <= 2e-3 * float(values.abs().max())
        assert bool(pairs.converged.all())


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("method", ["single_pass", "rayleigh_ritz"])
def test_sketches_return_the_wanted_end_in_its_order(method, which):
    values = torch.cat(
        [torch.tensor([9.0, 8, -9.5, -8.5]), 1e-4 * torch.linspace(-1, 1, 76)]
    ).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        pairs = hesscurv.eigsh(planted(values), k=2, method=method, which=which)
    # Four vectors see all but what is a hundred-thousandth of these, and err by about as much.
    assert float((pairs.eigenvalues - wanted(values, which, 2)).abs().max()) < 1e-2


def test_another_end_is_refused_by_name():
    with pytest.raises(ValueError, match=r"expected which to be .*LM.*LA.*SA.*got 'BE'"):
        hesscurv.eigsh(torch.eye(8), k=2, which="BE")


def test_auto_is_block_krylov():
    matrix = planted(SPECTRA["both signs"])
    first, second = (hesscurv.eigsh(matrix, k=4, method=m) for m in ("auto", "block_krylov"))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert first.method == "block_krylov"


def test_a_checkpoint_is_of_one_end(tmp_path):
    matrix = planted(SPECTRA["both signs"])
    first = hesscurv.eigsh(matrix, k=4, which="LA", checkpoint=tmp_path)
    again = hesscurv.eigsh(matrix, k=4, which="LA", checkpoint=tmp_path)
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    with pytest.raises(ValueError, match="which"):
        hesscurv.eigsh(matrix, k=4, which="SA", checkpoint=tmp_path)


@pytest.mark.parametrize("block_size", [None, 1, 3])
@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
def test_searches_may_fill_the_whole_space(which, block_size):
    """Where all that is outside has been drawn at random already, it is expanded."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        inner = torch.rand(40, generator=generator).double() * 9 - 4.5
        values = torch.cat([torch.full((10,), -5.0), torch.full((10,), 5.0), inner]).double()
        options = {} if block_size is None else {"block_size": block_size}
        pairs = hesscurv.eigsh(planted(values, seed), k=11, which=which, **options)
        assert bool(pairs.converged.all())
        expected = wanted(values, which, 11)
        # LM: of equal magnitudes either sign may come first.
        gaps = (pairs.eigenvalues.abs() - expected.abs()).abs()
        assert float(gaps.max()) < 1e-3 * 5  # tol |lambda|


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("method", ["single_pass", "rayleigh_ritz"])
@pytest.mark.parametrize(
    "values",
    [[3, 2, 1, 0, 0, 0, 0, -1, -2, -3], [3, -2, 1, 1e-17, -1e-17, 0, 0, -1e-9, 1e-9, 0.5]],
)
def test_a_sketch_of_the_whole_range_has_nothing_outside(values, method, which):
    values = torch.tensor(values, dtype=torch.float64)
    pairs = hesscurv.eigsh(torch.diag(values), k=10, method=method, which=which)
    assert bool(pairs.converged.all())
    # Rounding: some eps of the largest magnitude, 3.
    torch.testing.assert_close(
        pairs.eigenvalues.sort().values, values.sort().values, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("method", ["single_pass", "rayleigh_ritz"])
def test_where_the_sketch_has_all_no_more_measurements_are_asked_for(method):
    """Residuals of noisy products: what helps is another dtype, not a wider basis."""

    class Noisy(hesscurv.LinearOperator):
        generator = torch.Generator().manual_seed(0)

        def _matmat(self, vectors_DB):
            noise = torch.randn(vectors_DB.shape, generator=self.generator, dtype=self.dtype)
            return 2 * vectors_DB + 0.1 * noise

    H = Noisy(12, torch.float64, torch.device("cpu"))
    with pytest.warns(hesscurv.ConvergenceWarning, match=r"more measurements cannot help.*float64"):
        hesscurv.eigsh(H, k=12, method=method)
