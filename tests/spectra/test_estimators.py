"""What all estimators of a spectrum share."""

import dataclasses

import pytest
import torch
from planted import PlainOperator, indefinite, planted

from hesscurv.spectra import diagonal, spectral_density, trace

ESTIMATORS = {
    "xtrace": lambda H, **o: trace(H, 12, **o),
    "hutch++": lambda H, **o: trace(H, 12, "hutch++", **o),
    "hutchinson": lambda H, **o: trace(H, 12, "hutchinson", **o),
    "exact trace": lambda H, **o: trace(H, 40, **o),
    "xdiag": lambda H, **o: diagonal(H, 12, **o),
    "bekas": lambda H, **o: diagonal(H, 12, "hutchinson", **o),
    "exact diagonal": lambda H, **o: diagonal(H, 40, **o),
    "density": lambda H, **o: spectral_density(H, 6, 4, **o),
    "density without basis": lambda H, **o: spectral_density(H, 6, 4, reorthogonalize=False, **o),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def numbers(result):
    values = [getattr(result, field.name) for field in dataclasses.fields(result)]
    return [torch.as_tensor(v) for v in values if isinstance(v, (float, int, torch.Tensor))]


def close(one, other, rtol=1e-8):
    assert len(numbers(one)) == len(numbers(other)) > 0
    for a, b in zip(numbers(one), numbers(other), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=1e-9)


class Recording(PlainOperator):
    """Notes the sizes of the blocks, and what was said to be expected."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.blocks, self.expected = [], []

    def expect(self, products):
        assert not self.blocks
        self.expected.append(products)

    def _matmat(self, vectors):
        self.blocks.append(vectors.shape[1])
        return self.matrix @ vectors


@every_estimator
def test_the_global_generator_is_neither_read_nor_moved(name):
    H = planted(indefinite(40), 40)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = ESTIMATORS[name](H)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    close(ESTIMATORS[name](H), one, rtol=0)


@every_estimator
def test_the_generator_decides(name):
    H = planted(indefinite(40), 40)
    one, same, other = (ESTIMATORS[name](H, generator=seeded(s)) for s in (5, 5, 6))
    close(one, same, rtol=0)
    if "exact" not in name:
        assert not all(torch.equal(a, b) for a, b in zip(numbers(one), numbers(other), strict=True))


@every_estimator
@pytest.mark.parametrize("block_size", [1, 3, 100])
def test_the_block_size_bounds_the_blocks_and_changes_nothing(name, block_size):
    H = Recording(planted(indefinite(40), 40).matrix)
    found = ESTIMATORS[name](H, block_size=block_size)
    assert max(H.blocks) <= block_size
    close(found, ESTIMATORS[name](PlainOperator(H.matrix)))


@every_estimator
def test_the_products_are_announced_and_counted(name):
    H = Recording(planted(indefinite(40), 40).matrix)
    found = ESTIMATORS[name](H)
    assert H.expected == [sum(H.blocks)]
    assert found.num_matvecs == H.num_matvecs == sum(H.blocks)


class Foreign:
    def __init__(self, matrix):
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device
        self._matrix = matrix

    def __matmul__(self, V):
        return self._matrix @ V


@every_estimator
def test_matrices_and_foreign_operators_are_taken(name):
    H = planted(indefinite(40), 40)
    expected = ESTIMATORS[name](H)
    close(ESTIMATORS[name](H.matrix), expected)
    close(ESTIMATORS[name](Foreign(H.matrix)), expected)


@every_estimator
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_that_are_not_finite_are_refused(name, bad):
    matrix = planted(indefinite(40), 40).matrix.clone()
    matrix[7, 3] = bad
    with pytest.raises(ValueError, match="NaN or inf entries"):
        ESTIMATORS[name](PlainOperator(matrix))


@every_estimator
def test_bad_operators_and_options_are_refused_before_any_product(name):
    estimate, H = ESTIMATORS[name], planted(indefinite(40), 40)
    with pytest.raises(TypeError, match="expected an operator"):
        estimate([[1.0]])
    with pytest.raises(ValueError, match="expected a square matrix"):
        estimate(torch.ones(3, 4))
    with pytest.raises(TypeError, match="expected a float32 or float64 operator, got"):
        estimate(H.matrix.half())
    with pytest.raises(ValueError, match="expected block_size >= 1, got 0"):
        estimate(H, block_size=0)
    with pytest.raises(TypeError, match="expected block_size to be an int, got True"):
        estimate(H, block_size=True)
    assert H.num_matvecs == 0


@pytest.mark.parametrize("estimate", [trace, diagonal])
def test_bad_methods_and_numbers_are_refused_before_any_product(estimate):
    H = planted(indefinite(40), 40)
    with pytest.raises(ValueError, match=r"expected method to be one of .* got 'exact'"):
        estimate(H, 10, "exact")
    with pytest.raises(TypeError, match=r"expected num_matvecs to be an int, got 10\.0"):
        estimate(H, 10.0)
    assert H.num_matvecs == 0


@every_estimator
def test_the_bar_shows_all_products(name, terminal):
    ESTIMATORS[name](planted(indefinite(40), 40), progress=True)
    shown = terminal.readouterr().err
    assert "100%" in shown
    ESTIMATORS[name](planted(indefinite(40), 40))
    assert terminal.readouterr().err == ""
