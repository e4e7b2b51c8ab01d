"""The noise of products, as a Krylov space estimates it from the asymmetry of its projection."""

import math

import pytest
import torch
from planted import indefinite, planted

from hesscurv.eigensolvers.krylov import block_krylov
from hesscurv.eigensolvers.krylov.space import KrylovSpace
from hesscurv.operators.matrix_operators import DenseOperator

DIM = 400


class Noisy(DenseOperator):
    """Products with errors of a norm, in directions that are drawn anew each time."""

    def __init__(self, matrix, norm, seed):
        super().__init__(matrix)
        self.norm, self.generator = norm, torch.Generator().manual_seed(seed)

    def _matmat(self, vectors_DB):
        out = super()._matmat(vectors_DB)
        noise = torch.randn(out.shape, generator=self.generator, dtype=out.dtype)
        return out + self.norm / math.sqrt(len(out)) * noise


def estimated(H, block, monkeypatch, **options):
    """What the last space of a solve says of the products' noise."""
    spaces = []

    class Kept(KrylovSpace):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            spaces.append(self)

    monkeypatch.setattr(block_krylov, "KrylovSpace", Kept)
    with pytest.warns(Warning, match="noise"):
        block_krylov.block_krylov(H, 10, tol=1e-9, block_size=block, max_matvecs=200, **options)
    return spaces[-1].noise


# Estimated are medians of root mean squares over some hundred entries each: 5 % of chance.
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("block", [4, 10])
@pytest.mark.parametrize("norm", [1e-5, 1e-3])
def test_noise_of_a_known_size_is_estimated_within_15_per_cent(norm, block, seed, monkeypatch):
    A = planted(indefinite(60), DIM, seed).matrix
    assert estimated(Noisy(A, norm, seed), block, monkeypatch) == pytest.approx(norm, rel=0.15)
