"""Optimizers that know the top eigenspace of the loss Hessian."""

from hesscurv.optim.newton.newton_cg import NewtonCG
from hesscurv.optim.newton.newton_options import NewtonOptions
from hesscurv.optim.preconditioned_optimizer import PreconditionedOptimizer
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner
from hesscurv.optim.preconditioner.preconditioner_options import PreconditionerOptions
from hesscurv.optim.preconditioner.preconditioner_report import (
    CurvatureWarning,
    PreconditionerReport,
)
from hesscurv.optim.stable_rate import stable_rate

__all__ = [
    "PreconditionedOptimizer",
    "PreconditionerOptions",
    "NewtonCG",
    "NewtonOptions",
    "PreconditionerReport",
    "CurvatureWarning",
    "LowRankPreconditioner",
    "stable_rate",
]
