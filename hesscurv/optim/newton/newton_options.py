"""Options of `NewtonCG`, the ranges of its settings, and the parameters that it can move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from hesscurv.distributed.sharded import is_sharded
from hesscurv.interface.options import Options
from hesscurv.interface.ranges import check_choice, check_count, check_flag, check_positive
from hesscurv.linalg.precision import require_float64


@dataclass(frozen=True, repr=False)
class NewtonOptions(Options):
    r"""Options of `NewtonCG`, which lie in its parameter groups too and may be changed there.

    Args:
        refresh_tol: Relative residual of the eigenpairs at which a refresh ends early; default 0.1.
        refresh_matvecs: The most products of a refresh, r + 1 at least; default None: 2 r for the
            first and 1.3 r for the others, which start from the last eigenvectors.
        adapt_damping: Whether mu follows the ratio of the actual decrease to the one that the
            quadratic model predicts: times 3 below 0.25, divided by 3 above 0.75, times 10 when
            a step is refused. Default True; False for NysNewton-CG's constant mu.
        damping_bounds: The least and the largest mu, in units of the Hessian; default (1e-12, 1e6).
        sufficient_decrease: c of ``f(t) <= f(0) + c t g^T d``, in (0, 1); default 0.1.
        backtracking: The factor between one t and the next, in (0, 1); default 0.5.
        max_backtracks: How often t is shortened, or another mu tried, before the step is refused;
            default 20.
        damping_search: Whether the step length stays lr and mu is looked for instead, by factors of
            4, from the last step's: one Krylov space has the steps of all mu, so that another one
            costs a loss and no product (see `KrylovModel`). Default None: with "gauss_newton". With
            the Hessian it came to no more than the line search.
        solver: How a step with "gauss_newton" is computed: "dense", by a Cholesky factorisation of
            J J^T or J^T J, the smaller one, where the rows of J can be had at once
            (`SampleWeights`) and there are at most 2048 residuals or parameters; "krylov", by
            products, with the eigenspace as preconditioner. Default "auto": "dense" where that is
            possible and the damping is looked for.
        vectorize: Whether the products of a refresh are computed 8 at once where that works (vmap):
            two to four times faster for small networks, as fast for large ones, in more memory.
            Default True.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> hesscurv.optim.NewtonOptions(refresh_matvecs=40)
        NewtonOptions(refresh_matvecs=40)
    """

    refresh_tol: float = 0.1
    refresh_matvecs: int | None = None
    adapt_damping: bool = True
    damping_bounds: tuple[float, float] = (1e-12, 1e6)
    sufficient_decrease: float = 0.1
    backtracking: float = 0.5
    max_backtracks: int = 20
    damping_search: bool | None = None
    solver: str = "auto"
    vectorize: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_positive("refresh_tol", self.refresh_tol)
        check_count("refresh_matvecs", self.refresh_matvecs, optional=True)
        check_flag("adapt_damping", self.adapt_damping)
        check_positive("sufficient_decrease", self.sufficient_decrease, below=1.0)
        check_positive("backtracking", self.backtracking, below=1.0)
        check_count("max_backtracks", self.max_backtracks, least=0)
        check_flag("damping_search", self.damping_search, optional=True)
        check_choice("solver", self.solver, ("auto", "dense", "krylov"))
        check_flag("vectorize", self.vectorize)
        bounds = self.damping_bounds
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise TypeError(f"expected damping_bounds=(least, largest), got {bounds!r}")
        for end in bounds:
            check_positive("damping_bounds", end, zero=True)
        if bounds[0] > bounds[1]:
            raise ValueError(f"expected damping_bounds=(least, largest), got {bounds!r}; swap them")
        object.__setattr__(self, "damping_bounds", tuple(bounds))

    def as_settings(self) -> dict[str, Any]:
        """Return the options by name, for parameter groups."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def check_settings(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters of a parameter group that are out of range.

    Raises:
        TypeError: If one has another type.
        ValueError: If a value is out of range.
    """
    for name, least in (("rank", 0), ("refresh_every", 1), ("max_cg", 1), ("seed", 0)):
        check_count(name, group[name], least=least)
    rate = group["lr"]
    if isinstance(rate, Tensor) and rate.numel() == 1:
        rate = rate.item()
    check_positive("lr", rate, zero=True)
    check_positive("damping", group["damping"], zero=True)
    check_positive("cg_tol", group["cg_tol"], zero=True, below=1.0)
    check_choice("curvature", group["curvature"], ("hessian", "gauss_newton"))
    NewtonOptions(**{f.name: group[f.name] for f in fields(NewtonOptions)})


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
