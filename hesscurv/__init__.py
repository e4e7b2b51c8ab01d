"""The top eigenspace of a network's loss Hessian: compute it, compare it, use it."""

from hesscurv import hooks, optim, plots, pruning
from hesscurv.distributed import DistributedError
from hesscurv.eigensolvers import (
    ConvergenceWarning,
    Eigenpairs,
    ErrorEstimate,
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
