"""Curvature matrices of a model's loss as matrix-free linear operators."""

from hesscurv.objective.parameters import ParameterLayout, select_parameters
from hesscurv.objective.tasks import Task, supervised
from hesscurv.operators.fisher import EmpiricalFisherOperator
from hesscurv.operators.ggn import GGNOperator
from hesscurv.operators.hessian import HessianOperator
from hesscurv.operators.linear_operator import DenseOperator, LinearOperator, as_linear_operator

__all__ = [
    "DenseOperator",
    "EmpiricalFisherOperator",
    "GGNOperator",
    "HessianOperator",
    "LinearOperator",
    "ParameterLayout",
    "Task",
    "as_linear_operator",
    "select_parameters",
    "supervised",
]
