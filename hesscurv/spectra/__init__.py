"""Stochastic estimates for a symmetric operator: spectral density, trace and diagonal."""

from hesscurv.spectra.diagonal import DiagonalEstimate, diagonal
from hesscurv.spectra.spectral_density import Estimate, SpectralDensity, spectral_density
from hesscurv.spectra.trace import TraceEstimate, trace

__all__ = [
    "DiagonalEstimate",
    "Estimate",
    "SpectralDensity",
    "TraceEstimate",
    "diagonal",
    "spectral_density",
    "trace",
]
