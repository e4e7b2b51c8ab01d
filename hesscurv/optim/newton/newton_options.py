"""The ranges of NewtonCG's hyperparameters, and the parameters that it can move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hesscurv.distributed.sharded import is_sharded
from hesscurv.linalg.precision import require_float64
from hesscurv.optim.ranges import check_choice, check_count, check_positive

_COUNTS = {"rank": 0, "refresh_every": 1, "max_cg": 1, "max_backtracks": 0, "seed": 0}


def check_options(options: dict[str, Any]) -> None:
    """Refuse hyperparameters that are out of range.

    Raises:
        TypeError: If one has another type.
        ValueError: If a value is out of range.
    """
    for name, least in _COUNTS.items():
        check_count(name, options[name], least=least)
    check_count("refresh_matvecs", options["refresh_matvecs"], optional=True)
    rate = options["lr"]
    if isinstance(rate, Tensor) and rate.numel() == 1:
        rate = rate.item()
    check_positive("lr", rate, zero=True)
    check_positive("damping", options["damping"], zero=True)
    check_positive("refresh_tol", options["refresh_tol"])
    check_positive("cg_tol", options["cg_tol"], zero=True, below=1.0)
    check_positive("sufficient_decrease", options["sufficient_decrease"], below=1.0)
    check_positive("backtracking", options["backtracking"], below=1.0)
    check_choice("adapt_damping", options["adapt_damping"], (True, False))
    check_choice("curvature", options["curvature"], ("hessian", "gauss_newton"))
    check_choice("damping_search", options["damping_search"], (None, True, False))
    check_choice("vectorize", options["vectorize"], (True, False))
    bounds = options["damping_bounds"]
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"expected damping_bounds=(least, largest), got {bounds!r}")
    for end in bounds:
        check_positive("damping_bounds", end, zero=True)
    if bounds[0] > bounds[1]:
        raise ValueError(f"expected damping_bounds=(least, largest), got {bounds!r}; swap them")


def check_parameters(params: Sequence[nn.Parameter]) -> None:
    """Refuse parameters that no real vector on one device can hold.

    Raises:
        TypeError: If one is complex, sparse or a DTensor.
        ValueError: If they lie on several devices, or on one without float64.
    """
    for p in params:
        if is_sharded(p):
            raise TypeError(
                "expected whole tensors, got a DTensor; run NewtonCG in one process with all data"
            )
        if not p.is_floating_point() or p.is_sparse:
            raise TypeError(
                f"expected real dense parameters, got {p.dtype} in layout {p.layout}; "
                "give complex ones by their real and imaginary parts (torch.view_as_real)"
            )
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(
            f"expected all parameters on one device, got {devices}; move the model to one"
        )
    for p in params[:1]:
        require_float64(p.device)
