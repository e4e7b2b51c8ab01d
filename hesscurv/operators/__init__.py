"""Curvature matrices of a model's loss as matrix-free linear operators."""

from hesscurv.operators.fisher import EmpiricalFisherOperator
from hesscurv.operators.ggn import GGNOperator
from hesscurv.operators.hessian import HessianOperator
from hesscurv.operators.linear_operator import DenseOperator, LinearOperator, as_linear_operator
from hesscurv.operators.parameters import ParameterLayout, select_parameters
from hesscurv.operators.tasks import Task, supervised

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
