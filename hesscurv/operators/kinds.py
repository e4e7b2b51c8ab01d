"""The curvature matrices by the names that `curvature=` takes."""

from __future__ import annotations

from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.fisher import EmpiricalFisherOperator
from hesscurv.operators.ggn import GGNOperator
from hesscurv.operators.hessian import HessianOperator

OPERATORS: dict[str, type[CurvatureOperator]] = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "fisher": EmpiricalFisherOperator,
}
