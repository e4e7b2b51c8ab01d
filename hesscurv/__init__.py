"""The top eigenspace of a network's loss Hessian: compute it, compare it, use it."""

from hesscurv.eigensolvers import (
    ConvergenceWarning,
    Eigenpairs,
    ErrorEstimate,
    a_posteriori_error,
    eigsh,
)
from hesscurv.metrics import *  # noqa: F403
from hesscurv.metrics import __all__ as _metrics
from hesscurv.operators import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    LinearOperator,
    ParameterLayout,
    Task,
    supervised,
)

__version__ = "0.1.0"

__all__ = [
    # Operators
    "HessianOperator",
    "GGNOperator",
    "EmpiricalFisherOperator",
    "LinearOperator",
    "ParameterLayout",
    "Task",
    "supervised",
    # Eigensolver
    "eigsh",
    "Eigenpairs",
    "ConvergenceWarning",
    "a_posteriori_error",
    "ErrorEstimate",
    # Metrics
    *_metrics,
]
