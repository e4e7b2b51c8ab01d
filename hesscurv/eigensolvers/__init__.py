"""Eigensolvers for the top eigenpairs of a symmetric operator known by its products."""

from hesscurv.eigensolvers.block_krylov import block_krylov
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.eigsh import eigsh
from hesscurv.eigensolvers.error_bounds import ErrorEstimate, a_posteriori_error
from hesscurv.eigensolvers.measurements import assemble, measure, missing
from hesscurv.eigensolvers.rayleigh_ritz import rayleigh_ritz
from hesscurv.eigensolvers.residuals import ConvergenceWarning
from hesscurv.eigensolvers.single_pass import single_pass

__all__ = [
    "ConvergenceWarning",
    "Eigenpairs",
    "ErrorEstimate",
    "a_posteriori_error",
    "assemble",
    "block_krylov",
    "eigsh",
    "measure",
    "missing",
    "rayleigh_ritz",
    "single_pass",
]
