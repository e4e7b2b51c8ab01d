"""Eigenpairs from a folder of measurements, and the same in one process."""

import torch

from hesscurv import measure
from hesscurv.eigensolvers import single_pass


def whole(H, k, **options):
    return single_pass(H, k, residuals=False, **options)


def filled(H, folder, **options):
    """A folder with all measurements for k = 10: 20 + 20, five chunks of 4 and five."""
    options = {"block_size": 4, **options}
    assert measure(H, 10, folder, **options) == []
    return sorted(folder.glob("*.npz"))


def assert_same(a, b, tolerance=0.0):
    """Equal to the last bit, or, with the eigenvectors' projectors, up to a tolerance."""
    if tolerance == 0.0:
        assert torch.equal(a.eigenvalues, b.eigenvalues)
        assert torch.equal(a.eigenvectors, b.eigenvectors)
        return
    torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=0, atol=tolerance)
    projectors = [pairs.eigenvectors @ pairs.eigenvectors.mT for pairs in (a, b)]
    torch.testing.assert_close(*projectors, rtol=0, atol=tolerance)
