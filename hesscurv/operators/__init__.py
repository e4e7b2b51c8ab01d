"""Curvature matrices of a model's loss as matrix-free linear operators."""

from hesscurv.objective.parameters import ParameterLayout, select_parameters
from hesscurv.objective.tasks import Task, supervised
from hesscurv.operators.fisher import EmpiricalFisherOperator
from hesscurv.operators.ggn import GGNOperator
from hesscurv.operators.hessian import HessianOperator
from hesscurv.operators.linear_operator import LinearOperator, OperatorSum
from hesscurv.operators.matrix_operators import (
    DenseOperator,
    SymmetricOperator,
    as_linear_operator,
)

__all__ = [
    "DenseOperator",
    "EmpiricalFisherOperator",
    "GGNOperator",
    "HessianOperator",
    "LinearOperator",
    "OperatorSum",
    "ParameterLayout",
    "SymmetricOperator",
    "Task",
    "as_linear_operator",
    "select_parameters",
    "supervised",
]
