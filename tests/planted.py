"""Dense operators with a planted spectrum, and the checks that all eigensolvers share."""

import torch

from hesscurv.operators.linear_operator import LinearOperator


class PlainOperator(LinearOperator):
    """H given as a matrix, which is not checked."""

    def __init__(self, matrix):
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, vectors):
        return self.matrix @ vectors


def planted(eigenvalues, dim, seed=0, dtype=torch.float64):
    """H with these eigenvalues and dim - len(eigenvalues) zeros, in a random basis."""
    generator = torch.Generator().manual_seed(1000 + seed)
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    matrix = torch.randn(dim, len(values), generator=generator, dtype=torch.float64)
    V = torch.linalg.qr(matrix).Q
    H = (V * values) @ V.mT
    return PlainOperator(((H + H.mT) / 2).to(dtype))


def indefinite(rank):
    """Decaying eigenvalues of both signs: 10, -10/2, 10/3, ..."""
    index = torch.arange(1, rank + 1, dtype=torch.float64)
    return 10 / index * (1 - 2 * ((index - 1) % 2))


def by_magnitude(eigenvalues):
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    return values[values.abs().argsort(descending=True, stable=True)]


def assert_valid(pairs, H, tolerance=1e-12):
    """What holds for any result, accurate or not: orthonormal, sorted, residuals as stated."""
    k = len(pairs)
    V, values = pairs.eigenvectors.double(), pairs.eigenvalues.double()
    assert pairs.eigenvectors.dtype == pairs.eigenvalues.dtype == H.dtype
    assert (V.mT @ V - torch.eye(k)).abs().max() <= tolerance
    assert (values.abs().diff() <= 0).all()
    assert pairs.num_matvecs == H.num_matvecs
    gaps = (H.matrix.double() @ V - V * values).norm(dim=0)
    scale = H.matrix.double().norm()
    torch.testing.assert_close(pairs.residuals.double(), gaps, rtol=1e-4, atol=tolerance * scale)
