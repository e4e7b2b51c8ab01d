"""Entry point of all eigensolvers: top eigenpairs of a symmetric operator."""

from __future__ import annotations

import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hesscurv.distributed.sharded import whole
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.eigensolvers.krylov.block_krylov import block_krylov
from hesscurv.eigensolvers.residuals import ConvergenceWarning, evenly_spaced
from hesscurv.eigensolvers.residuals import converged as is_converged
from hesscurv.eigensolvers.sample_space.automatic import sample_space_if_cheaper
from hesscurv.eigensolvers.sample_space.solver import sample_space
from hesscurv.eigensolvers.sketch.single_pass import single_pass
from hesscurv.eigensolvers.sketch.two_pass import rayleigh_ritz
from hesscurv.interface.integers import as_int
from hesscurv.interface.uncompiled import uncompiled
from hesscurv.linalg.floating_range import RangeError
from hesscurv.linalg.ritz import sides_of
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.matrix_operators import as_linear_operator

logger = logging.getLogger(__name__)

METHODS: dict[str, Callable[..., Eigenpairs]] = {
    "auto": block_krylov,
    "block_krylov": block_krylov,
    "sample_space": sample_space,
    "single_pass": single_pass,
    "rayleigh_ritz": rayleigh_ritz,
}


@uncompiled
def eigsh(
    H: Any,
    k: int,
    method: str = "auto",
    which: str = "LM",
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    generator: torch.Generator | None = None,
    initial: Tensor | Eigenpairs | None = None,
    storage: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> Eigenpairs:
    r"""Compute k eigenpairs at an end of the spectrum of a symmetric operator, matrix-free.

    :math:`H v_i = \lambda_i v_i` with :math:`|\lambda_1| \ge |\lambda_2| \ge ...`, both signs, for
    ``which="LM"``.

    Args:
        H: A hesscurv operator, a dense or sparse symmetric tensor (D, D), or any object with
            `shape`, `dtype`, `device` and ``@`` on tensors (D,) and (D, b).
        k: Number of pairs, 1 <= k <= D.
        method: "auto" (default): "sample_space" where H is a GGN or Fisher on so few samples that
            its rows are predicted to cost less, and no option of "block_krylov" is given; else
            "block_krylov", which needs the fewest matvecs at every accuracy. Or "sample_space"
            (GGN and Fisher: exact, from the Gram matrix of per-sample rows), "single_pass" (the
            sketch of the paper: independent matvecs, uncontrolled accuracy) or "rayleigh_ritz" (two
            passes, optional subspace iterations).
        which: "LM", the k largest magnitudes (default); "LA", the k largest values, largest first;
            "SA", the k smallest values, smallest first; as in SciPy. "LA" and "SA" are slow if
            fewer than k eigenvalues have that sign, since the others lie inside the spectrum.
        tol: Pair i has converged when its residual is at most
            ``max(tol |lambda_i|, 10 eps |lambda_1|)``, with the largest known magnitude as
            ``|lambda_1|``, and no eigenvalue is missed before it, see `block_krylov`; default 1e-3.
        max_matvecs: Maximal number of matvecs; default depends on the method.
        generator: Source of random numbers; default a new one with seed 0, so that the same call
            gives the same result. The global generator is never used.
        initial: A space (D, k0), or Eigenpairs, for a warm start; not for "single_pass".
        storage: Location of the basis, "device", "host" (or "cpu", the same) or a folder on a
            disk; by default chosen from the free memory. With "block_krylov" also `storage_dtype`.
        checkpoint: A folder for checkpoints, from which the same call resumes after a kill; for
            "block_krylov". For the single pass use `measure` and `assemble`.
        progress: Whether to show a progress bar in a terminal or a notebook: converged pairs,
            products, their rate, the expected end, the memory in use. Elsewhere nothing is printed:
            the same goes to the logger "hesscurv", level INFO, at most every 30 seconds.
        **options: The method's own options; see `block_krylov`, `single_pass`, `rayleigh_ritz`.

    Returns:
        The eigenpairs with residuals, convergence and cost.

    Raises:
        TypeError: If H is not an operator, k not an int, or an option unknown to the method.
        ValueError: If a value is out of range.

    Warns:
        ConvergenceWarning: If pairs have not converged.
        RuntimeWarning: If the operator's products differ, taken together, from those of its
            reference linearization.

    Example:
        >>> pairs = hesscurv.eigsh(torch.diag(torch.tensor([1.0, -3.0, 2.0])), k=2)
        >>> pairs.eigenvalues.round(decimals=3)
        tensor([-3.,  2.])
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {list(METHODS)}, got {method!r}")
    sides_of(which)
    solver = METHODS[method]
    operator = as_linear_operator(H)
    if initial is not None:  # a collective, so before the checks, which run on each rank alone
        initial = whole(initial.eigenvectors if isinstance(initial, Eigenpairs) else initial)
    with operator.communicator.together("reading the arguments of eigsh"):
        k, max_matvecs = _check_numbers(operator, k, tol, max_matvecs)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"expected a torch.Generator, got {type(generator).__name__}; for a seed use "
                "torch.Generator().manual_seed(seed)"
            )
        accepted = inspect.signature(solver).parameters
        if initial is not None:
            if "initial" not in accepted:
                raise ValueError(
                    f"method {method!r} cannot start from `initial`; use 'block_krylov'"
                )
            options["initial"] = _check_initial(operator, initial)
        for name, value in (("storage", storage), ("checkpoint", checkpoint)):
            if value is not None:
                if name not in accepted:
                    raise ValueError(f"method {method!r} has no {name}; use method='block_krylov'")
                options[name] = value
        unknown = [name for name in options if name not in accepted]
        if unknown:
            known = [n for n in accepted if n not in inspect.signature(eigsh).parameters]
            raise TypeError(f"method {method!r} has no option {unknown}; its options are {known}")
    plain = method == "auto" and not options and max_matvecs is None
    options |= {"which": which, "tol": tol, "generator": generator, "progress": progress}
    if plain:
        found = sample_space_if_cheaper(operator, k, **options)
        if found is not None:
            return found
    before, state = operator.num_matvecs, None if generator is None else generator.get_state()
    try:
        pairs = solver(operator, k, max_matvecs=max_matvecs, **options)
    except RangeError as error:
        factor = error.factor
    else:
        operator.confirm()
        return _with_product_errors(operator, pairs, tol)
    logger.info("squares of the products leave the range of float64: H is scaled by %.3g", factor)
    if generator is not None and state is not None:
        generator.set_state(state)
    lost = operator.num_matvecs - before
    left = None if max_matvecs is None else max(k, max_matvecs - lost)
    pairs = solver(operator * factor, k, max_matvecs=left, **options)
    operator.confirm()
    pairs = replace(
        pairs,
        eigenvalues=pairs.eigenvalues / factor,
        residuals=pairs.residuals / factor,
        num_matvecs=pairs.num_matvecs + lost,
        info={n: v / factor if n == "noise" else v for n, v in pairs.info.items()},
    )
    return _with_product_errors(operator, pairs, tol)


def _with_product_errors(operator: LinearOperator, pairs: Eigenpairs, tol: float) -> Eigenpairs:
    """Add the error of reduced-precision products to the residuals.

    Measured on a few of the pairs and assumed for the others: the rounding inside a model does not
    depend on the eigenvalue.
    """
    few = pairs[evenly_spaced(4, len(pairs))]
    errors = operator.product_errors(whole(few.eigenvectors))
    if errors is None:
        return pairs
    error = float(errors.max())
    residuals = pairs.residuals + error
    eps = torch.finfo(operator.dtype).eps
    converged = pairs.converged & is_converged(residuals, pairs.eigenvalues, tol, eps)
    lost = int(pairs.converged.sum() - converged.sum())
    if lost:
        warnings.warn(
            f"{lost} of {len(pairs)} eigenpairs are not known to tol={tol:g}: products in reduced "
            f"precision are off by {error:.2g}, which is part of their residuals; compute with "
            "precision='highest', or raise tol",
            ConvergenceWarning,
            stacklevel=4,
        )
    info = {**pairs.info, "product_error": error}
    return replace(pairs, residuals=residuals, converged=converged, info=info)


def _check_numbers(
    operator: LinearOperator, k: int, tol: float, max_matvecs: int | None
) -> tuple[int, int | None]:
    """Validate k, tol and max_matvecs; return k and max_matvecs as plain ints."""
    dim = operator.shape[0]
    k = as_int("k", k)
    if not 1 <= k <= dim:
        raise ValueError(f"expected 1 <= k <= D = {dim}, got k={k}")
    if not (isinstance(tol, (int, float)) and math.isfinite(tol) and tol >= 0):
        raise ValueError(f"expected a finite tol >= 0, got {tol!r}")
    if max_matvecs is not None:
        max_matvecs = as_int("max_matvecs", max_matvecs)
        if max_matvecs < k:
            raise ValueError(
                f"expected max_matvecs >= k = {k}, got {max_matvecs}: every pair needs at least "
                "one product, usually two"
            )
    if operator.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"expected an operator of dtype float32 or float64, got {operator.dtype}; an "
            "orthonormal basis needs this precision"
        )
    return k, max_matvecs


def _check_initial(operator: LinearOperator, vectors: Any) -> Tensor:
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        raise TypeError(
            f"expected initial to be Eigenpairs or a floating tensor (D, k0), got "
            f"{type(vectors).__name__}"
        )
    dim = operator.shape[0]
    if vectors.ndim != 2 or vectors.shape[0] != dim or not 1 <= vectors.shape[1] <= dim:
        raise ValueError(
            f"expected initial of shape ({dim}, k0), 1 <= k0 <= D, got {tuple(vectors.shape)}; "
            "vectors are columns"
        )
    if not bool(torch.isfinite(vectors).all()):
        raise ValueError("expected a finite initial space, got NaN or inf entries")
    return vectors.detach()
