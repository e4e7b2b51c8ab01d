"""The top eigenspace of a network's loss Hessian: compute it, compare it, use it.

Names of tensors end in the letters of their axes, rows first, in the whole library:

- D: all selected parameters, flattened in the model's order; R: this rank's rows of them
- k: eigenpairs that were asked for; r: rank of a preconditioner; m: vectors of a basis, or rows
- B: vectors of a block; c: of a chunk of a sketch; n: samples, or the size of a small matrix

So ``V_Dk`` has eigenvectors as columns, as a user sees them, and ``V_kD`` the same as rows, as they
lie in memory while a basis grows. A digit is a length: ``out_1D`` is a block of one vector.
"""

from hesscurv import hooks, optim, plots, pruning
from hesscurv.distributed import DistributedError
from hesscurv.eigensolvers import (
    ConvergenceWarning,
    Eigenpairs,
    ErrorEstimate,
    SampleSpace,
    a_posteriori_error,
    assemble,
    eigsh,
    measure,
    missing,
)
from hesscurv.metrics import *  # noqa: F403
from hesscurv.metrics import __all__ as _metrics
from hesscurv.operators import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    LinearOperator,
    ParameterLayout,
    SymmetricOperator,
    Task,
    supervised,
)
from hesscurv.spectra import (
    DiagonalEstimate,
    SpectralDensity,
    TraceEstimate,
    diagonal,
    spectral_density,
    trace,
)

__version__ = "0.2.0"

__all__ = [
    # Uses
    "hooks",
    "optim",
    "pruning",
    "plots",
    # Operators
    "HessianOperator",
    "GGNOperator",
    "EmpiricalFisherOperator",
    "LinearOperator",
    "SymmetricOperator",
    "ParameterLayout",
    "Task",
    "supervised",
    # Eigensolver
    "eigsh",
    "Eigenpairs",
    "ConvergenceWarning",
    "a_posteriori_error",
    "ErrorEstimate",
    "SampleSpace",
    # The eigensolver's measurements by independent jobs
    "measure",
    "missing",
    "assemble",
    # Spectra
    "spectral_density",
    "SpectralDensity",
    "trace",
    "TraceEstimate",
    "diagonal",
    "DiagonalEstimate",
    # Many processes
    "DistributedError",
    # Metrics
    *_metrics,
]
