import math

import pytest
import torch

from hesscurv.eigensolvers.eigenpairs import Eigenpairs


def _random_basis(dim, rank, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.to(dtype)


def _bases_at_angles(angles, dim, seed=0):
    """Two bases whose principal angles are the given ones, in random position and bases."""
    angles = torch.as_tensor(angles, dtype=torch.float64)
    rank = len(angles)
    frame = _random_basis(dim, 2 * rank, seed)
    first, second = frame[:, :rank], frame[:, rank:]
    tilted = first * angles.cos() + second * angles.sin()
    return first @ _random_basis(rank, rank, seed + 1), tilted @ _random_basis(rank, rank, seed + 2)


def _as_pairs(basis, layout=None):
    rank = basis.shape[1]
    return Eigenpairs(
        eigenvalues=torch.arange(rank, 0, -1, dtype=basis.dtype),
        eigenvectors=basis,
        residuals=torch.zeros(rank, dtype=basis.dtype),
        converged=torch.ones(rank, dtype=torch.bool),
        num_matvecs=rank,
        layout=layout,
    )


def _mask_of(dim, kept):
    mask = torch.zeros(dim, dtype=torch.bool)
    mask[torch.as_tensor(kept)] = True
    return mask


@pytest.fixture
def random_basis():
    return _random_basis


@pytest.fixture
def bases_at_angles():
    return _bases_at_angles


@pytest.fixture
def as_pairs():
    return _as_pairs


@pytest.fixture
def mask_of():
    return _mask_of


@pytest.fixture
def one_hot():
    """The orthonormal basis that a mask stands for."""
    return lambda mask: torch.eye(len(mask), dtype=torch.float64)[:, mask]


@pytest.fixture
def in_small_blocks(monkeypatch):
    """Let every loop over rows take many blocks, the last of them ragged."""
    monkeypatch.setattr("hesscurv.metrics.subspace._BLOCK_ENTRIES", 1)


@pytest.fixture
def maxima():
    """The distances of orthogonal spaces of rank k, by name."""
    return lambda k: {
        "geodesic": math.sqrt(k) * math.pi / 2,
        "chordal_2": math.sqrt(2),
        "chordal_f": math.sqrt(2 * k),
        "projection_2": 1.0,
        "projection_f": math.sqrt(k),
        "fubini_study": math.pi / 2,
    }
