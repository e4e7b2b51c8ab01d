"""Matrix-free eigensolvers for the top eigenpairs of a symmetric operator."""

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.eigsh import eigsh
from hesscurv.eigensolvers.error_bounds import ErrorEstimate, a_posteriori_error
from hesscurv.eigensolvers.krylov.block_krylov import block_krylov
from hesscurv.eigensolvers.residuals import ConvergenceWarning
from hesscurv.eigensolvers.sample_space.sample_space import SampleSpace
from hesscurv.eigensolvers.sketch.measurements import assemble, measure, missing
from hesscurv.eigensolvers.sketch.single_pass import single_pass
from hesscurv.eigensolvers.sketch.two_pass import rayleigh_ritz

__all__ = [
    "ConvergenceWarning",
    "Eigenpairs",
    "ErrorEstimate",
    "SampleSpace",
    "a_posteriori_error",
    "assemble",
    "block_krylov",
    "eigsh",
    "measure",
    "missing",
    "rayleigh_ritz",
    "single_pass",
]
